# SPDX-License-Identifier: BSD-3-Clause
"""MiniLM on real text as it comes and accelerated, in the modes in which people call a model, and by how much of the
speed-up under torch.no_grad() each of them has.

python benchmarks/bench_situations.py --output build/bench/situations.jsonl
"""

from __future__ import annotations

import contextlib
import copy
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

import torch
from harness import environment, parser, start
from results import OURS, Results
from timing import CpuTimer
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer

import resnorm_ext
from resnorm_ext.demo.command import bundled_model
from resnorm_ext.demo.texts import standard_library_texts

ORIGINAL = "Hugging Face"
TEXTS, BATCH = 64, 32

Call = Callable[[nn.Module, dict[str, Tensor]], object]


def main() -> None:
    options = start(parser(__doc__).parse_args())
    results = Results(options.output, "situations", environment(options))
    timer = CpuTimer(options.samples, seconds=60)
    path = bundled_model()
    tokenizer, texts = AutoTokenizer.from_pretrained(path), standard_library_texts(TEXTS)
    batches = [
        dict(tokenizer(texts[i : i + BATCH], padding=True, truncation=True, max_length=256, return_tensors="pt"))
        for i in range(0, TEXTS, BATCH)
    ]
    encoder = AutoModel.from_pretrained(path).eval()
    head = AutoModelForSequenceClassification.from_pretrained(path, num_labels=2).eval()
    gain = None
    for name, model, mode, call in _situations(encoder, head):
        models = {ORIGINAL: model, OURS: resnorm_ext.accelerate(copy.deepcopy(model))}
        measured = timer.measure({who: _run(each, batches, mode, call) for who, each in models.items()}, 0)
        for who, measurement in measured.items():
            results.write({"operation": "encode", "situation": name}, who, **measurement.as_dict())
        ratio = measured[ORIGINAL].seconds / measured[OURS].seconds
        gain = gain or ratio
        print(
            f"{name}: {measured[OURS].seconds * 1e3:.0f} ms, {ratio:.2f}×, {ratio / gain:.2f} of no_grad's", flush=True
        )


def _situations(encoder: nn.Module, head: nn.Module) -> Iterator[tuple[str, nn.Module, AbstractContextManager, Call]]:
    def plain(model: nn.Module, batch: dict[str, Tensor]) -> object:
        return model(**batch)

    def evaluate(model: nn.Module, batch: dict[str, Tensor]) -> object:  # as the Trainer does
        labels = torch.zeros(len(batch["input_ids"]), dtype=torch.long)
        return model(**batch, labels=labels, num_items_in_batch=torch.tensor(len(labels)))

    no_grad = torch.no_grad()
    yield "torch.no_grad()", encoder, no_grad, plain
    frozen = copy.deepcopy(encoder).requires_grad_(False)
    yield "grad mode on, every parameter frozen", frozen, contextlib.nullcontext(), plain
    yield "Trainer.evaluate, with labels", head, no_grad, evaluate
    yield "autocast to bfloat16", frozen, torch.autocast("cpu", torch.bfloat16), plain
    yield "a bfloat16 checkpoint", copy.deepcopy(encoder).bfloat16(), no_grad, plain
    yield "a float16 checkpoint", copy.deepcopy(encoder).half(), no_grad, plain


def _run(model: nn.Module, batches: list[dict[str, Tensor]], mode: AbstractContextManager, call: Call) -> Callable:
    def run() -> None:
        with mode:
            for batch in batches:
                call(model, batch)

    return run


if __name__ == "__main__":
    sys.exit(main())
