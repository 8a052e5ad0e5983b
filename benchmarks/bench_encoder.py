# SPDX-License-Identifier: BSD-3-Clause
"""MiniLM on real text: what accelerate() gains, what each part of it gains, what the time is made of, and how much of
it the matrix products would take alone.

python benchmarks/bench_encoder.py --output build/bench/encoder.jsonl
"""

from __future__ import annotations

import copy
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import torch
from encoder_plot import plot
from harness import environment, parser, start
from results import Results
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModel, AutoTokenizer

import resnorm_ext
from resnorm_ext.build.extension import extension
from resnorm_ext.demo.command import bundled_model
from resnorm_ext.demo.encode import tokenize
from resnorm_ext.demo.texts import standard_library_texts
from resnorm_ext.engine.packing import pack, packing_of
from resnorm_ext.engine.prepared import prepared_layers

BATCH_SIZE = 32
ACCELERATED, STACK, PRODUCTS = "accelerated", "encoder stack, packed in and out", "its products alone"

# What a profiled operator's own time counts as.
PARTS = {
    "linear layers": ("resnorm::linear", "resnorm::prepacked_linear", "mkldnn::", "aten::addmm", "aten::linear"),
    "attention": ("resnorm::packed_attention", "aten::_scaled_dot_product"),
    "add + LayerNorm": ("resnorm::_norm", "resnorm::add_layer_norm", "resnorm::layer_norm"),
}
OTHERS = "everything else"


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--rounds", type=int, default=3, help="passes over all batches")
    options = start(options.parse_args())
    described = environment(options)
    results = Results(options.output, "encoder", described)
    tokenizer = AutoTokenizer.from_pretrained(bundled_model())
    texts = standard_library_texts()
    measured = {}
    for dtype in (torch.float32, torch.bfloat16):
        original = AutoModel.from_pretrained(bundled_model(), dtype=dtype).eval()
        accelerated = resnorm_ext.accelerate(copy.deepcopy(original))
        for order, ordered in {"as they come": texts, "sorted by length": sorted(texts, key=len)}.items():
            batches = [tokenize(tokenizer, ordered[i : i + BATCH_SIZE]) for i in range(0, len(ordered), BATCH_SIZE)]
            seconds = time_batches(contenders(original, accelerated), batches, options.rounds)
            parts = profile_parts(accelerated, batches)
            name = str(dtype).removeprefix("torch.")
            _print(name, order, batches, seconds, parts)
            measured[name, order] = (seconds[ACCELERATED], seconds[PRODUCTS], parts)
            for contender, value in seconds.items():
                case = {"operation": "encode", "model": "MiniLM", "dtype": name, "order": order}
                details = {"parts": parts} if contender == ACCELERATED else {}
                results.write(case, contender, seconds=value, **details)
    if options.output:
        title = f"{described['hardware']}, {described['threads']} threads, PyTorch {described['torch']}"
        plot(measured, title, Path(options.output).with_suffix(".svg"))


def contenders(original: nn.Module, accelerated: nn.Module) -> dict[str, Callable]:
    """Functions of a batch, to a function without arguments that is timed: the original, the original with one part of
    the work replaced at a time, everything together, and what that is made of."""
    norms = copy.deepcopy(original)
    for module in norms.modules():
        if type(module) is nn.LayerNorm:
            module.__class__ = resnorm_ext.LayerNorm
    encoder, dtype = accelerated.encoder, original.dtype
    with torch.no_grad():
        layers = prepared_layers(encoder, encoder.layer, encoder.text_encoder.layer, torch.empty(0), dtype)

    def stack(batch) -> Callable[[], Tensor]:
        packing = packing_of(batch["attention_mask"].bool())
        tokens = pack(original.embeddings(batch["input_ids"], batch["token_type_ids"]), packing)
        return lambda: layers.encode(tokens, packing.cu_seqlens)

    return {
        "Hugging Face": lambda batch: lambda: original(**batch),
        "Hugging Face with our LayerNorm": lambda batch: lambda: norms(**batch),
        # A mask of ones makes every position a real token: the fused layers without padding-free batches.
        "accelerated, padding computed too": lambda batch: (
            lambda: accelerated(**{**batch, "attention_mask": torch.ones_like(batch["attention_mask"])})
        ),
        ACCELERATED: lambda batch: lambda: accelerated(**batch),
        STACK: stack,
        PRODUCTS: lambda batch: lambda: _multiply(layers.layers, int(batch["attention_mask"].sum()), dtype),
    }


def _multiply(layers: list, tokens: int, dtype: torch.dtype) -> None:
    """As many rows as there are tokens through every matrix product of the layers."""
    x, hidden = (torch.ones(extension.MAX_ROWS, width, dtype=dtype) for width in (384, 1536))
    for begin in range(0, tokens, extension.MAX_ROWS):
        rows = min(extension.MAX_ROWS, tokens - begin)
        for layer in layers:
            for linear, operand in (
                (layer.qkv, x),
                (layer.attention_output, x),
                (layer.intermediate, x),
                (layer.output, hidden),
            ):
                linear(operand[:rows])


@torch.inference_mode()
def time_batches(models: dict[str, Callable], batches: list, rounds: int) -> dict[str, float]:
    """Seconds of one pass over the batches: each batch with every contender in turn, the least time of the rounds."""
    for prepare in models.values():
        prepare(batches[0])()
    seconds = dict.fromkeys(models, 0.0)
    for batch in batches:
        calls = {name: prepare(batch) for name, prepare in models.items()}
        least = dict.fromkeys(models, float("inf"))
        for _ in range(rounds):
            for name, call in calls.items():
                began = time.perf_counter()
                call()
                least[name] = min(least[name], time.perf_counter() - began)
        for name, value in least.items():
            seconds[name] += value
    return seconds


@torch.inference_mode()
def profile_parts(model: nn.Module, batches: list) -> dict[str, float]:
    """Share of the time by part, from the operators' own time as the profiler saw it."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        for batch in batches:
            model(**batch)
    totals: dict[str, float] = defaultdict(float)
    for event in profiler.key_averages():
        part = next((name for name, ops in PARTS.items() if event.key.startswith(ops)), OTHERS)
        totals[part] += event.self_cpu_time_total
    whole = sum(totals.values())
    return {name: totals[name] / whole for name in (*PARTS, OTHERS)}


def _print(dtype: str, order: str, batches: list, seconds: dict[str, float], parts: dict[str, float]) -> None:
    real = sum(int(batch["attention_mask"].sum()) for batch in batches)
    padded = sum(batch["input_ids"].numel() for batch in batches)
    print(f"\n{dtype}, {order}: {real:,} real tokens, {padded:,} padded")
    for name, value in seconds.items():
        print(f"  {name:40}{value:8.2f} s {seconds['Hugging Face'] / value:7.2f}×")
    for name in (ACCELERATED, STACK):
        print(f"    share of the products' limit, {name:34}{seconds[PRODUCTS] / seconds[name]:7.1%}")
    for name, share in parts.items():
        print(f"    of the accelerated time, {name:39}{share:7.1%}")


if __name__ == "__main__":
    main()
