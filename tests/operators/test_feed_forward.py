# SPDX-License-Identifier: BSD-3-Clause
"""The feed-forward block against the three operations that it is made of, in float64."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.flop_counter import FlopCounterMode

from resnorm_ext import reference
from resnorm_ext.functional import feed_forward, linear

SEED = torch.tensor(5)
ACTIVATIONS = ["relu", "gelu", "gelu_tanh"]


def make(rows=(3, 70), widths=(64, 128, 48), dtype=torch.float32, bias=True) -> list[Tensor | None]:
    """input, weight1, bias1, weight2, bias2."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64, generator=generator).mul(shape[-1] ** -0.5).to(dtype)

    into, hidden, out = widths
    biases = (random(hidden), random(out)) if bias else (None, None)
    operands = random(*rows, into), random(hidden, into), biases[0], random(out, hidden), biases[1]
    return [None if each is None else each.requires_grad_() for each in operands]


def formula(input, weight1, bias1, weight2, bias2, activation, p) -> Tensor:
    hidden = reference.dropout(reference.activated(F.linear(input, weight1, bias1), activation), p, SEED)
    return F.linear(hidden, weight2, bias2)


def outputs_and_gradients(run, operands: list[Tensor | None]) -> list[Tensor]:
    output = run(*operands)
    grad = torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).to(output.dtype)
    return [output, *torch.autograd.grad(output, [each for each in operands if each is not None], grad)]


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_forward_and_gradients(activation, bias, p, dtype):
    operands = make(dtype=dtype, bias=bias)
    exact = [None if each is None else each.detach().double().requires_grad_() for each in operands]

    def ours(*operands):
        return feed_forward(*operands, activation=activation, dropout_p=p, training=True, seed=SEED)

    expected = outputs_and_gradients(lambda *operands: formula(*operands, activation, p), exact)
    eps = torch.finfo(dtype).eps
    # Where rounding moves a sum across 0, which happens about as often as eps says, relu's derivative is another one.
    tolerance = eps**0.5 if activation == "relu" and dtype.itemsize == 2 else 8 * eps
    for actual, other in zip(outputs_and_gradients(ours, operands), expected, strict=True):
        assert actual.dtype == dtype
        assert (actual.double() - other).norm() <= tolerance * other.norm()
    with torch.no_grad():
        without = ours(*operands)
    assert (without.double() - expected[0]).norm() <= tolerance * expected[0].norm()


@pytest.mark.parametrize("p", [0.0, 0.4])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh"])
def test_gradcheck(activation, bias, p):
    operands = make((2, 3), (4, 5, 3), torch.float64, bias)
    given = [each for each in operands if each is not None]

    def call(*given):
        rest = iter(given)
        return feed_forward(
            *(None if each is None else next(rest) for each in operands),
            activation=activation,
            dropout_p=p,
            training=True,
            seed=SEED,
        )

    assert torch.autograd.gradcheck(call, given)
    assert torch.autograd.gradgradcheck(call, given)


@pytest.mark.parametrize("wanted", range(5))
def test_one_gradient_alone(wanted):
    operands = [each.detach().requires_grad_(index == wanted) for index, each in enumerate(make())]
    exact = [each.detach().double().requires_grad_(index == wanted) for index, each in enumerate(make())]
    output, expected = feed_forward(*operands), formula(*exact, "gelu", 0.0)
    (grad,) = torch.autograd.grad(output.sum(), operands[wanted])
    torch.testing.assert_close(
        grad.double(), torch.autograd.grad(expected.sum(), exact[wanted])[0], rtol=1e-4, atol=1e-4
    )


def test_what_is_kept_for_the_backward_pass():
    """The input, and the first product: neither a mask nor what dropout left of the activations."""
    input, *parameters = make((256,), (64, 256, 64))
    kept = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.numel() * tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = feed_forward(input, *parameters, dropout_p=0.1, training=True)
    ours = sum(kept.values()) - sum(
        each.numel() * 4 for each in parameters if each.untyped_storage().data_ptr() in kept
    )
    assert ours <= 256 * (64 + 256) * 4 + 8  # and the seed
    assert output.requires_grad


def test_saved_tensors_that_are_written_are_seen():
    operands = make()
    output = feed_forward(*operands)
    with torch.no_grad():
        operands[3].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


@pytest.mark.parametrize("context", [nullcontext, lambda: torch.autocast("cpu", torch.bfloat16)])
def test_autocast_multiplies_as_torchs_linear_does(context):
    operands = make()
    with context():
        output = feed_forward(*operands)
        assert output.dtype == F.linear(operands[0], operands[1]).dtype
    grads = torch.autograd.grad(output.float().sum(), operands)
    assert all(grad.dtype == torch.float32 for grad in grads)


