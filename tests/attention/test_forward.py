# SPDX-License-Identifier: BSD-3-Clause
from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F

from resnorm_ext import functional
from resnorm_ext.build.extension import ensure_loaded

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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strides_and_inputs_unchanged(dtype):
    lengths = (4, 6)
    qkv, cu_seqlens = batch(lengths, dtype)
    expected = functional.packed_attention(qkv, cu_seqlens)
    layouts = {
        "head_dim apart": torch.empty(3, 10, HEAD_DIM, HEADS, dtype=dtype).permute(1, 0, 3, 2),
        "heads outside of q, k and v": torch.empty(10, HEADS, 3, HEAD_DIM, dtype=dtype).transpose(1, 2),
        "wider rows": torch.empty(10, 3, HEADS + 1, HEAD_DIM + 3, dtype=dtype)[:, :, 1:, 2:-1],
    }
    for name, strided in layouts.items():
        strided.copy_(qkv)
        assert not strided.is_contiguous()
        assert torch.equal(functional.packed_attention(strided, cu_seqlens), expected), name
        assert torch.equal(strided, qkv) and torch.equal(cu_seqlens, cumulative(lengths))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [0.0, -0.7])
def test_scales_that_nobody_expects(scale, dtype):
    lengths = (5, 20)
    qkv, cu_seqlens = batch(lengths, dtype)
    output = functional.packed_attention(qkv, cu_seqlens, scale=scale)
    tolerance = 2 * torch.finfo(dtype).eps if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(output.double(), reference(qkv, lengths, scale), rtol=tolerance, atol=tolerance)


def sdpa(qkv, lengths, causal=False):
    parts = [
        F.scaled_dot_product_attention(*s.permute(1, 2, 0, 3).unsqueeze(1), is_causal=causal).squeeze(0)
        for s in qkv.split(list(lengths))
    ]
    return torch.cat([part.transpose(0, 1) for part in parts])


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("lengths", "heads"), [((*range(1, 34), 63, 64, 65), 8), ((127, 128, 129, 511, 512, 513, 1000, 2048), 1)]
)
def test_as_accurate_as_torch(lengths, heads, dtype, causal):
    """Against float64: root mean square over 20 inputs at each length at most 1.1 times, no output farther than 3."""
    mean = torch.zeros(2, len(lengths), dtype=torch.float64)
    largest = torch.zeros_like(mean)
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        qkv = torch.randn(sum(lengths), 3, heads, 32, generator=generator).to(dtype)
        exact = reference(qkv, lengths, causal=causal)
        outputs = functional.packed_attention(qkv, cumulative(lengths), causal=causal), sdpa(qkv, lengths, causal)
        for i, output in enumerate(outputs):
            for j, error in enumerate((output.double() - exact).split(list(lengths))):
                mean[i, j] += error.square().mean().sqrt() / 20
                largest[i, j] = torch.maximum(largest[i, j], error.abs().max())
    assert (mean[0] <= 1.1 * mean[1]).all(), dict(zip(lengths, (mean[0] / mean[1]).tolist(), strict=True))
    assert (largest[0] <= 3 * largest[1]).all(), dict(zip(lengths, (largest[0] / largest[1]).tolist(), strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_scores_near_80(dtype):
    lengths = (40, 700)
    qkv, cu_seqlens = batch(lengths, dtype)
    qkv[:, 0, :, 0] = 8 * torch.linspace(-1, 1, sum(lengths)).sign().unsqueeze(-1)
    qkv[:, 1, :, 0] = torch.linspace(-10, 10, sum(lengths)).unsqueeze(-1)
    output = functional.packed_attention(qkv, cu_seqlens, scale=1.0)
    tolerance = {torch.float32: 2e-5, torch.bfloat16: 2**-7, torch.float16: 2**-10}[dtype]
    torch.testing.assert_close(output.double(), reference(qkv, lengths, 1.0), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("lengths", [(1, 1), (1000,)])
def test_one_dominating_key(lengths, dtype):
    qkv, cu_seqlens = batch(lengths, dtype)
    if len(lengths) == 1:
        qkv[:, :2, :, 0] = 0
        qkv[:, 0, :, 0], qkv[700, 1, :, 0] = 20, 20
    output = functional.packed_attention(qkv, cu_seqlens, scale=1.0)
    value = qkv[:, 2] if len(lengths) > 1 else qkv[700, 2].expand_as(output)
    assert torch.equal(output, value)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_long_sequences_cut_between_threads(dtype, causal):
    qkv, cu_seqlens = batch((700, 1, 300), dtype)
    outputs, threads = [], torch.get_num_threads()
    for count in (1, 2, 3, 7):
        torch.set_num_threads(count)
        outputs.append(functional.packed_attention(qkv, cu_seqlens, causal=causal))
    torch.set_num_threads(threads)
    assert all(torch.equal(outputs[0], output) for output in outputs[1:])


def test_calls_from_several_threads():
    samples = [batch((3 + i, 40, 17 * i, 120), dtype) for i, dtype in enumerate([torch.float32, torch.bfloat16] * 2)]
    expected = [functional.packed_attention(*sample) for sample in samples]

    def work(i: int) -> bool:
        return all(torch.equal(functional.packed_attention(*samples[i]), expected[i]) for _ in range(50))

    with ThreadPoolExecutor(len(samples)) as pool:
        assert all(pool.map(work, range(len(samples))))


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


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_sequences_do_not_see_each_other(dtype, value):
    qkv, cu_seqlens = batch((5, 6, 7), dtype)
    before = functional.packed_attention(qkv, cu_seqlens)
    qkv[5:11] = value
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

    def torchs(qkv):
        return sdpa(qkv, lengths)

    exact = gradient(torchs, qkv.double())
    ours = gradient(lambda qkv: functional.packed_attention(qkv, cu_seqlens), qkv)
    assert (ours - exact).norm() <= 1.05 * (gradient(torchs, qkv) - exact).norm()


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
