# SPDX-License-Identifier: BSD-3-Clause
"""The program behind make gpu-check, with commands that need no GPU."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import gpu_check
import pytest
from gpu_check import Stage

MACHINE = {"architecture": "9.0", "toolkit": "/nowhere", "gpu": "none"}


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def summary(out: Path) -> dict[str, str]:
    stages = json.loads((out / "summary.json").read_text())["stages"]
    return {stage["name"]: stage["status"] for stage in stages}


def test_stages_run_in_turn_and_a_failing_one_does_not_stop_the_rest(tmp_path: Path, capsys):
    plan = [
        Stage("first", python("import os; print(os.environ['GREETING'])"), 30, {"GREETING": "hello"}),
        Stage("second", python("import sys; sys.exit('wrong')"), 30),
        Stage("third", ["missing"], 30, skip="no such tool"),
        Stage("fourth", python("print('still here')"), 30),
    ]
    assert gpu_check.run(plan, tmp_path, MACHINE) == 1
    assert summary(tmp_path) == {"first": "passed", "second": "failed", "third": "skipped", "fourth": "passed"}
    logs = {path.stem: path.read_text() for path in tmp_path.glob("*.log")}
    assert logs == {"first": "hello\n", "second": "wrong\n", "fourth": "still here\n"}
    assert "no such tool" in capsys.readouterr().out
    assert gpu_check.run(plan[::3], tmp_path, MACHINE) == 0


def test_what_all_need_stops_the_rest(tmp_path: Path):
    plan = [Stage("build", python("raise SystemExit(3)"), 30, needed_by_all=True), Stage("tests", python(""), 30)]
    assert gpu_check.run(plan, tmp_path, MACHINE) == 1
    assert summary(tmp_path) == {"build": "failed", "tests": "not run"}


def test_a_time_limit_ends_a_stage_and_what_it_has_started(tmp_path: Path):
    child = "import os, time; print(os.getpid(), flush=True); time.sleep(60)"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    stage = Stage("slow", python(parent), 1)
    assert gpu_check.run([stage], tmp_path, MACHINE) == 1
    assert stage.status == "timed out" and stage.seconds < 20
    pid = int((tmp_path / "slow.log").read_text())
    assert_ends(pid)


def assert_ends(pid: int) -> None:
    for _ in range(100):
        state = Path(f"/proc/{pid}/stat")
        if not state.exists() or state.read_text().rsplit(")", 1)[1].split()[0] == "Z":
            return
        time.sleep(0.05)
    raise AssertionError(f"process {pid} is still there")


def test_a_cut_run_keeps_what_it_had_and_leaves_nothing_running(tmp_path: Path):
    code = f"""
import signal, sys
from pathlib import Path
import gpu_check
from gpu_check import Stage
signal.signal(signal.SIGTERM, lambda *_: sys.exit(5))
slow = "import os, time; print(os.getpid(), flush=True); time.sleep(60)"
plan = [Stage(n, [sys.executable, "-c", c], 50) for n, c in (("quick", ""), ("slow", slow), ("never", ""))]
gpu_check.run(plan, Path({str(tmp_path)!r}), {{}})
"""
    environment = os.environ | {"PYTHONPATH": str(Path(gpu_check.__file__).parent)}
    process = subprocess.Popen(python(code), env=environment, stdout=subprocess.DEVNULL)
    log = tmp_path / "slow.log"
    for _ in range(400):
        if log.exists() and log.read_text():
            break
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 5
    assert_ends(int(log.read_text()))
    assert summary(tmp_path) == {"quick": "passed", "slow": "cut", "never": "not run"}


def test_the_limits_fit_into_nine_minutes(tmp_path: Path):
    plan = gpu_check.stages(tmp_path, MACHINE)
    assert sum(stage.limit for stage in plan) <= 540
    assert [stage.name for stage in plan if stage.needed_by_all] == ["build"]
    assert plan[0].environment["TORCH_CUDA_ARCH_LIST"] == "9.0"


def test_compute_sanitizer_is_found_on_path_or_in_the_toolkit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PATH", str(tmp_path / "path"))
    assert gpu_check.find_sanitizer(tmp_path / "toolkit") is None
    skipped = [stage for stage in gpu_check.stages(tmp_path, MACHINE) if stage.skip]
    assert [stage.name for stage in skipped] == list(gpu_check.SANITIZERS)
    for folder in ("toolkit/compute-sanitizer", "toolkit/bin", "path"):
        program = tmp_path / folder / "compute-sanitizer"
        program.parent.mkdir(parents=True)
        program.touch(0o755)
        assert gpu_check.find_sanitizer(tmp_path / "toolkit") == str(program)


@pytest.mark.parametrize(
    ("machine", "message"),
    [
        ({"torch": "2.99.0+cpu", "cuda": None}, r"PyTorch 2.99.0\+cpu in .* is built without CUDA"),
        ({"torch": "2.99.0", "cuda": "99.0", "gpus": 0}, "there is no GPU that PyTorch 2.99.0 can use"),
        ({"torch": "2.99.0", "cuda": "99.0", "gpu": "X", "toolkit": "", "no_toolkit": "no nvcc"}, "no nvcc"),
    ],
)
def test_one_line_says_what_is_missing(machine, message, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(gpu_check, "PROBE", f"print({json.dumps(json.dumps(machine))})")
    with pytest.raises(SystemExit, match=f"gpu-check: {message}") as caught:
        gpu_check.main([str(tmp_path / "out")])
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()


def test_packages_that_are_missing_are_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(gpu_check, "NEEDED", ("pytest", "no_such_package"))
    with pytest.raises(SystemExit, match="lacks no_such_package; name another with PYTHON="):
        gpu_check.find_machine()
