# SPDX-License-Identifier: BSD-3-Clause
from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from resnorm_ext import functional
from resnorm_ext._extension import ensure_loaded

LENGTHS = {
    "one": (7,),
    "several": (3, 1, 64, 17),
    "empty ones": (0, 5, 0, 0, 9, 0),
    "only empty ones": (0, 0),
    "none": (),
}
HEADS, HEAD_DIM = 2, 8


@pytest.fixture(scope="module", autouse=True)
def operators():
    ensure_loaded()


def batch(lengths, dtype=torch.float32, **shape) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    heads, head_dim = shape.get("heads", HEADS), shape.get("head_dim", HEAD_DIM)
    qkv = torch.randn(sum(lengths), 3, heads, head_dim, generator=generator, dtype=torch.float64).to(dtype)
    return qkv, cumulative(lengths)


def cumulative(lengths) -> torch.Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def reference(qkv, lengths, scale=None, causal=False) -> torch.Tensor:
    """Sequence by sequence, in float64."""
    outputs = []
    for sequence in qkv.double().split(list(lengths)):
        query, key, value = sequence.permute(1, 2, 0, 3)
        scores = query @ key.mT * (qkv.size(-1) ** -0.5 if scale is None else scale)
        if causal:
            scores = scores.masked_fill(torch.ones_like(scores).triu(1).bool(), -torch.inf)
        outputs.append((scores.softmax(-1) @ value).transpose(0, 1))
    return torch.cat(outputs) if outputs else qkv.new_empty(0, *qkv.shape[2:], dtype=torch.float64)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_forward(lengths, scale, causal):
    qkv, cu_seqlens = batch(lengths)
    output = functional.packed_attention(qkv, cu_seqlens, scale=scale, causal=causal)
    assert output.shape == (sum(lengths), HEADS, HEAD_DIM) and output.is_contiguous()
    torch.testing.assert_close(output.double(), reference(qkv, lengths, scale, causal), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("heads, head_dim", [(1, 1), (3, 5), (4, 64)])
def test_dtypes_and_dimensions(dtype, heads, head_dim):
    lengths = (9, 30)
    qkv, cu_seqlens = batch(lengths, dtype, heads=heads, head_dim=head_dim)
    output = functional.packed_attention(qkv, cu_seqlens)
    assert output.dtype == dtype
    tolerance = 1e-12 if dtype == torch.float64 else 2 * torch.finfo(dtype).eps
    torch.testing.assert_close(output.double(), reference(qkv, lengths), rtol=tolerance, atol=tolerance)


def test_strides_and_inputs_unchanged():
    lengths = (4, 6)
    qkv, cu_seqlens = batch(lengths)
    strided = torch.empty(3, 10, HEAD_DIM, HEADS).permute(1, 0, 3, 2).copy_(qkv)
    assert not strided.is_contiguous()
    output = functional.packed_attention(strided, cu_seqlens)
    torch.testing.assert_close(output.double(), reference(qkv, lengths), rtol=1e-5, atol=1e-5)
    assert torch.equal(strided, qkv) and torch.equal(cu_seqlens, cumulative(lengths))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_more_sequences_than_threads(mode):
    """They are shared out among threads, whose number changes nothing."""
    lengths = (3, 0, 40, 1, 17, 8, 8, 25, 2, 64, 5)
    outputs, threads = [], torch.get_num_threads()
    with mode():
        qkv, cu_seqlens = batch(lengths)
        for count in (1, 2, 4):
            torch.set_num_threads(count)
            outputs.append(functional.packed_attention(qkv, cu_seqlens))
        torch.set_num_threads(threads)
    torch.testing.assert_close(outputs[0].double(), reference(qkv, lengths), rtol=1e-5, atol=1e-5)
    assert torch.equal(outputs[0], outputs[1]) and torch.equal(outputs[0], outputs[2])


def test_sequences_do_not_see_each_other():
    qkv, cu_seqlens = batch((5, 6, 7))
    before = functional.packed_attention(qkv, cu_seqlens)
    qkv[5:11] = torch.nan
    after = functional.packed_attention(qkv, cu_seqlens)
    assert torch.equal(before[:5], after[:5]) and torch.equal(before[11:], after[11:])
    assert after[5:11].isnan().all()


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("lengths", [(3, 0, 5), (0,)])
def test_gradients(lengths, causal):
    qkv, cu_seqlens = batch(lengths, torch.float64)
    qkv.requires_grad_()

    def call(qkv):
        return functional.packed_attention(qkv, cu_seqlens, scale=0.4, causal=causal)

    assert torch.autograd.gradcheck(call, qkv)
    assert torch.autograd.gradgradcheck(call, qkv)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_in_half_precision(dtype):
    """Not less accurate than torch's own attention."""
    lengths = (20, 33)
    qkv, cu_seqlens = batch(lengths, dtype)
    grad = torch.randn(sum(lengths), HEADS, HEAD_DIM).to(dtype)

    def gradient(attention, qkv):
        qkv = qkv.detach().requires_grad_()
        return torch.autograd.grad(attention(qkv), qkv, grad.to(qkv.dtype))[0].double()

    def sdpa(qkv):
        parts = [F.scaled_dot_product_attention(*s.permute(1, 2, 0, 3)) for s in qkv.split(list(lengths))]
        return torch.cat([part.transpose(0, 1) for part in parts])

    exact = gradient(sdpa, qkv.double())
    ours = gradient(lambda qkv: functional.packed_attention(qkv, cu_seqlens), qkv)
    assert (ours - exact).norm() <= 1.05 * (gradient(sdpa, qkv) - exact).norm()


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("max_seqlen", [None, 9])
def test_opcheck(requires_grad, max_seqlen):
    qkv, cu_seqlens = batch((3, 0, 9))
    qkv.requires_grad_(requires_grad)
    arguments = (qkv, cu_seqlens, max_seqlen, 0.5, True)
    torch.library.opcheck(torch.ops.resnorm.packed_attention.default, arguments)
    grad = torch.randn(12, HEADS, HEAD_DIM)
    torch.library.opcheck(torch.ops.resnorm._packed_attention_backward.default, (grad, *arguments))


def test_torch_func():
    lengths = (3, 4)
    cu_seqlens = cumulative(lengths)
    batches = torch.randn(5, sum(lengths), 3, HEADS, HEAD_DIM, dtype=torch.float64)

    def ours(qkv):
        return functional.packed_attention(qkv, cu_seqlens, causal=True)

    def expected(qkv):
        return reference(qkv, lengths, causal=True)

    def grad(attention):
        return torch.func.grad(lambda qkv: attention(qkv).square().sum())

    torch.testing.assert_close(torch.func.vmap(ours)(batches), torch.stack([expected(qkv) for qkv in batches]))
    torch.testing.assert_close(
        torch.func.vmap(grad(ours))(batches), torch.stack([grad(expected)(qkv) for qkv in batches])
    )
    qkv, tangent = batches[0], batches[1]
    torch.testing.assert_close(torch.func.jvp(ours, (qkv,), (tangent,)), torch.func.jvp(expected, (qkv,), (tangent,)))


@pytest.mark.parametrize("requires_grad", [False, True])
def test_one_compiled_graph_serves_other_sequences(requires_grad):
    compiled = torch.compile(functional.packed_attention, fullgraph=True, backend="aot_eager", dynamic=True)
    for lengths in ((3, 4), (5, 2), (1, 20)):
        qkv, cu_seqlens = batch(lengths)
        qkv.requires_grad_(requires_grad)
        output = compiled(qkv, cu_seqlens)
        expected = reference(qkv, lengths).float()
        torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)
        if requires_grad:
            grads = [torch.autograd.grad(o.square().sum(), qkv)[0] for o in (output, expected)]
            torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-5)


