# SPDX-License-Identifier: BSD-3-Clause
from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from resnorm_ext import functional, reference

from .cases import HEAD_DIM, HEADS, KERNEL_DTYPES, LENGTHS, batch, cumulative, formula, sdpa


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_forward(lengths, scale, causal):
    qkv, cu_seqlens = batch(lengths)
    output = functional.packed_attention(qkv, cu_seqlens, scale=scale, causal=causal)
    assert output.shape == (sum(lengths), HEADS, HEAD_DIM) and output.is_contiguous()
    expected = formula(qkv, lengths, scale, causal)
    torch.testing.assert_close(output.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(reference.packed_attention(qkv.double(), cu_seqlens, scale, causal), expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("heads, head_dim", [(1, 1), (3, 5), (4, 64)])
def test_dtypes_and_dimensions(dtype, heads, head_dim):
    lengths = (9, 30)
    qkv, cu_seqlens = batch(lengths, dtype, heads=heads, head_dim=head_dim)
    output = functional.packed_attention(qkv, cu_seqlens)
    assert output.dtype == dtype
    tolerance = 1e-12 if dtype == torch.float64 else 2 * torch.finfo(dtype).eps
    torch.testing.assert_close(output.double(), formula(qkv, lengths), rtol=tolerance, atol=tolerance)


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
    torch.testing.assert_close(output.double(), formula(qkv, lengths, scale), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
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
        exact = formula(qkv, lengths, causal=causal)
        outputs = functional.packed_attention(qkv, cumulative(lengths), causal=causal), sdpa(qkv, lengths, causal)
        for i, output in enumerate(outputs):
            for j, error in enumerate((output.double() - exact).split(list(lengths))):
                mean[i, j] += error.square().mean().sqrt() / 20
                largest[i, j] = torch.maximum(largest[i, j], error.abs().max())
    assert (mean[0] <= 1.1 * mean[1]).all(), dict(zip(lengths, (mean[0] / mean[1]).tolist(), strict=True))
    assert (largest[0] <= 3 * largest[1]).all(), dict(zip(lengths, (largest[0] / largest[1]).tolist(), strict=True))


@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
def test_scores_near_80(dtype):
    lengths = (40, 700)
    qkv, cu_seqlens = batch(lengths, dtype)
    qkv[:, 0, :, 0] = 8 * torch.linspace(-1, 1, sum(lengths)).sign().unsqueeze(-1)
    qkv[:, 1, :, 0] = torch.linspace(-10, 10, sum(lengths)).unsqueeze(-1)
    output = functional.packed_attention(qkv, cu_seqlens, scale=1.0)
    tolerance = {torch.float32: 2e-5, torch.bfloat16: 2**-7, torch.float16: 2**-10}[dtype]
    torch.testing.assert_close(output.double(), formula(qkv, lengths, 1.0), rtol=tolerance, atol=tolerance)


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
@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
def test_long_sequences_cut_between_threads(dtype, causal, numbers_of_threads):
    qkv, cu_seqlens = batch((700, 1, 300), dtype)
    outputs = []
    for count in numbers_of_threads:
        torch.set_num_threads(count)
        outputs.append(functional.packed_attention(qkv, cu_seqlens, causal=causal))
    assert all(torch.equal(outputs[0], output) for output in outputs[1:])


def test_calls_from_several_threads():
    samples = [batch((3 + i, 40, 17 * i, 120), dtype) for i, dtype in enumerate([torch.float32, torch.bfloat16] * 2)]
    expected = [functional.packed_attention(*sample) for sample in samples]

    def work(i: int) -> bool:
        return all(torch.equal(functional.packed_attention(*samples[i]), expected[i]) for _ in range(50))

    with ThreadPoolExecutor(len(samples)) as pool:
        assert all(pool.map(work, range(len(samples))))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_more_sequences_than_threads(mode, numbers_of_threads):
    """They are shared out among threads, whose number changes nothing."""
    lengths = (3, 0, 40, 1, 17, 8, 8, 25, 2, 64, 5)
    outputs = []
    with mode():
        qkv, cu_seqlens = batch(lengths)
        for count in numbers_of_threads:
            torch.set_num_threads(count)
            outputs.append(functional.packed_attention(qkv, cu_seqlens))
    torch.testing.assert_close(outputs[0].double(), formula(qkv, lengths), rtol=1e-5, atol=1e-5)
    assert all(torch.equal(outputs[0], output) for output in outputs[1:])


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_sequences_do_not_see_each_other(dtype, value):
    qkv, cu_seqlens = batch((5, 6, 7), dtype)
    before = functional.packed_attention(qkv, cu_seqlens)
    qkv[5:11] = value
    after = functional.packed_attention(qkv, cu_seqlens)
    assert torch.equal(before[:5], after[:5]) and torch.equal(before[11:], after[11:])
    assert after[5:11].isnan().all()


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
