# SPDX-License-Identifier: BSD-3-Clause
"""packed_attention against PyTorch's scaled_dot_product_attention, called for each sequence: MiniLM's heads on the
lengths of real texts, and on eight sequences of 512.

python benchmarks/bench_attention.py --output build/bench/attention.jsonl
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from itertools import pairwise

import torch
import torch.nn.functional as F
from harness import environment, parser, start
from results import OURS, Results
from timing import CpuTimer
from torch import Tensor
from transformers import AutoTokenizer

from resnorm_ext.demo.command import bundled_model
from resnorm_ext.demo.texts import standard_library_texts
from resnorm_ext.functional import packed_attention

HEADS, HEAD_DIM, BATCH_SIZE = 12, 32, 32
SDPA = "scaled_dot_product_attention"


def main() -> None:
    options = start(parser(__doc__).parse_args())
    results = Results(options.output, "attention", environment(options))
    timer = CpuTimer(options.samples, seconds=30)
    tokenizer = AutoTokenizer.from_pretrained(bundled_model())
    texts = tokenizer(standard_library_texts(), truncation=True, max_length=256)["input_ids"]
    lengths = [len(ids) for ids in texts]
    cases = {
        "512 texts": [lengths[i : i + BATCH_SIZE] for i in range(0, len(lengths), BATCH_SIZE)],
        "8 × 512": [[512] * 8],
    }
    for name, batches in cases.items():
        for dtype in (torch.float32, torch.bfloat16):
            _compare(results, timer, name, batches, dtype)


@torch.inference_mode()
def _compare(results: Results, timer: CpuTimer, name: str, batches: list[list[int]], dtype: torch.dtype) -> None:
    operands = []
    for lengths in batches:
        cu_seqlens = torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32)
        operands.append((torch.randn(sum(lengths), 3, HEADS, HEAD_DIM).to(dtype), cu_seqlens))
    calls = {OURS: _each(operands, packed_attention), SDPA: _each(operands, _by_sequence)}
    for ours, theirs in zip(calls[OURS](), calls[SDPA](), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0.05, atol=1e-5 if dtype == torch.float32 else 0.02)
    case = {"operation": "packed_attention", "sequences": name, "dtype": str(dtype).removeprefix("torch.")}
    measured = timer.measure(calls, 0)
    for contender, measurement in measured.items():
        results.write(case, contender, **measurement.as_dict())
    ours, theirs = (measured[contender].seconds for contender in (OURS, SDPA))
    print(f"{name}, {case['dtype']}: {ours * 1e3:.2f} ms; {SDPA} {theirs / ours:.2f}×", flush=True)


def _each(operands: list[tuple[Tensor, Tensor]], attend: Callable[[Tensor, Tensor], Tensor]) -> Callable[[], list]:
    return lambda: [attend(qkv, cu_seqlens) for qkv, cu_seqlens in operands]


def _by_sequence(qkv: Tensor, cu_seqlens: Tensor) -> Tensor:
    heads_first = qkv.permute(1, 2, 0, 3).unsqueeze(1)
    contexts = []
    for begin, end in pairwise(cu_seqlens.tolist()):
        query, key, value = heads_first[:, :, :, begin:end]
        contexts.append(F.scaled_dot_product_attention(query, key, value).squeeze(0).transpose(0, 1))
    return torch.cat(contexts)


if __name__ == "__main__":
    sys.exit(main())
