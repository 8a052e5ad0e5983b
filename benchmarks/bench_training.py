# SPDX-License-Identifier: BSD-3-Clause
"""Training steps, forward and backward: BERT-base's layer in torch.nn, eager and compiled, and accelerated; MiniLM on
real texts as Hugging Face's Trainer pads them, with the optimizer. Beside the layers their limit: the products alone,
each by the fastest backend.

python benchmarks/bench_training.py --output build/bench/training.jsonl
"""

from __future__ import annotations

import copy
import sys
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from harness import environment, parser, start
from results import OURS, Results
from timing import CpuTimer
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import resnorm_ext
from resnorm_ext.demo.command import bundled_model
from resnorm_ext.demo.texts import standard_library_texts
from resnorm_ext.functional import linear

NN, COMPILED, HUGGING_FACE, PRODUCTS = "torch.nn", "torch.compile", "Hugging Face", "products alone"
BATCH, LENGTH, DIM, HIDDEN = 8, 128, 768, 3072
TEXTS, BATCH_SIZE = 256, 32

Step = Callable[[], Tensor]


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--compiled", action="store_true", help="measure torch.compile too, which takes minutes")
    options = start(options.parse_args())
    results = Results(options.output, "training", environment(options))
    timer = CpuTimer(options.samples, seconds=60)
    torch.manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16):
        _layer(results, timer, dtype, options.compiled)
        _padded_layers(results, timer, dtype)
        _fine_tuning(results, timer, dtype)


def _layer(results: Results, timer: CpuTimer, dtype: torch.dtype, compiled: bool) -> None:
    theirs = _encoder_layer()
    x = torch.randn(BATCH, LENGTH, DIM, requires_grad=True)
    modules = {OURS: resnorm_ext.accelerate(copy.deepcopy(theirs)), NN: theirs}
    if compiled:
        modules[COMPILED] = torch.compile(copy.deepcopy(theirs))
    steps = {name: _step(module, dtype, x) for name, module in modules.items()}
    _check(theirs, modules[OURS], x)
    _compare(results, timer, "BERT-base layer, no padding", dtype, BATCH * LENGTH, steps, _products(1024, dtype))


def _padded_layers(results: Results, timer: CpuTimer, dtype: torch.dtype) -> None:
    theirs = nn.TransformerEncoder(_encoder_layer(), 2, enable_nested_tensor=False)
    ours = resnorm_ext.accelerate(copy.deepcopy(theirs), padding="skip")
    padding = torch.arange(LENGTH) >= torch.linspace(1, LENGTH, BATCH).long().unsqueeze(1)
    x = torch.randn(BATCH, LENGTH, DIM, requires_grad=True)
    steps = {
        name: _step(module, dtype, x, src_key_padding_mask=padding) for name, module in {OURS: ours, NN: theirs}.items()
    }
    _check(theirs, ours, x, src_key_padding_mask=padding)
    rows = int((~padding).sum())
    name = f"2 layers, {padding.float().mean():.0%} padding"
    _compare(results, timer, name, dtype, rows, steps, _products(rows, dtype, layers=2))


def _fine_tuning(results: Results, timer: CpuTimer, dtype: torch.dtype) -> None:
    """An epoch, with the optimizer's steps."""
    tokenizer = AutoTokenizer.from_pretrained(bundled_model())
    texts = standard_library_texts()[:TEXTS]
    batches = [
        tokenizer(texts[i : i + BATCH_SIZE], padding=True, truncation=True, max_length=128, return_tensors="pt")
        for i in range(0, len(texts), BATCH_SIZE)
    ]
    theirs = AutoModelForSequenceClassification.from_pretrained(bundled_model(), num_labels=2).train()
    models = {OURS: resnorm_ext.accelerate(copy.deepcopy(theirs), padding="skip"), HUGGING_FACE: theirs}
    tokens = sum(int(batch["attention_mask"].sum()) for batch in batches)
    padded = sum(batch["attention_mask"].numel() for batch in batches)
    epochs = {name: _epoch(model, batches, dtype) for name, model in models.items()}
    name = f"MiniLM, an epoch of {len(texts)} texts, {padded / tokens:.2f} positions a token"
    _compare(results, timer, name, dtype, tokens, epochs, None)


