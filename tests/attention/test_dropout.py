# SPDX-License-Identifier: BSD-3-Clause
"""Dropout of the attention weights: the mask is a pure function of the seed and of which weight it is."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from resnorm_ext import reference
from resnorm_ext.functional import packed_attention

from .cases import KERNEL_DTYPES, batch, cumulative, gradient, random_like

LENGTHS, HEADS = (70, 3, 0, 1, 100), 3
TOKENS = sum(LENGTHS)
DTYPES = [*KERNEL_DTYPES, torch.float64]
SEEDS = [0, 1, -1, 2**63 - 1, -(2**63), 2**32, 0x1234_5678_9ABC_DEF0]


def equal_weights(dtype: torch.dtype = torch.float32, lengths=LENGTHS, heads: int = HEADS) -> tuple[Tensor, Tensor]:
    """A batch of equal weights, and values that are unit vectors: element d of an output is the weight of key d."""
    qkv = torch.zeros(sum(lengths), 3, heads, max(lengths), dtype=dtype)
    qkv[:, 2] = torch.cat([torch.eye(max(lengths), dtype=dtype)[:length] for length in lengths]).unsqueeze(1)
    return qkv, cumulative(lengths)


def kept_weights(p: float, seed: Tensor, causal: bool = False, lengths=LENGTHS, heads: int = HEADS) -> Tensor:
    """``(tokens, heads, keys)``: whether a weight is there and kept, by the contract, one after the other."""
    kept = torch.zeros(sum(lengths), heads, max(lengths), dtype=torch.bool)
    for begin, length in zip(cumulative(lengths).tolist(), lengths):
        row = torch.arange(begin, begin + length).unsqueeze(1) * heads + torch.arange(heads)
        key = torch.arange(length)
        draws = reference.philox_draws((row.unsqueeze(-1) << 32) + key // 8, seed)[..., key, key % 8]
        visible = key.view(-1, 1, 1) >= key if causal else torch.tensor(True)
        kept[begin : begin + length, :, :length] = (draws >= reference.dropout_threshold(p)) & visible
    return kept


@pytest.mark.parametrize("p", [1e-3, 0.1, 0.5, 0.9])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_mask_is_the_contracts_forward_and_backward(dtype, causal, p):
    qkv, cu_seqlens = equal_weights(dtype)
    qkv.requires_grad_()
    for seed in map(torch.tensor, SEEDS):
        expected = kept_weights(p, seed, causal)
        output = packed_attention(qkv, cu_seqlens, causal=causal, dropout_p=p, training=True, seed=seed)
        assert torch.equal(output != 0, expected)
        # The gradient of a key's value for unit vectors as the outputs' gradients: who gave it a weight.
        grad = torch.autograd.grad(output, qkv, qkv[:, 2].detach())[0][:, 2]
        by_key = torch.zeros_like(expected)
        for begin, length in zip(cu_seqlens.tolist(), LENGTHS):
            rows = slice(begin, begin + length)
            by_key[rows, :, :length] = expected[rows, :, :length].permute(2, 1, 0)
        assert torch.equal(grad != 0, by_key)


def test_a_mask_beyond_one_block_of_keys():
    qkv, cu_seqlens = equal_weights(lengths=(1100, 5), heads=1)
    seed = torch.tensor(77)
    output = packed_attention(qkv, cu_seqlens, dropout_p=0.5, training=True, seed=seed)
    assert torch.equal(output != 0, kept_weights(0.5, seed, lengths=(1100, 5), heads=1))


def test_masks_of_tokens_do_not_depend_on_their_sequence():
    """Where tokens are counted in the whole batch, keys from the start of each sequence."""
    options = {"dropout_p": 0.5, "training": True, "seed": torch.tensor(3)}
    together, apart = (
        packed_attention(*equal_weights(lengths=lengths), **options) != 0 for lengths in ((12, 8), (12, 3, 5))
    )
    assert torch.equal(together[:12], apart[:12])
    assert torch.equal(together[12:15, :, :3], apart[12:15, :, :3])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_threads_change_nothing(dtype, numbers_of_threads):
    qkv, cu_seqlens = batch((700, 1, 300), dtype)
    attend = partial(packed_attention, cu_seqlens=cu_seqlens, dropout_p=0.2, training=True, seed=torch.tensor(5))
    results = []
    for count in numbers_of_threads:
        torch.set_num_threads(count)
        results.append((attend(qkv), gradient(attend, qkv, random_like(qkv[:, 0]))))
    for output, grad in results[1:]:
        assert torch.equal(output, results[0][0]) and torch.equal(grad, results[0][1])


def test_seed_is_drawn_anew_and_reproducible():
    qkv, cu_seqlens = batch((9, 30))

    def draws() -> list[Tensor]:
        torch.manual_seed(3)
        return [packed_attention(qkv, cu_seqlens, dropout_p=0.5, training=True) for _ in range(3)]

    first, second = draws(), draws()
    assert all(torch.equal(a, b) for a, b in zip(first, second))
    assert not torch.equal(first[0], first[1]) and not torch.equal(first[1], first[2])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("requires_grad", [False, True])
def test_no_dropout_draws_nothing_and_changes_nothing(requires_grad, dtype):
    """Also where a probability is less than what 16 bits tell from none."""
    qkv, cu_seqlens = batch((9, 30), dtype)
    qkv.requires_grad_(requires_grad)
    expected, state = packed_attention(qkv, cu_seqlens, causal=True), torch.get_rng_state()
    for options in ({"dropout_p": 0.5}, {"dropout_p": 0.0, "training": True}):
        assert torch.equal(packed_attention(qkv, cu_seqlens, causal=True, **options), expected)
    assert torch.equal(torch.get_rng_state(), state)
    for seed in (None, torch.tensor(1)):
        output = packed_attention(qkv, cu_seqlens, causal=True, dropout_p=1e-6, training=True, seed=seed)
        assert torch.equal(output, expected)
        if requires_grad:
            grads = [torch.autograd.grad(o.sum(), qkv, retain_graph=True)[0] for o in (output, expected)]
            assert torch.equal(*grads)


@pytest.mark.parametrize("dtype", DTYPES)
def test_dropout_of_everything(dtype):
    qkv, cu_seqlens = batch((9, 0, 30), dtype)
    attend = partial(packed_attention, cu_seqlens=cu_seqlens, dropout_p=1.0, training=True)
    assert torch.equal(attend(qkv), torch.zeros_like(qkv[:, 0]))
    assert torch.equal(gradient(attend, qkv, random_like(qkv[:, 0])), torch.zeros_like(qkv))


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("seed", [None, torch.tensor(11)])
def test_recomputed_activations_drop_the_same(seed, dtype, use_reentrant):
    qkv, cu_seqlens = batch((9, 30), dtype)
    attend = partial(packed_attention, cu_seqlens=cu_seqlens, dropout_p=0.5, training=True, seed=seed)
    gradients = []
    for call in (attend, lambda qkv: checkpoint(attend, qkv, use_reentrant=use_reentrant)):
        torch.manual_seed(5)
        leaf = qkv.clone().requires_grad_()
        call(leaf).square().sum().backward()
        gradients.append(leaf.grad)
    assert torch.equal(*gradients)


def test_the_backward_keeps_its_seed_when_the_callers_tensor_changes():
    """As any saved tensor: a change in place is an error, never another mask."""
    qkv, cu_seqlens = batch((9, 30))
    seed = torch.tensor(1)
    output = packed_attention(qkv.requires_grad_(), cu_seqlens, dropout_p=0.5, training=True, seed=seed)
    seed.fill_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_statistics(p):
    """Rate and expectation over many seeds, and no correlation of neighbouring keys, heads, tokens or seeds."""
    seeds, length, heads = 16, 200, 4
    qkv, cu_seqlens = equal_weights(lengths=(length,), heads=heads)
    weights = torch.stack(
        [packed_attention(qkv, cu_seqlens, dropout_p=p, training=True, seed=torch.tensor(s)) for s in range(seeds)]
    )
    kept = (weights != 0).double()
    count = kept.numel()
    assert abs(kept.mean() - (1 - p)) < 5 * (p * (1 - p) / count) ** 0.5
    masks = weights.double() * length
    deviation = (p / (1 - p)) ** 0.5
    assert abs(masks.mean() - 1) < 5 * deviation / count**0.5
    noise = (masks - 1) / deviation
    for dim in range(noise.dim()):
        ahead, behind = noise.narrow(dim, 1, noise.size(dim) - 1), noise.narrow(dim, 0, noise.size(dim) - 1)
        assert (ahead * behind).mean().abs() < 5 / ahead.numel() ** 0.5, dim


def test_the_expectation_is_attention_without_dropout():
    count, (qkv, cu_seqlens) = 1000, batch((3, 20))
    outputs = torch.stack(
        [packed_attention(qkv, cu_seqlens, dropout_p=0.3, training=True, seed=torch.tensor(s)) for s in range(count)]
    ).double()
    error = outputs.mean(0) - packed_attention(qkv, cu_seqlens)
    assert (error.abs() < 6 * outputs.std(0) / count**0.5).all()


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("p", [-0.1, 1.1, float("nan")])
def test_a_bad_probability(p, training):
    qkv, cu_seqlens = batch((4,))
    with pytest.raises(ValueError, match="dropout probability has to be between 0 and 1, but got"):
        packed_attention(qkv, cu_seqlens, dropout_p=p, training=training)
    with pytest.raises(ValueError, match="dropout probability has to be between 0 and 1, but got"):
        torch.ops.resnorm.packed_attention(qkv, cu_seqlens, None, None, False, p, torch.tensor(0))


@pytest.mark.parametrize(
    ("seed", "message"),
    [
        (torch.tensor(1, dtype=torch.int32), "int64 scalar tensor, but got Int"),
        (torch.tensor(1.0), "int64 scalar tensor, but got Float"),
        (torch.tensor([1]), r"int64 scalar tensor, but got Long of shape \[1\]"),
        (torch.tensor(1, device="meta"), "seed.*meta|meta.*seed"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("requires_grad", [False, True])
def test_a_bad_seed(seed, message, requires_grad, dtype):
    qkv, cu_seqlens = batch((4,), dtype)
    with pytest.raises(RuntimeError, match=message):
        packed_attention(qkv.requires_grad_(requires_grad), cu_seqlens, dropout_p=0.5, training=True, seed=seed)


def test_an_operator_needs_a_seed_to_drop():
    qkv, cu_seqlens = batch((4,))
    with pytest.raises(RuntimeError, match=r"Expected a seed for dropout_p = 0\.5, but got None"):
        torch.ops.resnorm.packed_attention(qkv, cu_seqlens, None, None, False, 0.5, None)
