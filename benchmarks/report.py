# SPDX-License-Identifier: BSD-3-Clause
"""Tables of kept results: what each goal asked for and what was measured, and every case beside its roof. In colours
where rich is installed, with plots where matplotlib is.

python benchmarks/report.py build/bench/*.jsonl --output build/bench
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path

from goals import Goal, goals_for
from norm_operations import Case
from results import COPY, OURS, Cell, Configuration, load

Rows = list[tuple[str, ...]]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="+", help="files of JSON lines")
    parser.add_argument("--output", type=Path, help="write report.md and the plots into this folder")
    parser.add_argument("--cases", action="store_true", help="show every case in the terminal too")
    options = parser.parse_args(arguments)
    configurations = [c for c in load(options.results) if c.environment["suite"] in ("norm", "activation")]
    document = ["# Results"]
    for configuration in configurations:
        title = configuration.title()
        document += ["", f"## {title}", ""]
        goals, cases = goal_rows(configuration), case_rows(configuration)
        if len(goals) > 1:
            show(title, goals)
            document += [*_markdown(goals), ""]
        if options.cases or len(goals) == 1:
            show(title, cases)
        if options.output:
            options.output.mkdir(parents=True, exist_ok=True)
            document += draw(configuration, options.output)
        document += _markdown(cases)
    if options.output:
        (options.output / "report.md").write_text("\n".join(document) + "\n", encoding="utf-8")
        print(f"report: {options.output / 'report.md'}")


def draw(configuration: Configuration, folder: Path) -> list[str]:
    """Lines for the report."""
    if find_spec("matplotlib") is None:
        return []
    from norm_plots import plot, plot_summary

    picture = folder / f"{_file_name(configuration)}.png"
    plot(configuration, picture)
    plot_summary(configuration, picture.with_suffix(".svg"))
    return [f"![Bandwidth of every contender]({picture.name})", ""]


def show(title: str, rows: Rows) -> None:
    if find_spec("rich") is None:
        print(title, *_markdown(rows), sep="\n")
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left", title_style="bold", header_style="dim")
    for index, name in enumerate(rows[0]):
        table.add_column(name, justify="right" if index else "left")
    styles = {"yes": "green", "no": "red"}
    for row in rows[1:]:
        table.add_row(*row, style=styles.get(row[-1]))
    # A terminal's width, or none where the output goes to a file.
    (Console() if sys.stdout.isatty() else Console(width=160)).print(table)


def goal_rows(configuration: Configuration) -> Rows:
    rows: Rows = [("goal", "asked", "measured", "cells", "reached")]
    for goal in goals_for(configuration):
        target, measured = goal.target_for(configuration), goal.measured(configuration)
        asked = f"{'≤' if goal.at_most else '≥'} {_figure(target, goal)}"
        verdict = {True: "yes", False: "no", None: "not measured"}[goal.reached(configuration)]
        rows.append((goal.what, asked, _figure(measured, goal), str(len(goal.read(configuration))), verdict))
    return rows


def case_rows(configuration: Configuration) -> Rows:
    """Every case: our time, its share of what the device's own copy reaches, and how much longer each peer takes."""
    cells = [cell for cell in configuration.cells if cell.least_bytes()]
    peers = [
        peer
        for peer in dict.fromkeys(name for cell in cells for name in cell.contenders())
        if peer not in (OURS, COPY) and any(cell.measured(peer) for cell in cells)
    ]
    eager_calls = configuration.environment["device"] == "cuda"
    last = ("eager call µs", "torch's") if eager_calls else ("page faults", "torch's")
    rows: Rows = [("case", "MB", "µs", "GB/s", "of copy", *peers, *last)]
    for cell in cells:
        rows.append(
            (
                str(Case(**cell.case)),
                f"{cell.least_bytes() / 1e6:.3g}",
                _number(cell.measured(OURS), 1e6),
                _number(cell.bandwidth(), 1e-9),
                _percent(cell.speedup(COPY)),
                *(_times(cell, peer) for peer in peers),
                *(
                    _number(cell.measured(name, "host_seconds"), 1e6)
                    if eager_calls
                    else _number(cell.measured(name, "page_faults"))
                    for name in (OURS, "torch")
                ),
            )
        )
    return rows


def _times(cell: Cell, peer: str) -> str:
    ratio = cell.speedup(peer)
    failed = any("failed" in run.get(peer, {}) for run in cell.runs.values())
    return f"{ratio:.2f}×" if ratio else "failed" if failed else "–"


def _number(value: float | None, scale: float = 1.0) -> str:
    return "–" if value is None else f"{value * scale:.3g}" if value * scale < 1000 else f"{value * scale:.0f}"


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{value:.0%}"


def _figure(value: float | None, goal: Goal) -> str:
    if value is None:
        return "–"
    number = f"{value:.2g}" if value < 1e-2 else f"{value:.2f}" if value < 100 else f"{value:.0f}"
    return f"{number}{'' if goal.unit == '×' else ' '}{goal.unit}".rstrip()


def _markdown(rows: Rows) -> Iterable[str]:
    header, *body = rows
    yield _line(header)
    yield _line(["---"] + ["---:"] * (len(header) - 1))
    yield from map(_line, body)


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _file_name(configuration: Configuration) -> str:
    e = configuration.environment
    settings = (
        (e["device"], e["hardware"]) if e["device"] == "cuda" else (e["device"], e["threads"], "threads", e["isa"])
    )
    parts = (e["suite"], *settings, "default-allocator" if e["allocator"] == "default" else "", e["commit"])
    return re.sub(r"[^a-z0-9_]+", "-", " ".join(map(str, parts)).lower()).strip("-")


if __name__ == "__main__":
    main()
