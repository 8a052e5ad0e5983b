# SPDX-License-Identifier: BSD-3-Clause
"""Which of PyTorch's CUDA kernels a call of packed_attention takes and what it gives them, with the CPU in a GPU's
place (emulation.py)."""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial

import pytest
import torch
import torch.utils.checkpoint
from torch import Tensor
from torch._subclasses import FakeTensorMode

from resnorm_ext import cuda_attention
from resnorm_ext.functional import packed_attention
from resnorm_ext.modules import TransformerEncoder, TransformerEncoderLayer, encoder_paths

from .cases import HALF, KERNEL_DTYPES, LENGTHS, batch, cumulative, formula, gradient, random_like
from .emulation import emulated

FLASH, EFFICIENT = "flash", "efficient"
SEQUENCES = LENGTHS["several"]


def kernels(calls) -> set[str]:
    return {name.split("_")[1] for name in calls}


def check(
    dtype: torch.dtype, expected: set[str], lengths=SEQUENCES, architecture=(9, 0), head_dim=8, **options
) -> None:
    """Output and gradient against the formula, and that these kernels gave them."""
    qkv, cu_seqlens = batch(lengths, dtype, head_dim=head_dim)
    grad = random_like(qkv[:, 0])
    with emulated(architecture) as calls:
        output = packed_attention(qkv, cu_seqlens, **options)
        grad_qkv = gradient(lambda x: packed_attention(x, cu_seqlens, **options), qkv, grad)
    assert kernels(calls) == expected
    formula_options = {name: value for name, value in options.items() if name in ("scale", "causal")}
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    exact = qkv.double()
    for actual, reference in (
        (output, formula(qkv, lengths, **formula_options)),
        (grad_qkv, gradient(lambda x: formula(x, lengths, **formula_options), exact, grad.double())),
    ):
        torch.testing.assert_close(actual.double(), reference.detach(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("lengths", [LENGTHS["several"], LENGTHS["empty ones"], (5,)])
@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
def test_values(dtype, lengths, causal):
    check(dtype, {EFFICIENT if dtype == torch.float32 else FLASH}, lengths, causal=causal, scale=0.3)


@pytest.mark.parametrize(
    ("dtype", "architecture", "head_dim", "expected"),
    [
        (torch.bfloat16, (8, 0), 192, {FLASH}),
        (torch.bfloat16, (8, 0), 200, {EFFICIENT}),
        (torch.float16, (9, 0), 12, set()),
        (torch.float32, (9, 0), 12, {EFFICIENT}),
        (torch.float32, (9, 0), 6, set()),
        (torch.float32, (7, 5), 6, {EFFICIENT}),
        (torch.float16, (7, 5), 12, {EFFICIENT}),
        (torch.float16, (7, 5), 6, set()),
        (torch.bfloat16, (7, 5), 8, set()),
        (torch.float64, (9, 0), 8, set()),
    ],
)
def test_kernel_of_the_architecture(dtype, architecture, head_dim, expected):
    check(dtype, expected, architecture=architecture, head_dim=head_dim)


@pytest.mark.parametrize("scale", [-1.0, 0.0])
def test_scales_that_turn_the_order_of_scores(scale):
    """FlashAttention subtracts the largest score before it scales: here the least."""
    check(torch.bfloat16, set(), scale=scale)


def test_more_sequences_than_a_grid_has():
    query = torch.zeros(2, 2, 8, dtype=torch.bfloat16)
    with emulated():
        assert cuda_attention.has_kernel(query, torch.empty(65536, dtype=torch.int32), None)
        assert not cuda_attention.has_kernel(query, torch.empty(65537, dtype=torch.int32), None)


@pytest.mark.parametrize("max_seqlen", [64, 100, 1000])
@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
def test_longest_sequence_that_the_caller_knows(dtype, max_seqlen):
    check(dtype, {EFFICIENT if dtype == torch.float32 else FLASH}, max_seqlen=max_seqlen)


@pytest.mark.parametrize("lengths", [LENGTHS["none"], LENGTHS["only empty ones"]])
def test_no_tokens(lengths):
    qkv, cu_seqlens = batch(lengths, torch.bfloat16)
    with emulated() as calls:
        assert packed_attention(qkv, cu_seqlens).shape == qkv.shape[:1] + qkv.shape[2:]
    assert not calls


@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
def test_other_layouts(dtype):
    """FlashAttention reads vectors: what does not lie so is copied."""
    qkv, cu_seqlens = batch(SEQUENCES, dtype)
    expected = formula(qkv, SEQUENCES)
    shifted = torch.empty(qkv.numel() + 1, dtype=dtype)[1:].view_as(qkv).copy_(qkv)
    wide = torch.zeros(*qkv.shape[:-1], qkv.size(-1) + 1, dtype=dtype)[..., :-1].copy_(qkv)
    reversed_dims = qkv.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)
    with emulated():
        for layout in (shifted, wide) + (() if dtype == torch.float32 else (reversed_dims,)):
            output = packed_attention(layout, cu_seqlens)
            torch.testing.assert_close(output.double(), expected, rtol=2e-2, atol=2e-2)


def test_one_token_that_lies_anywhere():
    """Contiguous, but not where vectors begin."""
    qkv, cu_seqlens = batch((1,), torch.bfloat16)
    shifted = torch.empty(qkv.numel() + 1, dtype=qkv.dtype)[1:].view_as(qkv).copy_(qkv)
    bounds = torch.stack((cu_seqlens, cu_seqlens), 1)[:, 0]
    with emulated() as calls:
        torch.testing.assert_close(packed_attention(shifted, bounds), qkv[:, 2])
    assert kernels(calls) == {FLASH}


@pytest.mark.parametrize("dtype", HALF)
def test_dropout_is_the_kernels_own(dtype):
    """The output is linear in the values, so their gradient says whether the backward pass dropped the same weights;
    and over many calls nothing is lost."""
    qkv, cu_seqlens = batch((40, 24), dtype)
    options = {"dropout_p": 0.3, "training": True}
    with emulated() as calls:
        leaf = qkv.detach().requires_grad_()
        output = packed_attention(leaf, cu_seqlens, **options)
        grad = random_like(output)
        (grad_qkv,) = torch.autograd.grad(output, leaf, grad)
        mean = torch.stack([packed_attention(qkv, cu_seqlens, **options).double() for _ in range(400)]).mean(0)
        still = packed_attention(qkv, cu_seqlens, dropout_p=0.3)
    assert kernels(calls) == {FLASH}
    torch.testing.assert_close(still.double(), formula(qkv, (40, 24)), rtol=2e-2, atol=2e-2)
    by_output = float((grad.double() * output.double()).sum())
    by_gradient = float((grad_qkv[:, 2].double() * qkv[:, 2].double()).sum())
    assert by_gradient == pytest.approx(by_output, rel=1e-2, abs=1e-1)
    torch.testing.assert_close(mean, formula(qkv, (40, 24)), rtol=0.0, atol=0.1)


@pytest.mark.parametrize(("dtype", "dropout_p"), [(torch.float32, 0.3), (torch.float32, 1.0), (torch.bfloat16, 1.0)])
def test_dropout_that_no_kernel_computes(dtype, dropout_p):
    qkv, cu_seqlens = batch(SEQUENCES, dtype)
    with emulated() as calls:
        leaf = qkv.detach().requires_grad_()
        output = packed_attention(leaf, cu_seqlens, dropout_p=dropout_p, training=True)
        (grad,) = torch.autograd.grad(output.sum(), leaf)
    assert not calls and grad.isfinite().all()
    assert bool(output.any()) == (dropout_p < 1.0)


@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
def test_a_seed_rules_the_mask(dtype):
    """The same on every device, which these kernels' own random numbers could not give."""
    qkv, cu_seqlens = batch(SEQUENCES, dtype)
    options = {"dropout_p": 0.3, "training": True, "seed": torch.tensor(5)}
    with emulated() as calls:
        output = packed_attention(qkv, cu_seqlens, **options)
    assert not calls
    assert torch.equal(output, packed_attention(qkv, cu_seqlens, **options))


def test_checkpointed_pass_drops_the_same():
    qkv, cu_seqlens = batch(SEQUENCES, torch.bfloat16)
    grad = random_like(qkv[:, 0])

    def attend(x: Tensor) -> Tensor:
        return packed_attention(x, cu_seqlens, dropout_p=0.5, training=True)

    gradients = []
    with emulated():
        for function in (attend, lambda x: torch.utils.checkpoint.checkpoint(attend, x, use_reentrant=False)):
            torch.manual_seed(3)
            gradients.append(gradient(function, qkv, grad))
    assert torch.equal(*gradients)


def test_deterministic_algorithms():
    """Memory-efficient attention adds gradients up in any order."""
    torch.use_deterministic_algorithms(True)
    try:
        check(torch.float32, set())
        check(torch.float16, {FLASH})
        check(torch.float16, set(), head_dim=12)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(("architecture", "expected"), [((9, 0), {FLASH}), ((7, 5), set())])
def test_autocast(architecture, expected):
    """What counts is the dtype that autocast gives, not what comes."""
    qkv, cu_seqlens = batch(SEQUENCES)
    with emulated(architecture) as calls, torch.autocast("cpu", torch.bfloat16):
        output = packed_attention(qkv, cu_seqlens)
    assert output.dtype == torch.bfloat16 and kernels(calls) == expected


@pytest.mark.parametrize("transform", ["vmap", "jvp", "twice"])
def test_what_the_kernels_cannot(transform):
    qkv, cu_seqlens = batch((4, 3), torch.float32)
    with emulated() as calls:
        if transform == "vmap":
            torch.func.vmap(lambda x: packed_attention(x, cu_seqlens))(qkv.expand(2, -1, -1, -1, -1))
        elif transform == "jvp":
            torch.func.jvp(lambda x: packed_attention(x, cu_seqlens), (qkv,), (qkv,))
        else:
            leaf = qkv.requires_grad_()
            (once,) = torch.autograd.grad(packed_attention(leaf, cu_seqlens).sum(), leaf, create_graph=True)
            with pytest.raises(RuntimeError, match="derivative for aten::_efficient_attention_backward"):
                torch.autograd.grad(once.sum(), leaf)
    assert kernels(calls) == ({EFFICIENT} if transform == "twice" else set())


@pytest.mark.parametrize(
    ("bounds", "max_seqlen", "error", "message"),
    [
        ([0, 5, 6], None, ValueError, "from 0 to the number of tokens, 7"),
        ([0, 9, 7], None, ValueError, "to ascend"),
        ([0, 3, 7], 3, ValueError, "no sequence longer than max_seqlen, 3"),
        ([[0, 7]], None, RuntimeError, "cu_seqlens of shape"),
        ([0.0, 7.0], None, RuntimeError, "cu_seqlens of dtype"),
    ],
)
def test_bounds_are_checked_before_a_kernel_reads_by_them(bounds, max_seqlen, error, message):
    qkv, _ = batch((7,), torch.bfloat16)
    bounds = torch.tensor(bounds)
    cu_seqlens = bounds if bounds.is_floating_point() else bounds.int()
    with emulated() as calls, pytest.raises(error, match=message):
        packed_attention(qkv, cu_seqlens, max_seqlen=max_seqlen)
    assert not calls


@pytest.mark.parametrize("shape", [(7, 2, 2, 8), (7, 3, 8)])
def test_other_shapes_are_the_operators_to_refuse(shape):
    with emulated(), pytest.raises(RuntimeError, match="qkv of shape"):
        packed_attention(torch.zeros(shape, dtype=torch.bfloat16), cumulative((7,)))


@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
def test_compiled_step(dtype):
    """One graph for batches of other lengths, backward pass included."""

    @torch.compile(backend="aot_eager", fullgraph=True, dynamic=True)
    def attend(x: Tensor, cu_seqlens: Tensor) -> Tensor:
        return packed_attention(x, cu_seqlens, max_seqlen=64, causal=True)

    with emulated() as calls:
        for lengths in (SEQUENCES, (30, 7, 9)):
            qkv, cu_seqlens = batch(lengths, dtype)
            grad = random_like(qkv[:, 0])
            actual = gradient(partial(attend, cu_seqlens=cu_seqlens), qkv, grad)
            expected = gradient(partial(formula, lengths=lengths, causal=True), qkv, grad)
            torch.testing.assert_close(actual.double(), expected.double(), rtol=2e-2, atol=2e-2)
    assert len(kernels(calls)) == 1


@pytest.mark.parametrize("is_gpu", [False, True])
def test_compiled_for_as_many_tokens_as_a_mask_leaves(is_gpu):
    qkv, cu_seqlens = batch((4, 3), torch.bfloat16)
    keep = torch.ones(7, dtype=torch.bool)

    def attend(x: Tensor) -> Tensor:
        return packed_attention(x[keep], cu_seqlens, max_seqlen=4)

    expected = attend(qkv)
    with emulated() if is_gpu else nullcontext():
        output = torch.compile(attend, backend="aot_eager", fullgraph=True)(qkv)
    torch.testing.assert_close(output, expected, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("dtype", HALF)
def test_compiled_slice_that_begins_between_vectors(dtype):
    wide = torch.randn(7, 56).to(dtype)
    cu_seqlens = cumulative((4, 3))

    def attend(x: Tensor) -> Tensor:
        return packed_attention(x[:, 4:52].unflatten(1, (3, 2, 8)), cu_seqlens, max_seqlen=4)

    expected = attend(wide)
    with emulated() as calls:
        output = torch.compile(attend, backend="aot_eager", fullgraph=True)(wide)
    assert kernels(calls) == {FLASH}
    torch.testing.assert_close(output, expected, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
def test_on_a_made_up_gpu(monkeypatch, dtype):
    """The operators take what they are given where tensors say that they are on a GPU, and have no values."""
    monkeypatch.setattr(cuda_attention, "_architecture", lambda device: (9, 0) if device.type == "cuda" else None)
    with FakeTensorMode():
        qkv = torch.empty(20, 3, 4, 64, dtype=dtype, device="cuda:0")
        for device in ("cpu", "cuda:0"):
            output = packed_attention(qkv, torch.empty(4, dtype=torch.int32, device=device), max_seqlen=9)
            assert (output.shape, output.dtype, output.device) == ((20, 4, 64), dtype, qkv.device)


@pytest.mark.parametrize("dtype", HALF)
def test_layers_read_the_bounds_once(dtype, monkeypatch):
    """Each time would wait for the GPU."""
    read, given = [], []
    check, attend = encoder_paths.check_sequences, cuda_attention.attend
    monkeypatch.setattr(encoder_paths, "check_sequences", lambda *args: read.append(args) or check(*args))
    monkeypatch.setattr(cuda_attention, "attend", lambda *args, **kw: given.append(args[4]) or attend(*args, **kw))
    layer = TransformerEncoderLayer(16, 2, 32, batch_first=True, dtype=dtype)
    encoder = TransformerEncoder(layer, 3, enable_nested_tensor=False)
    tokens = torch.randn(sum(SEQUENCES), 16).to(dtype)
    with emulated() as calls:
        encoder(tokens, cu_seqlens=cumulative(SEQUENCES)).sum().backward()
    assert calls == {"_flash_attention_forward": 3, "_flash_attention_backward": 3}
    assert len(read) == 1 and given == 3 * [max(SEQUENCES)]
