# SPDX-License-Identifier: BSD-3-Clause
"""Two processes under torchrun: the curve of one, and no hang whatever ends them."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import checkpoint
import distributed
import parallel
import psutil
import pytest
import text_classification


def launch(arguments: list[str]) -> subprocess.Popen:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([*command, distributed.__file__, *arguments], **pipes)


def after_a_step(process: subprocess.Popen, folder: Path) -> subprocess.Popen:
    """Once a checkpoint is there, which ``--save-every 1`` writes after each step."""
    for _ in range(6000):
        if (folder / "accelerated" / "checkpoint.pt").exists():
            break
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    return process


def losses(folder: Path) -> list[float]:
    return json.loads((folder / "accelerated" / "result.json").read_text())["losses"]


@pytest.fixture
def curve(arguments, tmp_path: Path) -> list[float]:
    """That of text_classification.py."""
    folder = tmp_path / "one"
    command = arguments("--only", "accelerated", "--output", folder, "--limit", 48, "--dropout", 0)
    assert text_classification.main(command) == 0
    return losses(folder)


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_the_curve_of_one_process_stopped_and_resumed(arguments, tmp_path: Path, curve: list[float], kind: str):
    folder = tmp_path / "two"
    command = arguments("--output", folder, "--limit", 48, "--dropout", 0, "--parallel", kind, "--save-every", 1)
    process = after_a_step(launch(command), folder)
    process.terminate()
    _, errors = process.communicate(timeout=120)
    done = len(checkpoint.load(folder / "accelerated" / "checkpoint.pt")["run"]["losses"])
    assert process.returncode and f"stopped by SIGTERM after step {done};" in errors
    assert 1 <= done < len(curve)

    process = launch([*command, "--resume"])
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert losses(folder) == pytest.approx(curve, abs=1e-5)


def test_a_worker_that_dies_ends_the_run(arguments, tmp_path: Path):
    process = after_a_step(launch(arguments("--output", tmp_path, "--epochs", 500, "--save-every", 1)), tmp_path)
    workers = psutil.Process(process.pid).children()
    assert len(workers) == 2
    workers[1].kill()
    _, errors = process.communicate(timeout=60)
    assert process.returncode and f"exitcode  : {-signal.SIGKILL} (pid: {workers[1].pid})" in errors
    assert not workers[0].is_running()


def test_one_process_without_torchrun(arguments, tmp_path: Path, capsys):
    assert distributed.main(arguments("--epochs", 1)) == 0
    assert "processes: 1, on cpu" in capsys.readouterr().out
    assert len(losses(tmp_path)) == 7


def test_a_checkpoint_of_other_processes_is_refused(arguments, tmp_path: Path, capsys):
    assert distributed.main(arguments("--epochs", 1)) == 0
    path = tmp_path / "accelerated" / "checkpoint.pt"
    state = checkpoint.load(path)
    checkpoint.save(path, {**state, "random": state["random"] * 2})
    assert distributed.main(arguments("--epochs", 1, "--resume")) == 1
    assert f"{path} does not fit this model: it is of 2 processes, and these are 1" in capsys.readouterr().err


def test_batches_that_cannot_be_shared_are_refused(arguments, monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.setattr(parallel, "world", lambda: (3, 0))
    assert distributed.main(arguments()) == 1
    assert "expected --batch-size to be a multiple of 3 processes, but got 8" in capsys.readouterr().err
