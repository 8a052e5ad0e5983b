# SPDX-License-Identifier: BSD-3-Clause
"""Attention as torch's dispatcher, its transforms and its compiler see it."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from resnorm_ext import functional, reference

from .cases import HALF, HEAD_DIM, HEADS, batch, cumulative, gradient, random_like

SEED = torch.tensor(-12345)
DROPOUT = {"no dropout": {}, "dropout": {"dropout_p": 0.3, "seed": SEED}}
with_and_without_dropout = pytest.mark.parametrize("options", DROPOUT.values(), ids=DROPOUT)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize(
    "options", [(None, None, False, 0.0, None), (9, 0.5, True, 0.3, SEED), (None, -0.5, False, 1.0, SEED)]
)
def test_opcheck(options, requires_grad, dtype):
    qkv, cu_seqlens = batch((3, 0, 9), dtype)
    operators = torch.ops.resnorm
    forward = operators._packed_attention_forward.default
    torch.library.opcheck(forward, (qkv, cu_seqlens, *options))
    output, logsumexp = forward(qkv, cu_seqlens, *options)
    qkv.requires_grad_(requires_grad)
    torch.library.opcheck(operators.packed_attention.default, (qkv, cu_seqlens, *options))
    grad = random_like(output).requires_grad_(requires_grad)
    torch.library.opcheck(
        operators._packed_attention_backward.default, (grad, qkv, output, logsumexp, cu_seqlens, *options)
    )


def test_every_operator_is_checked_above():
    registered = {schema.name for schema in torch._C._jit_get_all_schemas() if schema.name.startswith("resnorm::")}
    assert {name.removeprefix("resnorm::") for name in registered if "attention" in name} == {
        "packed_attention",
        "_packed_attention_forward",
        "_packed_attention_backward",
    }


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_forward_pass_keeps_the_logarithm_of_the_sums(dtype, causal):
    """Of all weights, dropped ones too."""
    qkv, cu_seqlens = batch((3, 0, 600), dtype)
    query, key, _ = qkv.double().permute(1, 2, 0, 3)
    scores = (query @ key.mT * 0.5).masked_fill(~reference.visible_keys(cu_seqlens, 603, causal), -torch.inf)
    output, logsumexp = torch.ops.resnorm._packed_attention_forward(qkv, cu_seqlens, None, 0.5, causal, 0.3, SEED)
    assert logsumexp.dtype == torch.float32 and logsumexp.is_contiguous() and output.is_contiguous()
    torch.testing.assert_close(logsumexp.double(), scores.logsumexp(-1).T / math.log(2), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["output", "logsumexp"])
def test_the_backward_pass_needs_what_the_forward_pass_kept(name):
    qkv, cu_seqlens = batch((3, 4))
    options = (None, None, False, 0.0, None)
    output, logsumexp = torch.ops.resnorm._packed_attention_forward(qkv, cu_seqlens, *options)
    kept = {"output": output, "logsumexp": logsumexp}
    backward = torch.ops.resnorm._packed_attention_backward
    with pytest.raises(RuntimeError, match="Expected the output and logsumexp of the forward pass, but got None"):
        backward(output, qkv, *(kept | {name: None}).values(), cu_seqlens, *options)
    for wrong in (kept[name][1:], kept[name].double()):
        with pytest.raises(RuntimeError, match=f"Expected {name} (of|to be of)"):
            backward(output, qkv, *(kept | {name: wrong}).values(), cu_seqlens, *options)
    with pytest.raises(RuntimeError, match="Expected grad_output to be of"):
        backward(output[1:], qkv, output, logsumexp, cu_seqlens, *options)


@with_and_without_dropout
def test_torch_func(options):
    lengths = (3, 4)
    cu_seqlens = cumulative(lengths)
    batches = torch.randn(5, sum(lengths), 3, HEADS, HEAD_DIM, dtype=torch.float64)
    ours = partial(functional.packed_attention, cu_seqlens=cu_seqlens, causal=True, training=True, **options)
    expected = partial(reference.packed_attention, cu_seqlens=cu_seqlens, causal=True, **options)

    def loss(attention):
        return lambda qkv: attention(qkv).square().sum()

    def grad(attention):
        return torch.func.grad(loss(attention))

    qkv, tangent = batches[0], batches[1]
    torch.testing.assert_close(grad(ours)(qkv), grad(expected)(qkv))
    outputs = torch.stack([expected(qkv) for qkv in batches])
    torch.testing.assert_close(torch.func.vmap(ours)(batches), outputs)
    torch.testing.assert_close(torch.func.vmap(ours, 1, 2)(batches.movedim(0, 1)), outputs.movedim(0, 2))
    torch.testing.assert_close(
        torch.func.vmap(grad(ours))(batches), torch.stack([grad(expected)(qkv) for qkv in batches])
    )
    torch.testing.assert_close(torch.func.jvp(ours, (qkv,), (tangent,)), torch.func.jvp(expected, (qkv,), (tangent,)))
    second = [torch.func.jvp(grad(attention), (qkv,), (tangent,)) for attention in (ours, expected)]
    torch.testing.assert_close(*second)


@with_and_without_dropout
@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
def test_torch_func_of_what_has_kernels(dtype, options):
    lengths = (3, 4)
    qkv, cu_seqlens = batch(lengths, dtype)
    grad = random_like(qkv[:, 0])
    attend = partial(functional.packed_attention, cu_seqlens=cu_seqlens, training=True, **options)
    tolerance = 1e-5 if dtype == torch.float32 else 4 * torch.finfo(dtype).eps
    output, pullback = torch.func.vjp(attend, qkv)
    torch.testing.assert_close(output, attend(qkv), rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(pullback(grad)[0], gradient(attend, qkv, grad), rtol=tolerance, atol=tolerance)


@with_and_without_dropout
def test_forward_mode(options):
    qkv, cu_seqlens = batch((3, 4))
    tangent = random_like(qkv)
    attend = partial(functional.packed_attention, cu_seqlens=cu_seqlens, training=True, **options)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(qkv, tangent)
        result = torch.autograd.forward_ad.unpack_dual(attend(dual))
    expected = torch.func.jvp(
        partial(reference.packed_attention, cu_seqlens=cu_seqlens, **options), (qkv.double(),), (tangent.double(),)
    )
    torch.testing.assert_close((result.primal.double(), result.tangent.double()), expected, rtol=1e-5, atol=1e-5)


def test_vmap_over_seeds():
    """As many masks as seeds, whoever draws them."""
    qkv, cu_seqlens = batch((3, 40), torch.float64)
    attend = partial(functional.packed_attention, qkv, cu_seqlens, dropout_p=0.5, training=True)
    seeds = torch.arange(4)
    outputs = torch.func.vmap(lambda seed: attend(seed=seed))(seeds)
    torch.testing.assert_close(outputs, torch.stack([attend(seed=seed) for seed in seeds]))
    drawn = torch.func.vmap(lambda _: attend(), randomness="different")(seeds)
    assert not torch.equal(drawn[0], drawn[1])
    same = torch.func.vmap(lambda _: attend(), randomness="same")(seeds)
    assert torch.equal(same[0], same[1])


@pytest.mark.parametrize("requires_grad", [False, True])
@with_and_without_dropout
def test_one_compiled_graph_serves_other_sequences(options, requires_grad):
    def attend(qkv, cu_seqlens):
        return functional.packed_attention(qkv, cu_seqlens, causal=True, training=True, **options)

    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager", dynamic=True)
    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        for lengths in ((3, 4), (5, 2), (1, 20), (30, 4)):
            qkv, cu_seqlens = batch(lengths)
            qkv.requires_grad_(requires_grad)
            output, expected = compiled(qkv, cu_seqlens), attend(qkv, cu_seqlens)
            assert torch.equal(output, expected)
            if requires_grad:
                grads = [torch.autograd.grad(o.square().sum(), qkv)[0] for o in (output, expected)]
                assert torch.equal(*grads)


def test_compiled_code_draws_a_seed_at_every_call():
    qkv, cu_seqlens = batch((3, 40))
    qkv.requires_grad_()
    compiled = torch.compile(functional.packed_attention, fullgraph=True, backend="aot_eager")
    outputs = [compiled(qkv, cu_seqlens, dropout_p=0.5, training=True) for _ in range(2)]
    assert not torch.equal(*outputs)
    gradients = [torch.autograd.grad(output.sum(), qkv)[0] for output in outputs]
    assert not torch.equal(*gradients)


@with_and_without_dropout
def test_a_compiled_loss_and_its_gradient(options):
    lengths = (3, 40)
    x, cu_seqlens, weight = torch.randn(43, 16), cumulative(lengths), torch.randn(48, 16)

    def loss(weight):
        qkv = torch.nn.functional.linear(x, weight).unflatten(-1, (3, 2, 8))
        return functional.packed_attention(qkv, cu_seqlens, causal=True, training=True, **options).square().sum()

    weights = [weight.clone().requires_grad_() for _ in range(2)]
    loss(weights[0]).backward()
    torch.compile(loss, fullgraph=True, backend="aot_eager")(weights[1]).backward()
    torch.testing.assert_close(weights[1].grad, weights[0].grad)


@with_and_without_dropout
def test_autocast_casts_as_torch_does(options):
    qkv, cu_seqlens = batch((3, 4))
    attend = partial(functional.packed_attention, cu_seqlens=cu_seqlens, training=True, **options)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output, grad = attend(qkv), gradient(attend, qkv, random_like(qkv[:, 0]))
    assert output.dtype == torch.bfloat16 and grad.dtype == torch.float32
    assert torch.equal(output, attend(qkv.bfloat16()))
    assert torch.equal(grad, gradient(attend, qkv.bfloat16(), random_like(qkv[:, 0])).float())


@with_and_without_dropout
def test_fake_results_describe_the_real_ones(options):
    qkv, cu_seqlens = batch((3, 4))
    attend = partial(functional.packed_attention, training=True)
    real = attend(qkv, cu_seqlens, **options)
    with FakeTensorMode() as mode:
        fakes = {name: mode.from_tensor(t) if isinstance(t, Tensor) else t for name, t in options.items()}
        leaf = mode.from_tensor(qkv).requires_grad_()
        fake = attend(leaf, mode.from_tensor(cu_seqlens), **fakes)
        fake.sum().backward()
    assert (fake.dtype, fake.shape, fake.stride()) == (real.dtype, real.shape, real.stride())
    assert leaf.grad.shape == qkv.shape
    meta = {name: t.to("meta") if isinstance(t, Tensor) else t for name, t in options.items()}
    assert attend(qkv.to("meta"), cu_seqlens.to("meta"), **meta).shape == real.shape


@with_and_without_dropout
def test_inference_mode(options):
    qkv, cu_seqlens = batch((3, 4))
    expected = functional.packed_attention(qkv, cu_seqlens, training=True, **options)
    with torch.inference_mode():
        output = functional.packed_attention(qkv.requires_grad_(), cu_seqlens, training=True, **options)
    assert output.is_inference() and torch.equal(output, expected)
