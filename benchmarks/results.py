# SPDX-License-Identifier: BSD-3-Clause
"""The one form in which results are kept: JSON lines, appended as they are measured.

A run opens with the line ``{"run": id, "suite": name, "environment": {...}}``; each of its results is a line
``{"run": id, "case": {...}, "contender": name, ...}`` with what was measured, or with why nothing was: ``"failed"``.
"""

from __future__ import annotations

import json
import math
import statistics
import uuid
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

OURS = "resnorm_ext"
COPY = "copy"  # the device's own copy of as many bytes as the case has to move: the roof

# What makes figures comparable: medians are taken over the runs that agree in all of these.
_CONFIGURATION = ("suite", "device", "hardware", "threads", "isa", "allocator", "torch", "commit")


class Results:
    """Appends one run to a file, line by line, so that a run cut short keeps what it had."""

    def __init__(self, path: Path | None, suite: str, environment: dict[str, object]):
        self.path, self.run = path, uuid.uuid4().hex[:12]
        if path:
            path.parent.mkdir(parents=True, exist_ok=True)
        self._append({"suite": suite, "environment": environment})

    def write(self, case: dict[str, object], contender: str, **measured: object) -> None:
        self._append({"case": case, "contender": contender, **measured})

    def _append(self, line: dict[str, object]) -> None:
        if self.path:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"run": self.run, **line}) + "\n")


@dataclass
class Cell:
    """One case in one configuration, with what each run measured of each contender."""

    case: dict[str, object]
    runs: dict[str, dict[str, dict]] = field(default_factory=dict)  # run -> contender -> what was measured

    def contenders(self) -> list[str]:
        return list(dict.fromkeys(name for run in self.runs.values() for name in run))

    def measured(self, contender: str, key: str = "seconds") -> float | None:
        """Median over the runs."""
        values = [run[contender][key] for run in self.runs.values() if run.get(contender, {}).get(key) is not None]
        return statistics.median(values) if values else None

    def speedup(self, peer: str, key: str = "seconds") -> float | None:
        """How many times as long the peer takes as we do, each ratio within one run."""
        ratios = [
            run[peer][key] / run[OURS][key]
            for run in self.runs.values()
            if run.get(peer, {}).get(key) and run.get(OURS, {}).get(key)
        ]
        return statistics.median(ratios) if ratios else None

    def least_bytes(self) -> int:
        """What the operation has to move: each input read once, each output written once."""
        return next((m["least_bytes"] for run in self.runs.values() for m in run.values() if "least_bytes" in m), 0)

    def bandwidth(self, contender: str = OURS) -> float | None:
        """Least bytes per second."""
        seconds = self.measured(contender)
        return self.least_bytes() / seconds if seconds else None


@dataclass
class Configuration:
    """All cells that one device with one set of settings has measured."""

    environment: dict[str, object]
    cells: list[Cell] = field(default_factory=list)

    def select(self, **case: object) -> list[Cell]:
        """The cells whose case agrees; a tuple, list or range holds alternatives."""
        return [cell for cell in self.cells if all(_agrees(cell.case.get(key), want) for key, want in case.items())]

    def title(self) -> str:
        e = self.environment
        parts = [str(e.get("hardware"))]
        if e.get("device") == "cpu":
            parts += [f"{e['threads']} thread" + "s" * (e["threads"] != 1), f"{e['isa']} (ATen {e['aten']})"]
            parts += ["allocator keeping its pages" if e["allocator"] == "kept" else "default allocator"]
        else:
            parts += [f"driver {e.get('driver')}", f"CUDA {e.get('cuda')}"]
        return ", ".join([*parts, f"PyTorch {e.get('torch')}", f"commit {e.get('commit')}"])


def load(paths: Iterable[Path]) -> list[Configuration]:
    configurations: dict[tuple, Configuration] = {}
    runs: dict[str, Configuration] = {}
    cells: dict[tuple[int, str], Cell] = {}
    for path in paths:
        for line in map(json.loads, path.read_text(encoding="utf-8").splitlines()):
            run = line.pop("run")
            if "environment" in line:
                environment = {"suite": line["suite"], **line["environment"]}
                key = tuple(environment.get(name) for name in _CONFIGURATION)
                runs[run] = configurations.setdefault(key, Configuration(environment))
                continue
            configuration, case, contender = runs[run], line.pop("case"), line.pop("contender")
            key = (id(configuration), json.dumps(case, sort_keys=True))
            if key not in cells:
                cells[key] = Cell(case)
                configuration.cells.append(cells[key])
            cells[key].runs.setdefault(run, {})[contender] = line
    return list(configurations.values())


def geometric_mean(values: Iterable[float]) -> float:
    return math.exp(statistics.fmean(map(math.log, values)))


def _agrees(value: object, want: object) -> bool:
    return value in want if isinstance(want, tuple | list | range) else value == want
