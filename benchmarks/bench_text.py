# SPDX-License-Identifier: BSD-3-Clause
"""MiniLM on 512 real texts by every engine for BERT on a CPU: in arrival order, sorted by length, and one at a time.

python benchmarks/bench_text.py --output build/bench/text.jsonl
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from importlib.util import find_spec
from pathlib import Path

from harness import environment, parser, start
from results import OURS, Results
from rich.console import Console
from rich.table import Table
from text_engines import ENGINES, ORIGINAL

DTYPES = ("float32", "bfloat16")
LARGEST_ERROR = {"float32": 1e-4, "bfloat16": 0.5}  # beyond it an engine does something else


def main() -> int:
    options = parser(__doc__)
    options.set_defaults(allocator="default")  # as in service
    options.add_argument("--rounds", type=int, default=3, help="of all engines; figures are medians over them")
    options.add_argument("--dtypes", nargs="+", choices=DTYPES, default=DTYPES)
    options.add_argument("--engines", nargs="+", choices=ENGINES, default=list(ENGINES))
    options = start(options.parse_args())
    results = Results(options.output, "text", environment(options))
    engines = [ORIGINAL, *(name for name in options.engines if name != ORIGINAL and find_spec(ENGINES[name][1]))]
    seconds: dict[tuple[str, str], dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    details: dict[tuple[str, str], tuple[float, float]] = {}  # largest difference, MiB
    failed = False
    with tempfile.TemporaryDirectory() as directory:
        for _ in range(options.rounds):
            for dtype in dict.fromkeys(("float32", *options.dtypes)):
                for engine in engines:
                    if dtype not in options.dtypes and engine != ORIGINAL:
                        continue
                    answer = _ask(engine, dtype, options.threads, Path(directory, "reference.pt"))
                    case = {"operation": "encode", "model": "MiniLM", "dtype": dtype}
                    if "failed" in answer:
                        print(f"{engine}, {dtype} failed: {answer['failed']}", file=sys.stderr)
                        results.write(case, engine, failed=answer["failed"])
                        failed |= engine == OURS
                        continue
                    details[engine, dtype] = answer["error"]["largest"], answer["peak_mib"]
                    measured = {name: answer[name] for name in ("peak_mib", "error")}
                    for texts, value in answer["seconds"].items():
                        results.write({**case, "texts": texts}, engine, seconds=value, **measured)
                        seconds[engine, dtype][texts].append(value)
    _print(seconds, details)
    return failed


def _ask(engine: str, dtype: str, threads: int, reference: Path) -> dict:
    worker = str(Path(__file__).with_name("text_worker.py"))
    settings = ["--dtype", dtype, "--threads", str(threads), "--reference", str(reference)]
    ran = subprocess.run([sys.executable, worker, engine, *settings], stdout=subprocess.PIPE, text=True)
    if ran.returncode:
        return {"failed": f"its process ended with {ran.returncode}"}
    answer = json.loads(ran.stdout.splitlines()[-1])
    if "error" in answer and not answer["error"]["largest"] <= LARGEST_ERROR[dtype]:
        return {"failed": f"its output is off by {answer['error']['largest']:.2g}"}
    return answer


def _print(
    seconds: dict[tuple[str, str], dict[str, list[float]]], details: dict[tuple[str, str], tuple[float, float]]
) -> None:
    """Medians of the rounds: our seconds, and how many times as long the others take."""
    medians = {
        key: {texts: statistics.median(values) for texts, values in measured.items()}
        for key, measured in seconds.items()
    }
    for dtype in dict.fromkeys(dtype for _, dtype in medians):
        best = medians.get((OURS, dtype))
        if best is None:
            continue
        table = Table(title=f"MiniLM, {dtype}: seconds, and times ours", title_justify="left")
        for column in ("engine", *best, "largest difference", "peak MiB"):
            table.add_column(column, justify="left" if column == "engine" else "right")
        for (engine, of), measured in medians.items():
            if of == dtype:
                cells = (f"{value:.4g} ({value / best[texts]:.2f}×)" for texts, value in measured.items())
                largest, mib = details[engine, dtype]
                table.add_row(engine, *cells, f"{largest:.1e}", f"{mib:.0f}")
        Console().print(table)


if __name__ == "__main__":
    sys.exit(main())
