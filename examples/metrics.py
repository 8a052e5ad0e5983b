# SPDX-License-Identifier: BSD-3-Clause
"""How good a classifier is, what its training took, and both as tables and a plot."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from rich.table import Table
from sklearn.metrics import classification_report
from torch.utils.data import DataLoader

from resnorm_ext.data import TokenBudgetSampler


@torch.inference_mode()
def predict(model: torch.nn.Module, dataset: Sequence[dict[str, Any]], collate: Any) -> list[Any]:
    """Each item's most likely class, or those of its tokens and of the padding after them.

    Texts of like lengths go together, so that little is padded for any model.
    """
    batches = TokenBudgetSampler([len(item["input_ids"]) for item in dataset], 4096, shuffle=False)
    predicted = [0] * len(dataset)
    for batch in DataLoader(dataset, batch_sampler=batches, collate_fn=collate):
        indices = batch.pop("index").tolist()
        batch.pop("labels")
        for index, label in zip(indices, model(**batch).logits.argmax(-1).tolist(), strict=True):
            predicted[index] = label
    return predicted


def class_report(labels: Sequence[int], predicted: Sequence[int], classes: Sequence[str]) -> str:
    """Precision, recall, F1 and support of each class, and accuracy."""
    every = list(range(len(classes)))
    return classification_report(labels, predicted, labels=every, target_names=classes, digits=3, zero_division=0.0)


def comparison(results: Sequence[dict[str, Any]], name: str, score: Callable[[dict[str, Any]], float]) -> Table:
    """A column for each result with its ``score``, and how many times the last's seconds and memory the first's are."""
    table = Table("", *(result["variant"] for result in results), "ratio")

    def row(name: str, form: str, values: Sequence[float], ratio: bool = False) -> None:
        shown = f"{values[0] / values[-1]:.2f}×" if ratio and values[-1] else ""
        table.add_row(name, *map(form.format, values), shown)

    row(name, "{:.3f}", [score(result) for result in results])
    row("seconds of training", "{:.1f}", [result["seconds"] for result in results], ratio=True)
    row("tokens per second", "{:,.0f}", [result["tokens"] / (result["seconds"] or 1) for result in results])
    row("seconds of the test", "{:.1f}", [result["test_seconds"] for result in results], ratio=True)
    row("peak memory, MiB", "{:,.0f}", [result["peak_mib"] for result in results], ratio=True)
    return table


def plot_losses(losses: dict[str, Sequence[float]], path: Path) -> None:
    """Each variant's loss at every step, thin, and its running mean."""
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for number, (name, curve) in enumerate(losses.items()):
        axes.plot(range(1, len(curve) + 1), curve, color=f"C{number}", alpha=0.2, linewidth=0.8)
        axes.plot(range(1, len(curve) + 1), running_mean(curve), color=f"C{number}", label=name)
    axes.set(xlabel="step", ylabel="cross-entropy", ylim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)


def running_mean(curve: Sequence[float], keep: float = 0.95) -> list[float]:
    """The exponentially weighted mean at every step."""
    means, weighted, weight = [], 0.0, 0.0
    for value in curve:
        weighted, weight = keep * weighted + (1 - keep) * value, keep * weight + (1 - keep)
        means.append(weighted / weight)
    return means