def _encoder_layer() -> nn.Module:
    return nn.TransformerEncoderLayer(DIM, 12, HIDDEN, 0.1, "gelu", batch_first=True).train()


def _step(module: nn.Module, dtype: torch.dtype, x: Tensor, **arguments: Tensor) -> Step:
    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            output = module(x, **arguments)
        output.float().square().mean().backward()
        module.zero_grad()
        x.grad = None

    return step


def _epoch(model: nn.Module, batches: list[dict[str, Tensor]], dtype: torch.dtype) -> Step:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    labels = torch.arange(BATCH_SIZE) % 2

    def epoch() -> None:
        for batch in batches:
            with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
                loss = model(**batch, labels=labels[: len(batch["input_ids"])]).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    return epoch


def _check(theirs: nn.Module, ours: nn.Module, x: Tensor, **arguments: Tensor) -> None:
    """Without dropout both compute the same at real positions."""
    with torch.no_grad():
        outputs = [module.eval()(x, **arguments) for module in (theirs, ours)]
        theirs.train(), ours.train()
    real = ~arguments["src_key_padding_mask"] if arguments else slice(None)
    torch.testing.assert_close(outputs[1][real], outputs[0][real], rtol=1e-4, atol=1e-4)


def _products(rows: int, dtype: torch.dtype, layers: int = 1) -> Step:
    """The twelve products of a step of each layer, each by the fastest backend."""
    shapes = [(3 * DIM, DIM), (DIM, DIM), (HIDDEN, DIM), (DIM, HIDDEN)]
    calls = [call for out, into in shapes for call in _fastest_products(rows, out, into, dtype)]

    def all_of_them() -> None:
        for _ in range(layers):
            for call in calls:
                call()

    return all_of_them


@torch.no_grad()
def _fastest_products(rows: int, out: int, into: int, dtype: torch.dtype) -> list[Step]:
    """Forward, the input's gradient and the weight's: by torch, or through this package, which measures oneDNN too."""
    x, grad = torch.randn(rows, into).to(dtype), torch.randn(rows, out).to(dtype)
    weight = torch.randn(out, into).to(dtype)
    training = weight.detach().requires_grad_()

    def by_us(x: Tensor, weight: Tensor) -> Tensor:
        with torch.enable_grad():  # else the weight counts as one of inference
            return linear(x, weight)

    candidates = [
        (lambda: F.linear(x, weight), lambda: by_us(x, training)),
        (lambda: grad @ weight, lambda: by_us(grad, training.t())),
        (lambda: grad.t() @ x,),
    ]
    return [min(each, key=_seconds) for each in candidates]


def _seconds(call: Step) -> float:
    times = []
    for _ in range(4):
        began = time.perf_counter()
        call()
        times.append(time.perf_counter() - began)
    return min(times[1:])


def _compare(
    results: Results,
    timer: CpuTimer,
    name: str,
    dtype: torch.dtype,
    tokens: int,
    steps: dict[str, Step],
    products: Step | None,
) -> None:
    """``tokens``: real ones, of a call."""
    dtype_name = "float32" if dtype == torch.float32 else "bfloat16 by autocast"
    case = {"operation": name, "dtype": dtype_name, "tokens": tokens}
    measured = timer.measure(steps | ({} if products is None else {PRODUCTS: products}), 0)
    for contender, measurement in measured.items():
        results.write(case, contender, **measurement.as_dict())
    ours = measured[OURS].seconds
    ratios = [f"{other} {measured[other].seconds / ours:.2f}×" for other in steps if other != OURS]
    if products is not None:
        ratios.append(f"{measured[PRODUCTS].seconds / ours:.0%} of the limit")
    print(f"{name}, {dtype_name}: {ours * 1e3:.1f} ms, {tokens / ours:.0f} tokens/s; {', '.join(ratios)}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
