# SPDX-License-Identifier: BSD-3-Clause
from __future__ import annotations

import subprocess
import sys
from pathlib import Path

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "bench_activation.py"


def test_results_are_written_and_reported(tmp_path: Path):
    output = tmp_path / "activation.jsonl"
    command = [sys.executable, BENCHMARK, "--only", "relu, float32, 1×1536", "--samples", "1", "--output", output]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr

    import report  # needs what the smoke tests' environment lacks

    report.main([str(output), "--output", str(tmp_path)])
    document = (tmp_path / "report.md").read_text()
    assert "| bias + relu, float32, 1×1536 | 0.0184 |" in document