def test_torch_func():
    operands = make((4, 6), (5, 7, 3), torch.float64)
    operands = [each.detach() for each in operands]

    def ours(*operands):
        return feed_forward(*operands, activation="gelu", dropout_p=0.3, training=True, seed=SEED)

    def theirs(*operands):
        return formula(*operands, "gelu", 0.3)

    tangents = [torch.randn_like(each) for each in operands]
    torch.testing.assert_close(
        torch.func.jvp(ours, tuple(operands), tuple(tangents)), torch.func.jvp(theirs, tuple(operands), tuple(tangents))
    )
    for actual, expected in zip(
        *(torch.func.grad(lambda *o, f=f: f(*o).square().sum(), tuple(range(5)))(*operands) for f in (ours, theirs))
    ):
        torch.testing.assert_close(actual, expected)
    weights = torch.stack([operands[1], 2 * operands[1]])
    batched = torch.func.vmap(lambda weight: feed_forward(operands[0], weight, *operands[2:]))(weights)
    torch.testing.assert_close(batched[1], feed_forward(operands[0], weights[1], *operands[2:]))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled(backend):
    def step(*operands):
        return feed_forward(*operands, dropout_p=0.3, training=True, seed=SEED)

    operands = make()
    compiled = torch.compile(step, fullgraph=True, backend=backend)
    for actual, expected in zip(outputs_and_gradients(compiled, operands), outputs_and_gradients(step, operands)):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({0: torch.ones(2, 3)}, RuntimeError, r"\(\*, 64\).*\[2, 3\]"),
        ({2: torch.ones(3)}, RuntimeError, r"\[128\].*\[3\]"),
        ({3: torch.ones(48, 7)}, RuntimeError, r"\[48, 7\].*128"),
        ({4: torch.ones(5)}, RuntimeError, r"48.*5"),
        ({1: torch.ones(128, 64).double()}, RuntimeError, "Float.*Double"),
    ],
)
@pytest.mark.parametrize("requires_grad", [False, True])
def test_operands_that_do_not_fit(change, error, message, requires_grad):
    operands = [each.detach().requires_grad_(requires_grad) for each in make()]
    for index, each in change.items():
        operands[index] = each
    with pytest.raises(error, match=message):
        feed_forward(*operands)


def test_other_bad_arguments():
    operands = make()
    with pytest.raises(ValueError, match="swish"):
        feed_forward(*operands, activation="swish")
    with pytest.raises(ValueError, match=r"between 0 and 1, but got 1\.5"):
        feed_forward(*operands, dropout_p=1.5, training=True)
    with pytest.raises(NotImplementedError, match="Long"):
        feed_forward(torch.ones(2, 64, dtype=torch.long), *operands[1:])
    with pytest.raises(RuntimeError, match="seed"):
        feed_forward(*operands, dropout_p=0.5, training=True, seed=torch.ones(2, dtype=torch.long))


@pytest.mark.parametrize("activation", ["none"])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad])
def test_no_activation_is_refused_in_every_mode(activation, mode):
    with mode(), pytest.raises(ValueError, match="feed_forward: expected an activation, but got none"):
        feed_forward(*make(), activation=activation)


@pytest.mark.parametrize("call", ["linear", "feed_forward"])
@pytest.mark.parametrize("shape", [(37, 41), (64, 300)], ids=["measured here", "and larger"])
class TestTransformedGradients:
    """What the products of a backward pass are given may be a batch of gradients, or one with a tangent."""

    def outputs(self, call: str, shape: tuple[int, int]) -> tuple[list[Tensor], Tensor, Tensor]:
        input, weight1, bias1, weight2, bias2 = make((5,), (*shape, 11), bias=True)
        if call == "linear":
            return [input, weight1, bias1], linear(input, weight1, bias1), F.linear(input, weight1, bias1)
        expected = F.linear(F.gelu(F.linear(input, weight1, bias1)), weight2, bias2)
        return [input, weight1, bias1], feed_forward(input, weight1, bias1, weight2, bias2), expected

    def test_batches(self, call, shape):
        operands, output, expected = self.outputs(call, shape)
        grads = torch.randn(3, *output.shape)
        results = [torch.autograd.grad(each, operands, grads, is_grads_batched=True) for each in (output, expected)]
        for actual, other in zip(*results):
            torch.testing.assert_close(actual, other, rtol=1e-4, atol=1e-5)

    def test_tangents(self, call, shape):
        operands, output, expected = self.outputs(call, shape)
        grad, tangent = torch.randn(2, *output.shape)
        results = []
        for each in (output, expected):
            with forward_ad.dual_level():
                dual = forward_ad.make_dual(grad, tangent)
                gradients = torch.autograd.grad(each, operands, dual)
                results.append([forward_ad.unpack_dual(gradient).tangent for gradient in gradients])
        for actual, other in zip(*results):
            torch.testing.assert_close(actual, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("wanted", "kept"),
    [((True, False, False), {"weight"}), ((False, True, False), {"input"}), ((False, False, True), set())],
)
def test_a_product_keeps_what_its_gradients_need(wanted, kept):
    operands = [each.detach().requires_grad_(grad) for each, grad in zip(make()[:3], wanted)]
    names = {each.data_ptr(): name for each, name in zip(operands, ("input", "weight", "bias"))}
    found = set()

    def keep(tensor: Tensor) -> Tensor:
        found.add(names.get(tensor.data_ptr(), "another"))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        linear(*operands)
    assert found == kept


def test_operations_are_counted_as_torchs():
    operands = make()

    def count(run) -> int:
        with FlopCounterMode(display=False) as counter:
            torch.autograd.grad(run(*operands).sum(), operands)
        return counter.get_total_flops()

    plain = count(lambda x, w1, b1, w2, b2: F.linear(F.gelu(F.linear(x, w1, b1)), w2, b2))
    assert count(feed_forward) == count(feed_forward) == plain
