# SPDX-License-Identifier: BSD-3-Clause
"""The backward pass: the formula's gradients, as accurate as torch's own."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F

from resnorm_ext import functional, reference

from .cases import (
    HALF,
    HEAD_DIM,
    HEADS,
    KERNEL_DTYPES,
    LENGTHS,
    batch,
    by_sequence,
    cumulative,
    formula,
    gradient,
    random_like,
    sdpa,
)

SEED = torch.tensor(0x1234_5678_9ABC_DEF0)
DROPOUT = {"no dropout": {}, "dropout": {"dropout_p": 0.3, "seed": SEED}}
NAMES = ("query", "key", "value")


@pytest.mark.parametrize("options", DROPOUT.values(), ids=DROPOUT)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("lengths", [(3, 0, 4), (0,)])
def test_first_and_second_derivatives(lengths, causal, options):
    qkv, cu_seqlens = batch(lengths, torch.float64, head_dim=2)
    qkv.requires_grad_()

    def call(qkv):
        return functional.packed_attention(qkv, cu_seqlens, scale=0.4, causal=causal, training=True, **options)

    assert torch.autograd.gradcheck(call, qkv)
    assert torch.autograd.gradgradcheck(call, qkv)


@pytest.mark.parametrize("options", DROPOUT.values(), ids=DROPOUT)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_against_the_formula(lengths, dtype, scale, causal, options):
    qkv, cu_seqlens = batch(lengths, dtype)
    grad = random_like(qkv[:, 0])
    actual = gradient(
        partial(
            functional.packed_attention, cu_seqlens=cu_seqlens, scale=scale, causal=causal, training=True, **options
        ),
        qkv,
        grad,
    )
    expected = gradient(
        partial(reference.packed_attention, cu_seqlens=cu_seqlens, scale=scale, causal=causal, **options),
        qkv.double(),
        grad,
    )
    assert actual.dtype == dtype and actual.shape == qkv.shape
    tolerance = 1e-5 if dtype == torch.float32 else 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(actual.double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("heads, head_dim", [(1, 1), (3, 5), (4, 64), (1, 200)])
def test_dimensions(heads, head_dim, dtype):
    lengths = (9, 30, 600)
    qkv, cu_seqlens = batch(lengths, dtype, heads=heads, head_dim=head_dim)
    grad = random_like(qkv[:, 0])
    actual = gradient(partial(functional.packed_attention, cu_seqlens=cu_seqlens), qkv, grad)
    expected = gradient(partial(formula, lengths=lengths), qkv.double(), grad)
    tolerance = 1e-5 if dtype == torch.float32 else 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(actual.double(), expected, rtol=tolerance, atol=tolerance * expected.abs().max().item())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_strides(dtype):
    lengths = (4, 6)
    qkv, cu_seqlens = batch(lengths, dtype)
    attend = partial(functional.packed_attention, cu_seqlens=cu_seqlens, **DROPOUT["dropout"], training=True)
    grad = random_like(qkv[:, 0])
    expected = gradient(attend, qkv, grad)
    layouts = {
        "contiguous": torch.empty_like(qkv),
        "head_dim apart": torch.empty(3, 10, HEAD_DIM, HEADS, dtype=dtype).permute(1, 0, 3, 2),
        "heads outside of q, k and v": torch.empty(10, HEADS, 3, HEAD_DIM, dtype=dtype).transpose(1, 2),
        "wider rows": torch.empty(10, 3, HEADS + 1, HEAD_DIM + 3, dtype=dtype)[:, :, 1:, 2:-1],
    }
    grads = {
        "contiguous": torch.empty_like(grad),
        "heads first": torch.empty(HEADS, 10, HEAD_DIM, dtype=dtype).transpose(0, 1),
        "head_dim apart": torch.empty(HEAD_DIM, HEADS, 10, dtype=dtype).permute(2, 1, 0),
    }
    for name, strided in layouts.items():
        for grad_name, strided_grad in grads.items():
            strided.copy_(qkv), strided_grad.copy_(grad)
            assert torch.equal(gradient(attend, strided, strided_grad), expected), (name, grad_name)
            assert torch.equal(strided, qkv) and torch.equal(strided_grad, grad)
    ones = torch.ones(1, dtype=dtype).expand_as(grad)
    assert torch.equal(gradient(attend, qkv, ones), gradient(attend, qkv, ones.contiguous()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [0.0, -0.7])
def test_scales_that_nobody_expects(scale, dtype):
    lengths = (5, 20)
    qkv, cu_seqlens = batch(lengths, dtype)
    grad = random_like(qkv[:, 0])
    actual = gradient(partial(functional.packed_attention, cu_seqlens=cu_seqlens, scale=scale), qkv, grad)
    expected = gradient(partial(formula, lengths=lengths, scale=scale), qkv.double(), grad)
    tolerance = 1e-5 if dtype == torch.float32 else 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(actual.double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
@pytest.mark.parametrize(("lengths", "heads"), [((*range(2, 34), 63, 64, 65), 8), ((127, 128, 129, 511, 513, 1000), 1)])
def test_as_accurate_as_torch(lengths, heads, dtype, causal):
    """Against float64, of query, key and value apart: root mean square over 10 inputs at each length at most 1.25
    times, none farther than 3. Not of a token alone, where those of query and key are 0."""
    mean = torch.zeros(2, 3, len(lengths), dtype=torch.float64)
    largest = torch.zeros_like(mean)
    ours = partial(functional.packed_attention, cu_seqlens=cumulative(lengths), causal=causal)
    torchs = partial(sdpa, lengths=lengths, causal=causal)
    for seed in range(10):
        generator = torch.Generator().manual_seed(seed)
        qkv = torch.randn(sum(lengths), 3, heads, 32, generator=generator).to(dtype)
        grad = random_like(qkv[:, 0], seed + 100)
        exact = gradient(partial(formula, lengths=lengths, causal=causal), qkv.double(), grad)
        for i, attention in enumerate((ours, torchs)):
            errors = gradient(attention, qkv, grad).double() - exact
            for j, error in enumerate(errors.split(list(lengths))):
                mean[i, :, j] += error.square().mean((0, 2, 3)).sqrt() / 10
                largest[i, :, j] = torch.maximum(largest[i, :, j], error.abs().amax((0, 2, 3)))
    for part, name in enumerate(NAMES):
        of_mean, of_largest = ((values[0] / values[1])[part] for values in (mean, largest))
        assert (of_mean <= 1.25).all(), (name, dict(zip(lengths, of_mean.tolist())))
        assert (of_largest <= 3).all(), (name, dict(zip(lengths, of_largest.tolist())))


@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
@pytest.mark.parametrize("length", [40, 300])
def test_scores_near_80(length, dtype):
    """The logarithm of the sum, which the forward pass keeps, is as large: over 20 inputs at most 1.5 times as far from
    float64 as torch."""

    def torchs(qkv):
        return by_sequence(lambda parts: F.scaled_dot_product_attention(*parts, scale=1.0), qkv, [length])

    ours = partial(functional.packed_attention, cu_seqlens=cumulative([length]), scale=1.0)
    errors = torch.zeros(2, 3, dtype=torch.float64)
    for seed in range(20):
        qkv = random_like(torch.empty(length, 3, HEADS, HEAD_DIM, dtype=dtype), seed)
        qkv[:, 0, :, 0] = 8 * torch.linspace(-1, 1, length).sign().unsqueeze(-1)
        qkv[:, 1, :, 0] = torch.linspace(-10, 10, length).unsqueeze(-1)
        grad = random_like(qkv[:, 0], seed + 100)
        exact = gradient(partial(formula, lengths=[length], scale=1.0), qkv.double(), grad)
        for i, attention in enumerate((ours, torchs)):
            error = gradient(attention, qkv, grad).double() - exact
            errors[i] += (error.square().sum((0, 2, 3)) / exact.square().sum((0, 2, 3))).sqrt() / 20
    assert (errors[0] <= 1.5 * errors[1]).all(), (errors[0] / errors[1]).tolist()


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
def test_threads_change_nothing(dtype, causal, numbers_of_threads):
    qkv, cu_seqlens = batch((300, 1, 0, 70, 33, 129), dtype, heads=3, head_dim=64)
    attend = partial(
        functional.packed_attention, cu_seqlens=cu_seqlens, causal=causal, training=True, **DROPOUT["dropout"]
    )
    gradients = []
    for count in numbers_of_threads:
        torch.set_num_threads(count)
        gradients.append(gradient(attend, qkv, random_like(qkv[:, 0])))
    assert all(torch.equal(gradients[0], other) for other in gradients[1:])


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", [*KERNEL_DTYPES, torch.float64])
def test_sequences_do_not_see_each_other(dtype, value):
    qkv, cu_seqlens = batch((5, 6, 7), dtype)
    attend, grad = partial(functional.packed_attention, cu_seqlens=cu_seqlens), random_like(qkv[:, 0])
    before = gradient(attend, qkv, grad)
    others = [slice(0, 5), slice(11, 18)]
    bad_grad, bad_qkv = grad.clone(), qkv.clone()
    bad_grad[5:11], bad_qkv[5:11] = value, value
    for after in (gradient(attend, qkv, bad_grad), gradient(attend, bad_qkv, grad)):
        assert all(torch.equal(before[tokens], after[tokens]) for tokens in others)
        assert after[5:11, 0].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("options", DROPOUT.values(), ids=DROPOUT)
def test_gradients_of_gradients(options, dtype):
    """As a gradient penalty takes them: of the kernels' first gradients in float32."""
    lengths = (3, 0, 20)
    qkv, cu_seqlens = batch(lengths, dtype)
    grad = random_like(qkv[:, 0])

    def penalty_gradient(attention, qkv):
        leaf = qkv.detach().requires_grad_()
        (first,) = torch.autograd.grad(attention(leaf, cu_seqlens), leaf, grad.to(qkv.dtype), create_graph=True)
        assert first.requires_grad
        return torch.autograd.grad(first.square().sum(), leaf)[0]

    actual = penalty_gradient(partial(functional.packed_attention, causal=True, training=True, **options), qkv)
    expected = penalty_gradient(partial(reference.packed_attention, causal=True, **options), qkv.double())
    torch.testing.assert_close(actual, expected.to(dtype), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
def test_several_gradients_of_one_forward_pass(dtype):
    qkv, cu_seqlens = batch((3, 20), dtype)
    leaf = qkv.requires_grad_()
    output = functional.packed_attention(leaf, cu_seqlens, training=True, **DROPOUT["dropout"])
    grads = torch.stack([random_like(output, seed) for seed in range(3)])
    each = [torch.autograd.grad(output, leaf, grad, retain_graph=True)[0] for grad in grads]
    assert torch.equal(each[0], torch.autograd.grad(output, leaf, grads[0], retain_graph=True)[0])
    at_once = torch.autograd.grad(output, leaf, grads, is_grads_batched=True)[0]
    tolerance = 1e-5 if dtype == torch.float32 else 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(at_once, torch.stack(each), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("options", DROPOUT.values(), ids=DROPOUT)
@pytest.mark.parametrize("dtype", [*KERNEL_DTYPES, torch.float64])
def test_the_same_output_with_and_without_gradients(dtype, options):
    qkv, cu_seqlens = batch((3, 600), dtype)
    attend = partial(functional.packed_attention, cu_seqlens=cu_seqlens, training=True, **options)
    with torch.no_grad():
        expected = attend(qkv.requires_grad_())
    output = attend(qkv)
    assert output.requires_grad and not expected.requires_grad
    assert torch.equal(output, expected) if dtype != torch.float64 else torch.allclose(output, expected, 1e-13, 1e-13)


def test_no_gradient_to_compute():
    qkv, cu_seqlens = batch((3, 4))
    assert not functional.packed_attention(qkv, cu_seqlens, training=True, **DROPOUT["dropout"]).requires_grad
    output = functional.packed_attention(qkv.requires_grad_(), cu_seqlens)
    with torch.no_grad():
        qkv.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()