def test_autocast_casts_as_torch_does():
    qkv, cu_seqlens = batch((3, 4))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert functional.packed_attention(qkv, cu_seqlens).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("qkv", "cu_seqlens", "max_seqlen", "error", "message"),
    [
        (torch.ones(4, 2, 1, 8), [0, 4], None, RuntimeError, r"\(tokens, 3, heads, head_dim\).*\[4, 2, 1, 8\]"),
        (torch.ones(4, 3, 8), [0, 4], None, RuntimeError, r"\[4, 3, 8\]"),
        (torch.ones(4, 3, 1, 8).int(), [0, 4], None, NotImplementedError, "Int"),
        (torch.ones(4, 3, 1, 8), [[0, 4]], None, RuntimeError, r"\(sequences \+ 1,\).*\[1, 2\]"),
        (torch.ones(4, 3, 1, 8), [], None, RuntimeError, r"\(sequences \+ 1,\).*\[0\]"),
        (torch.ones(4, 3, 1, 8), [1, 4], None, ValueError, "from 0 to.* 4, .*from 1 to 4"),
        (torch.ones(4, 3, 1, 8), [0, 3], None, ValueError, "from 0 to.* 4, .*from 0 to 3"),
        (torch.ones(4, 3, 1, 8), [0, 5], None, ValueError, "from 0 to 5"),
        (torch.ones(4, 3, 1, 8), [0, 3, 2, 4], None, ValueError, "got 3 before 2"),
        (torch.ones(4, 3, 1, 8), [0, 4], 3, ValueError, "max_seqlen, 3, but got one of 4"),
        (torch.ones(4, 3, 1, 8), [0, 4], -1, ValueError, "got -1"),
    ],
)
def test_bad_input(qkv, cu_seqlens, max_seqlen, error, message):
    with pytest.raises(error, match=message):
        functional.packed_attention(qkv, torch.tensor(cu_seqlens, dtype=torch.int32), max_seqlen=max_seqlen)


@pytest.mark.parametrize("cu_seqlens", [torch.tensor([0, 4]), torch.tensor([0, 4], dtype=torch.int32, device="meta")])
def test_cu_seqlens_of_another_kind(cu_seqlens):
    with pytest.raises(RuntimeError, match=r"Int, but got|cpu.*meta"):
        functional.packed_attention(torch.ones(4, 3, 1, 8), cu_seqlens)
