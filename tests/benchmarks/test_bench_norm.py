# SPDX-License-Identifier: BSD-3-Clause
from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from norm_contenders import contenders
from norm_operations import OPERATIONS, Case, check, make_inputs, output_names
from results import OURS

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def bench_norm(*arguments: object) -> str:
    command = [sys.executable, str(BENCHMARKS / "bench_norm.py"), *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=BENCHMARKS.parent)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_results_are_written_and_reported(tmp_path: Path, capsys: pytest.CaptureFixture):
    output = tmp_path / "norm.jsonl"
    options = ("--quick", "--only", "bfloat16, 1×768$", "--threads", 1, "--samples", 1, "--output", output)
    printed = bench_norm(*options)
    assert printed.count("µs") == len(OPERATIONS)

    header, *lines = map(json.loads, output.read_text().splitlines())
    environment = header["environment"]
    assert (header["suite"], environment["device"], environment["allocator"]) == ("norm", "cpu", "kept")
    assert environment["threads"] == 1 and environment["torch"] == str(torch.__version__)
    assert {line["run"] for line in lines} == {header["run"]}
    rows = [line for line in lines if line["case"]["operation"] == "accuracy"]
    assert {line["contender"] for line in rows} == {OURS, "torch"} and all(line["rms_error"] >= 0 for line in rows)
    timed = [line for line in lines if line not in rows]
    assert {line["case"]["operation"] for line in timed} == set(OPERATIONS)
    assert {OURS, "torch", "copy"} <= {line["contender"] for line in timed}
    for line in timed:
        assert line["seconds"] > 0 and line["samples"] == 1 and line["page_faults"] >= 0 and line["least_bytes"] > 0
        assert line["contender"] == "copy" or max(line["errors"].values()) < 0.3

    stopped = bench_norm(*options, "--time-limit", 0)
    assert f"0 of {len(OPERATIONS)} cases" in stopped

    import report  # needs what the smoke tests' environment lacks

    report.main([str(output), "--output", str(tmp_path)])
    printed = capsys.readouterr().out
    if environment["isa"] == "avx2":  # which has goals of its own
        assert "AVX2 forward" in printed and "AVX2 backward" in printed
    else:
        assert "whole call at 1×768 float32" in printed and "not measured" in printed
    (picture,) = tmp_path.glob("*.png")
    assert picture.read_bytes().startswith(b"\x89PNG") and picture.name in (tmp_path / "report.md").read_text()


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("contender", [OURS, "torch"])
def test_one_wrong_row_is_noticed(operation: str, contender: str):
    case = Case(operation, "bfloat16", 40, 256)
    inputs = make_inputs(case, "cpu")
    with torch.set_grad_enabled(OPERATIONS[operation].training):
        bind = contenders(case, "cpu", inputs.gradients)[contender]
        outputs = bind(*inputs.arguments(OPERATIONS[operation]))()
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    assert tuple(check(case, inputs, outputs)) == output_names(case)
    for wrong in (float("nan"), 100.0):
        broken = outputs[0].detach().clone()
        broken[17, 5] = wrong
        with pytest.raises(ValueError, match="is wrong"):
            check(case, inputs, (broken, *outputs[1:]))


def test_least_bytes():
    rows, columns = 10, 64
    elements = rows * columns
    assert Case("layer_norm", "float32", rows, columns).least_bytes() == 4 * (2 * elements + 2 * columns)
    assert Case("layer_norm", "float32", rows, columns, affine="neither").least_bytes() == 4 * 2 * elements
    assert Case("layer_norm backward", "bfloat16", rows, columns).least_bytes() == 2 * (3 * elements + 3 * columns)
    mixed = Case("add_layer_norm with sum", "bfloat16", rows, columns, residual="float32")
    assert mixed.least_bytes() == (2 + 4 + 2 + 4) * elements + 4 * 2 * columns
