# SPDX-License-Identifier: BSD-3-Clause
"""torch.ops.resnorm.encode under autograd, torch.func, autocast, on the meta device and for those who trace it."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from .encode_cases import DIM, HEADS, PADDINGS, assert_close, case, encode, mask_of, parameters_of, reference

OPTIONS = {"head_dim": DIM // HEADS, "scale": 0.3, "eps": 1e-5, "activation": "gelu"}


pytestmark = pytest.mark.usefixtures("fresh")


@pytest.mark.parametrize(
    "options, mask, dtype, grad",
    [
        ({}, "none", torch.float32, False),
        ({"norm_first": True, "causal": True}, "holes", torch.float64, False),
        ({"padding": "skip_unless_first"}, "left", torch.float32, False),
        ({"padding": "skip_if_trailing", "product_dtype": torch.bfloat16}, "hidden", torch.float32, False),
        ({"activation": "gelu_tanh"}, "right", torch.bfloat16, False),
        ({"causal": True}, "right", torch.float32, True),
        ({"norm_first": True, "padding": "skip_if_trailing"}, "holes", torch.float64, True),
    ],
)
def test_opcheck(options, mask, dtype, grad):
    _, parameters, x = case(dtype, count=1)
    if grad:
        x, parameters = x.requires_grad_(), [each.requires_grad_() for each in parameters]
    arguments = (x, mask_of(mask), parameters, 1), OPTIONS | options
    torch.library.opcheck(torch.ops.resnorm.encode.default, *arguments, rtol=5e-2, atol=5e-2)


@pytest.mark.parametrize("separate", [False, True])
@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("norm_first", [False, True])
def test_gradcheck(norm_first, padding, separate):
    layers, _, x = case(torch.float64, count=1, norm_first=norm_first)
    parameters = [each.detach().requires_grad_() for each in parameters_of(layers, separate=separate)]
    mask = mask_of("holes")[1:, :3]

    def function(x, *parameters):
        return encode(x, mask, parameters, 1, norm_first=norm_first, padding=padding, causal=norm_first)

    x = x[1:, :3].requires_grad_()
    assert torch.autograd.gradcheck(function, (x, *parameters), fast_mode=True)
    with sdpa_kernel(SDPBackend.MATH):  # the others of torch have no second derivatives
        assert torch.autograd.gradgradcheck(function, (x, *parameters), fast_mode=True)


@pytest.mark.parametrize("wanted", ["input", "parameters", "one bias", "all"])
@pytest.mark.parametrize("mask", ["none", "right", "left"])
def test_gradients_are_those_of_torch(mask, wanted):
    layers, _, x = case(torch.float64)
    every = list(layers.parameters())
    targets = {"input": [x], "parameters": every, "one bias": [layers[1].norm1.bias], "all": [x, *every]}[wanted]
    layers.requires_grad_(False)
    for target in targets:
        target.requires_grad_()
    mask = mask_of(mask)
    real = torch.ones(3, 5, dtype=torch.bool) if mask is None else mask
    expected = x
    for layer in layers:
        expected = layer(expected, src_key_padding_mask=~real)
    output, grad_output = encode(x, mask, parameters_of(layers)), torch.randn_like(expected)[real]
    torch.testing.assert_close(
        torch.autograd.grad(output[real], targets, grad_output),
        torch.autograd.grad(expected[real], targets, grad_output),
    )


@pytest.mark.parametrize("padding", PADDINGS)
def test_vmap(padding):
    _, parameters, x = case(torch.float64)
    xs, masks = torch.stack((x, x + 1)), torch.stack((mask_of("right"), mask_of("left")))
    others = [torch.stack((each, each * 1.1)) for each in parameters]

    def function(x, mask, *parameters):
        return encode(x, mask, parameters, padding=padding)

    for dims in ((0, 0, None), (0, None, None), (None, 0, None), (None, None, 0), (0, 0, 0)):
        arguments = [xs if dims[0] == 0 else x, masks if dims[1] == 0 else masks[0]]
        arguments += others if dims[2] == 0 else parameters
        in_dims = (*dims[:2], *dims[2:] * len(parameters))
        expected = torch.stack(
            [function(*(each if dim is None else each[i] for each, dim in zip(arguments, in_dims))) for i in range(2)]
        )
        torch.testing.assert_close(torch.vmap(function, in_dims)(*arguments), expected)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("wanted", ["input", "weight"])
def test_forward_mode(wanted, grad):
    """Whatever has the tangent, and with grad mode off too: it comes, or torch's attention says that it has none."""
    _, parameters, x = case(torch.float64)
    step = 1e-6

    def function(each):
        weight = each if wanted == "weight" else parameters[6]
        return encode(each if wanted == "input" else x, mask_of("right"), [*parameters[:6], weight, *parameters[7:]])

    primal = x if wanted == "input" else parameters[6]
    tangent = torch.randn_like(primal)
    expected = (function(primal + step * tangent) - function(primal - step * tangent)) / (2 * step)

    def dual():
        with torch.set_grad_enabled(grad), forward_ad.dual_level():
            return forward_ad.unpack_dual(function(forward_ad.make_dual(primal, tangent))).tangent

    def jvp():
        with torch.set_grad_enabled(grad):
            return torch.func.jvp(function, (primal,), (tangent,))[1]

    for way in (dual, jvp):
        with pytest.raises(NotImplementedError, match="forward AD"):
            way()
        with sdpa_kernel(SDPBackend.MATH):
            torch.testing.assert_close(way(), expected, rtol=1e-5, atol=1e-7)


