# SPDX-License-Identifier: BSD-3-Clause
from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "bench_attention.py"


def test_results_are_checked_and_written(tmp_path: Path):
    output = tmp_path / "attention.jsonl"
    command = [sys.executable, BENCHMARK, "--samples", "1", "--output", output]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    header, *lines = map(json.loads, output.read_text().splitlines())
    assert header["suite"] == "attention" and len(lines) == 8
    assert all(line["seconds"] > 0 for line in lines)
