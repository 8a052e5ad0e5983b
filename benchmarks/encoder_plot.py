# SPDX-License-Identifier: BSD-3-Clause
"""What the time of accelerated inference is made of, and how much of it the matrix products would take alone."""

from __future__ import annotations

from pathlib import Path

from matplotlib import rc_context
from matplotlib.figure import Figure

# Okabe and Ito's colours: told apart by everybody.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "0.6")


def plot(measured: dict[tuple[str, str], tuple[float, float, dict[str, float]]], title: str, path: Path) -> None:
    """An SVG of a stacked bar for each case: by names of the case, its seconds, those of its products alone, and the
    parts' shares of the first."""
    figure = Figure(figsize=(9, 0.9 + 0.45 * len(measured)), layout="constrained")
    axis = figure.subplots()
    for place, (seconds, products, parts) in enumerate(measured.values()):
        begin = 0.0
        for (part, share), colour in zip(parts.items(), COLOURS, strict=True):
            axis.barh(place, share * seconds, 0.7, begin, color=colour, label=part if place == 0 else None)
            begin += share * seconds
        limit = axis.plot([products] * 2, [place - 0.45, place + 0.45], color="black", linewidth=2)[0]
        axis.annotate(f" {products / seconds:.0%}", (seconds, place), va="center", fontsize=8)
    limit.set_label("the products alone, and their share of all")
    axis.set_yticks(range(len(measured)), [", ".join(names) for names in measured], fontsize=9)
    axis.invert_yaxis()
    axis.set_xlabel("seconds for 512 texts", fontsize=9)
    axis.set_xlim(0, 1.06 * max(seconds for seconds, _, _ in measured.values()))
    axis.spines[["top", "right"]].set_visible(False)
    axis.set_title(title, fontsize=8, loc="right")
    figure.legend(loc="outside upper left", ncols=5, frameon=False, fontsize=8)
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "resnorm_ext"}):
        figure.savefig(path, metadata={"Date": None})
