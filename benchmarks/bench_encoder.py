# SPDX-License-Identifier: BSD-3-Clause
"""MiniLM on real text: what accelerate() gains, what each part of it gains, and what the remaining time is made of.

python benchmarks/bench_encoder.py
"""

from __future__ import annotations

import copy
import time
from collections import defaultdict
from collections.abc import Callable

import torch
from harness import environment, parser, start
from results import Results
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModel, AutoTokenizer

import resnorm_ext
from resnorm_ext.demo.command import bundled_model
from resnorm_ext.demo.encode import tokenize
from resnorm_ext.demo.texts import standard_library_texts

BATCH_SIZE = 32

# What a profiled operator's own time counts as.
PARTS = {
    "linears": ("resnorm::linear", "resnorm::packed_linear", "mkldnn::", "aten::addmm", "aten::linear"),
    "attention": ("resnorm::packed_attention", "aten::_scaled_dot_product"),
    "add + LayerNorm": ("resnorm::add_layer_norm", "resnorm::layer_norm"),
}


def main() -> None:
    options = start(parser(__doc__).parse_args())
    results = Results(options.output, "encoder", environment(options))
    tokenizer = AutoTokenizer.from_pretrained(bundled_model())
    original = AutoModel.from_pretrained(bundled_model()).eval()
    accelerated = resnorm_ext.accelerate(copy.deepcopy(original))
    texts = standard_library_texts()
    for order, ordered in {"arrival": texts, "sorted": sorted(texts, key=len)}.items():
        batches = [tokenize(tokenizer, ordered[i : i + BATCH_SIZE]) for i in range(0, len(ordered), BATCH_SIZE)]
        seconds = time_batches(contenders(original, accelerated), batches)
        print(f"\n{order}: {sum(int(b['attention_mask'].sum()) for b in batches):,} real tokens, ", end="")
        print(f"{sum(b['input_ids'].numel() for b in batches):,} padded")
        for name, value in seconds.items():
            print(f"  {name:44}{value:8.2f} s {seconds['Hugging Face'] / value:7.2f}×")
        parts = profile_parts(accelerated, batches)
        for name, share in parts.items():
            print(f"    of the accelerated time, {name:20}{share:7.1%}")
        for name, value in seconds.items():
            case = {"operation": "encode", "model": "MiniLM", "order": order}
            results.write(case, name, seconds=value, **({"parts": parts} if name == "accelerated" else {}))


def contenders(original: torch.nn.Module, accelerated: torch.nn.Module) -> dict[str, Callable]:
    """The original, the original with one part of the work replaced at a time, and everything together."""
    norms = copy.deepcopy(original)
    for module in norms.modules():
        if type(module) is torch.nn.LayerNorm:
            module.__class__ = resnorm_ext.LayerNorm

    def padded(batch):
        # A mask of ones makes every position a real token: the fused layers without padding-free batches.
        return accelerated(**{**batch, "attention_mask": torch.ones_like(batch["attention_mask"])})

    return {
        "Hugging Face": lambda batch: original(**batch),
        "Hugging Face with our LayerNorm": lambda batch: norms(**batch),
        "accelerated, padding computed too": padded,
        "accelerated": lambda batch: accelerated(**batch),
    }


@torch.inference_mode()
def time_batches(models: dict[str, Callable], batches: list) -> dict[str, float]:
    """Seconds of one pass over the batches, each batch once with every contender in turn."""
    for model in models.values():
        model(batches[0])
    seconds = dict.fromkeys(models, 0.0)
    for batch in batches:
        for name, model in models.items():
            began = time.perf_counter()
            model(batch)
            seconds[name] += time.perf_counter() - began
    return seconds


@torch.inference_mode()
def profile_parts(model: torch.nn.Module, batches: list) -> dict[str, float]:
    """Share of the time by part, from the operators' own time as the profiler saw it."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        for batch in batches:
            model(**batch)
    totals: dict[str, float] = defaultdict(float)
    for event in profiler.key_averages():
        part = next((name for name, ops in PARTS.items() if event.key.startswith(ops)), "everything else")
        totals[part] += event.self_cpu_time_total
    whole = sum(totals.values())
    return {name: totals[name] / whole for name in (*PARTS, "everything else")}


if __name__ == "__main__":
    main()