def test_grad_of_torch_func():
    _, parameters, x = case(torch.float64)

    def loss(x):
        return encode(x, mask_of("right"), parameters).square().sum()

    (expected,) = torch.autograd.grad(loss(x.requires_grad_()), x)
    with torch.no_grad():  # which ends at the transform
        torch.testing.assert_close(torch.func.grad(loss)(x.detach()), expected)
    per_sample = torch.vmap(torch.func.grad(loss), in_dims=1)(torch.stack((x.detach(), x.detach()), 1))
    torch.testing.assert_close(per_sample, torch.stack((expected, expected)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_meta(dtype):
    _, parameters, x = case(dtype)
    parameters, x = [each.to("meta") for each in parameters], x.to("meta").transpose(0, 1)
    for mask in (None, torch.ones(5, 3, dtype=torch.bool, device="meta")):
        output = encode(x, mask, parameters)
        assert output.is_meta and output.shape == x.shape and output.dtype == dtype and output.is_contiguous()


@pytest.mark.parametrize("norm_first", [False, True])
def test_products_in_another_dtype(norm_first):
    """As under autocast, with residual sums and norms in float32."""
    layers, parameters, x = case(norm_first=norm_first)
    mask, expected = mask_of("right"), reference(x, mask_of("right"), layers, padding="skip")
    output = encode(x, mask, parameters, norm_first=norm_first, product_dtype=torch.bfloat16)
    assert output.dtype == torch.float32
    assert_close(output, expected, torch.bfloat16)
    assert_close(encode(x, mask, parameters, norm_first=norm_first), expected)  # what is kept is of one dtype
    assert_close(encode(x, mask, parameters, norm_first=norm_first, product_dtype=torch.float32), expected)


@pytest.mark.parametrize("padding", ["skip", "skip_unless_first"])
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_autocast_keeps_the_dtype(dtype, norm_first, grad, padding):
    """As the meta kernel says."""
    layers, parameters, x = case(dtype, norm_first=norm_first)
    mask = mask_of("left")
    with torch.autocast("cpu", torch.bfloat16):
        output = encode(x.requires_grad_(grad), mask, parameters, norm_first=norm_first, padding=padding)
    assert output.dtype == dtype
    assert_close(output.detach(), reference(x.detach(), mask, layers, padding=padding), torch.bfloat16)


def test_inference_mode():
    layers, parameters, x = case()
    mask = mask_of("right")
    with torch.inference_mode():
        assert_close(encode(x, mask, parameters), reference(x, mask, layers, padding="skip"))
        made = [each.clone() for each in parameters]
        assert_close(encode(x, mask, made), reference(x, mask, layers, padding="skip"))
        made[0][1, 1] += 3  # what torch does not count there
        changed = encode(x, mask, made)
    parameters[0][1, 1] += 3
    torch.testing.assert_close(changed, encode(x, mask, parameters))


def test_a_negative_bit_is_resolved():
    _, parameters, x = case()
    for grad in (False, True):
        given = [torch._neg_view(-each) for each in parameters]
        output = encode(torch._neg_view(-x).requires_grad_(grad), mask_of("right"), given)
        torch.testing.assert_close(output.detach(), encode(x, mask_of("right"), parameters))
