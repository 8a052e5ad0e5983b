# SPDX-License-Identifier: BSD-3-Clause
"""Two pictures of a configuration: of every case, a panel for each operation and dtype with bandwidth over bytes moved;
and of all cases of an operation together, how much longer each peer takes."""

from __future__ import annotations

from pathlib import Path

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import FormatStrFormatter, LogLocator, NullFormatter
from results import COPY, OURS, Cell, Configuration, geometric_mean

# Okabe and Ito's colours: told apart by everybody.
COLOURS = {
    OURS: "#D55E00",
    "torch": "#0072B2",
    "torch.compile": "#56B4E9",
    "onnxruntime": "#009E73",
    "oneDNN": "#CC79A7",
    "Liger": "#009E73",
    "QuACK": "#CC79A7",
    "flash-attn": "#E69F00",
}


def plot(configuration: Configuration, path: Path) -> None:
    panels = _panels(configuration)
    if not panels:
        return
    columns = min(3 if len(panels) <= 9 else 4, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(max(4.4 * columns, 9), 3.1 * rows + 0.9), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    lines = {}
    for axis, (title, cells) in zip(axes.flat, panels.items(), strict=False):
        lines |= _draw(axis, cells)
        axis.set_title(title, fontsize=10)
        # On the CPU the smallest and the largest case are three orders of magnitude apart.
        if configuration.environment["device"] == "cpu":
            _logarithmic(axis, "y")
        else:
            axis.set_ylim(bottom=0)
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    for axis in axes[:, 0]:
        axis.set_ylabel("GB/s")
    figure.suptitle(configuration.title(), fontsize=11)
    figure.legend(lines.values(), lines.keys(), loc="outside lower center", ncols=len(lines), frameon=False)
    figure.savefig(path, dpi=110)


def plot_summary(configuration: Configuration, path: Path) -> None:
    """An SVG, which is text and small: what a README shows."""
    groups = {title: _mean_speedups(cells) for title, cells in _panels(configuration).items()}
    peers = [peer for peer in COLOURS if any(peer in means for means in groups.values())]
    if not peers:
        return
    bars = [(title, peer, groups[title][peer]) for title in groups for peer in peers if peer in groups[title]]
    figure = Figure(figsize=(9, 0.8 + 0.21 * len(bars) + 0.18 * len(groups)), layout="constrained")
    axis = figure.subplots()
    heights, ticks, top = [], {}, 0.0
    for index, (title, _, _) in enumerate(bars):
        top += 1.0 if index and bars[index - 1][0] == title else 1.8
        heights.append(top)
        ticks.setdefault(title, []).append(top)
    lengths, colours = [length for _, _, length in bars], [COLOURS[peer] for _, peer, _ in bars]
    for label in axis.bar_label(axis.barh(heights, lengths, 0.86, color=colours), fmt=" %.2f×"):
        label.set_fontsize(8)
    axis.axvline(1.0, color="0.3", linewidth=1)
    axis.set_yticks([sum(places) / len(places) for places in ticks.values()], list(ticks), fontsize=9)
    axis.invert_yaxis()
    axis.set_xlim(0, 1.12 * max(lengths))
    axis.xaxis.set_major_formatter(FormatStrFormatter("%g×"))
    axis.set_xlabel(f"times as long as {OURS}, geometric mean over the cases", fontsize=9)
    axis.spines[["top", "right"]].set_visible(False)
    axis.set_title(configuration.title(), fontsize=8, loc="right")
    figure.legend(
        [Patch(color=COLOURS[peer]) for peer in peers], peers, loc="outside upper left", ncols=len(peers), frameon=False
    )
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": OURS}):
        figure.savefig(path, metadata={"Date": None})


def _mean_speedups(cells: list[Cell]) -> dict[str, float]:
    ratios = {peer: [ratio for cell in cells if (ratio := cell.speedup(peer))] for peer in COLOURS if peer != OURS}
    return {peer: geometric_mean(values) for peer, values in ratios.items() if values}


def _panels(configuration: Configuration) -> dict[str, list[Cell]]:
    """Cells by title. One with fewer parameters has no curve to belong to."""
    panels: dict[str, list[Cell]] = {}
    for cell in configuration.select(affine="both"):
        if cell.measured(COPY):
            case = cell.case
            dtypes = f"{case['dtype']} + {case['residual']}" if case["residual"] else case["dtype"]
            panels.setdefault(f"{case['operation']}, {dtypes}", []).append(cell)
    return {title: sorted(cells, key=Cell.least_bytes) for title, cells in panels.items()}


def _draw(axis: Axes, cells: list[Cell]) -> dict[str, object]:
    """The curves of one panel, by the name for the legend."""
    roof = _curve(cells, COPY)
    axis.fill_between(*roof, color="0.92")
    lines = {"the device's own copy of as many bytes": axis.plot(*roof, color="0.5", linestyle="--")[0]}
    for name, colour in COLOURS.items():
        if any(cell.measured(name) for cell in cells):
            width, layer = (2.2, 4) if name == OURS else (1.2, 3)
            curve = _curve(cells, name)
            lines[name] = axis.plot(*curve, color=colour, marker="o", ms=3, linewidth=width, zorder=layer)[0]
    axis.set_xlabel("MB that have to be moved")
    _logarithmic(axis, "x")
    axis.grid(alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)
    return lines


def _logarithmic(axis: Axes, direction: str) -> None:
    """With plain numbers: only powers of ten where there is no room for more."""
    axis.set(**{f"{direction}scale": "log"})
    low, high = axis.get_xlim() if direction == "x" else axis.get_ylim()
    ticks = axis.xaxis if direction == "x" else axis.yaxis
    ticks.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 50 * low else (1,)))
    ticks.set_major_formatter(FormatStrFormatter("%g"))
    ticks.set_minor_formatter(NullFormatter())


def _curve(cells: list[Cell], contender: str) -> tuple[list[float], list[float]]:
    measured = [cell for cell in cells if cell.measured(contender)]
    return [cell.least_bytes() / 1e6 for cell in measured], [cell.bandwidth(contender) / 1e9 for cell in measured]
