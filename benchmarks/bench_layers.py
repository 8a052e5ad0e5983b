# SPDX-License-Identifier: BSD-3-Clause
"""torch.nn's encoder layers in inference, as they come and accelerated: BERT-base's layer without padding, and encoders
of which half the positions are padding.

python benchmarks/bench_layers.py --output build/bench/layers.jsonl
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable

import torch
from harness import environment, parser, start
from results import OURS, Results
from timing import CpuTimer
from torch import Tensor, nn

import resnorm_ext

FAST, PLAIN = "torch.nn, fast path", "torch.nn, fast path off"
BATCH, LENGTH = 8, 128


def main() -> None:
    options = start(parser(__doc__).parse_args())
    results = Results(options.output, "layers", environment(options))
    timer = CpuTimer(options.samples, seconds=30)
    torch.manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16):
        _compare(results, timer, "BERT-base layer, no padding", _layer(dtype), dtype, padding=None)
    padding = _half_padding()
    for norm_first in (False, True):
        name = f"6 {'pre' if norm_first else 'post'}-norm layers, {padding.float().mean():.0%} padding"
        encoder = nn.TransformerEncoder(_layer(torch.float32, norm_first), 6, enable_nested_tensor=not norm_first)
        _compare(results, timer, name, encoder.eval(), torch.float32, padding)


def _layer(dtype: torch.dtype, norm_first: bool = False) -> nn.Module:
    layer = nn.TransformerEncoderLayer(
        768, 12, 3072, activation="gelu", batch_first=True, norm_first=norm_first, dtype=dtype
    )
    return layer.eval()


def _half_padding() -> Tensor:
    lengths = torch.linspace(1, LENGTH, BATCH).long()
    return torch.arange(LENGTH) >= lengths.unsqueeze(1)


@torch.no_grad()
def _compare(
    results: Results, timer: CpuTimer, name: str, module: nn.Module, dtype: torch.dtype, padding: Tensor | None
) -> None:
    x = torch.randn(BATCH, LENGTH, 768, dtype=dtype)
    accelerated = resnorm_ext.accelerate(copy.deepcopy(module), padding="skip")
    calls = {
        OURS: lambda: accelerated(x, src_key_padding_mask=padding),
        FAST: lambda: module(x, src_key_padding_mask=padding),
        PLAIN: _without_fast_path(lambda: module(x, src_key_padding_mask=padding)),
    }
    case = {"operation": name, "dtype": str(dtype).removeprefix("torch."), "batch": BATCH, "length": LENGTH}
    real = slice(None) if padding is None else ~padding
    expected = calls[PLAIN]()[real].float()
    limit = 1e-4 if dtype == torch.float32 else 0.1
    for contender in (OURS, FAST):
        difference = (calls[contender]()[real].float() - expected).abs().max().item()
        if not difference <= limit:
            raise ValueError(f"{name}: {contender} differs by {difference:.2g} from torch.nn without its fast path")
    measured = timer.measure(calls, 0)
    for contender, measurement in measured.items():
        results.write(case, contender, **measurement.as_dict())
    ours = measured[OURS].seconds
    print(f"{name}, {case['dtype']}: {ours * 1e3:.2f} ms; ", end="")
    print(", ".join(f"{other} {measured[other].seconds / ours:.2f}×" for other in (FAST, PLAIN)), flush=True)


def _without_fast_path(call: Callable[[], Tensor]) -> Callable[[], Tensor]:
    def without() -> Tensor:
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            return call()
        finally:
            torch.backends.mha.set_fastpath_enabled(True)

    return without


if __name__ == "__main__":
    sys.exit(main())
