# SPDX-License-Identifier: BSD-3-Clause
from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from tiny_project import installed

from resnorm_ext import functional, selftest


@pytest.mark.smoke
def test_passes_here():
    command = [sys.executable, "-m", "resnorm_ext", "selftest", "--json", "--this-isa"]
    environment = installed() | {"RESNORM_CPU_ISA": "scalar"}
    run = subprocess.run(command, cwd="/", env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    report = json.loads(run.stdout)
    assert report["passed"] and {check["kernels"] for check in report["checks"]} == {"scalar"}
    assert {check["dtype"] for check in report["checks"]} == {"float64", "float32", "bfloat16", "float16"}
    assert len(report["checks"]) > 100 and all(0 <= check["error"] <= check["limit"] for check in report["checks"])


@pytest.fixture
def one_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selftest, "_OPERATORS", {"rms_norm": selftest._OPERATORS["rms_norm"]})
    monkeypatch.setattr(selftest, "checks_with", lambda isa: [])


def test_a_wrong_result_is_named_and_fails(one_operator, monkeypatch: pytest.MonkeyPatch, capsys):
    rms_norm = functional.rms_norm
    monkeypatch.setattr(functional, "rms_norm", lambda *arguments: rms_norm(*arguments) * 1.0001)
    assert selftest.main([]) == 1
    printed = capsys.readouterr().out
    assert "rms_norm, float32: error 0.0001, limit 1e-05" in printed and "FAILED" in printed
    assert "rms_norm, bfloat16" not in printed  # in which nobody can tell


@pytest.mark.parametrize("result", [float("nan"), None])
def test_what_gives_nothing_fails_and_does_not_hide_the_rest(one_operator, result, monkeypatch, capsys):
    def broken(x: torch.Tensor, *arguments: object) -> torch.Tensor:
        if result is None:
            raise RuntimeError("it is broken\nand more")
        return x * result

    monkeypatch.setattr(functional, "rms_norm", broken)
    assert selftest.main(["--this-isa"]) == 1
    printed = capsys.readouterr().out
    assert ("RuntimeError: it is broken" if result is None else "not finite") in printed and "and more" not in printed
    assert ": 12 of " in printed  # the encoder's
    selftest.main(["--this-isa", "--json"])
    assert "NaN" not in capsys.readouterr().out


def test_kernels_that_cannot_start_fail():
    (check,) = selftest.checks_with("no such set")
    assert not check.passed and "RESNORM_CPU_ISA" in check.reason
