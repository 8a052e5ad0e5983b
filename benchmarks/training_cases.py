# SPDX-License-Identifier: BSD-3-Clause
"""What bench_training.py measures: steps of training, each made by itself, so that a process can hold one alone."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from results import OURS
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from transformers.utils import logging as transformers_logging

import resnorm_ext
from resnorm_ext.demo.command import bundled_model
from resnorm_ext.demo.texts import standard_library_texts
from resnorm_ext.functional import linear

NN, HUGGING_FACE, COMPILED = "torch.nn", "Hugging Face", "torch.compile"
BATCH, LENGTH, DIM, HIDDEN = 8, 128, 768, 3072
TEXTS, BATCH_SIZE = 256, 32

Step = Callable[[], object]


@dataclass(frozen=True)
class Case:
    """A kind of step.

    Attributes:
        tokens: real ones of a step.
        make: the step of a contender, by its name and dtype, the latter by autocast.
        products: all matrix products of a step alone, each by the fastest backend, on real tokens.
    """

    name: str
    tokens: int
    contenders: tuple[str, ...]
    make: Callable[[str, torch.dtype], Step]
    products: Callable[[torch.dtype], Step] | None = None


@cache
def cases() -> dict[str, Case]:
    padding, (batches, tokens, positions) = padding_mask(), text_batches()
    rows = int((~padding).sum())
    layers = [
        Case(
            "BERT-base layer, no padding",
            BATCH * LENGTH,
            (OURS, NN, COMPILED),
            _layer,
            lambda dtype: _products(BATCH * LENGTH, dtype),
        ),
        Case(
            f"2 layers, {padding.float().mean():.0%} padding",
            rows,
            (OURS, NN, COMPILED),
            _padded_layers,
            lambda dtype: _products(rows, dtype, layers=2),
        ),
        Case(
            f"MiniLM, an epoch of {TEXTS} texts, {positions / tokens:.2f} positions a token",
            tokens,
            (OURS, HUGGING_FACE, COMPILED),
            lambda contender, dtype: _epoch(_classifier(contender), batches, dtype),
        ),
    ]
    return {case.name: case for case in layers}


def padding_mask() -> Tensor:
    """Sequences of 1 to LENGTH tokens, evenly."""
    return torch.arange(LENGTH) >= torch.linspace(1, LENGTH, BATCH).long().unsqueeze(1)


@cache
def text_batches() -> tuple[list[dict[str, Tensor]], int, int]:
    """Documentation strings in batches as they come, their tokens, and those and the padding."""
    tokenizer = AutoTokenizer.from_pretrained(bundled_model())
    texts = standard_library_texts()[:TEXTS]
    batches = [
        tokenizer(texts[i : i + BATCH_SIZE], padding=True, truncation=True, max_length=128, return_tensors="pt")
        for i in range(0, len(texts), BATCH_SIZE)
    ]
    masks = [batch["attention_mask"] for batch in batches]
    return batches, sum(int(mask.sum()) for mask in masks), sum(mask.numel() for mask in masks)


def encoder_layer() -> nn.Module:
    torch.manual_seed(0)
    return nn.TransformerEncoderLayer(DIM, 12, HIDDEN, 0.1, "gelu", batch_first=True).train()


def contender_of(name: str, model: nn.Module, padding: str = "auto", **compile_options: bool) -> nn.Module:
    if name == OURS:
        return resnorm_ext.accelerate(model, padding=padding)
    return torch.compile(model, **compile_options) if name == COMPILED else model


def _layer(contender: str, dtype: torch.dtype) -> Step:
    return _step(contender_of(contender, encoder_layer()), dtype)


def _padded_layers(contender: str, dtype: torch.dtype) -> Step:
    layers = nn.TransformerEncoder(encoder_layer(), 2, enable_nested_tensor=False)
    return _step(contender_of(contender, layers, padding="skip"), dtype, src_key_padding_mask=padding_mask())


def _step(module: nn.Module, dtype: torch.dtype, **arguments: Tensor) -> Step:
    x = torch.randn(BATCH, LENGTH, DIM, requires_grad=True)

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            output = module(x, **arguments)
        output.float().square().mean().backward()
        module.zero_grad()
        x.grad = None

    return step


def _classifier(contender: str) -> nn.Module:
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(bundled_model(), num_labels=2).train()
    return contender_of(contender, model, padding="skip", dynamic=True)


def _epoch(model: nn.Module, batches: list[dict[str, Tensor]], dtype: torch.dtype) -> Step:
    """With the optimizer's steps."""
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
