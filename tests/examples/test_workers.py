# SPDX-License-Identifier: BSD-3-Clause
from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import workers
from checkpoint import StopSignals


def test_nodes_are_read_as_linux_writes_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(workers, "NODES", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2, 5, 8})
    assert workers.numa_nodes() == [[0, 1, 2, 5, 8]]
    for name, cpus in {"node0": "0-1,4,8-9\n", "node1": "2-3,5-7\n", "node2": "\n", "node3": "10\n"}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "cpulist").write_text(cpus)
    assert workers.numa_nodes() == [[0, 1, 8], [2, 5]]  # node2 has memory alone, and node3 is for others


def test_processes_share_out_the_nodes():
    nodes = [[0, 1, 2], [3, 4, 5]]
    assert workers.cpu_sets(nodes, None) == [{0, 1, 2}, {3, 4, 5}]
    assert workers.cpu_sets(nodes, 1) == [{0, 1, 2, 3, 4, 5}]
    assert workers.cpu_sets(nodes, 3) == [{0, 2}, {3, 4, 5}, {1}]
    assert workers.cpu_sets([[0, 1]], 2) == [{0}, {1}]
    assert workers.cpu_sets([[0, 1]], 3) == [{0, 1}] * 3


def test_this_machine_s_nodes():
    assert sorted(cpu for node in workers.numa_nodes() for cpu in node) == sorted(os.sched_getaffinity(0))


def worker(code: str) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-c", f"import signal, time\n{code}"], stdout=subprocess.PIPE)


WAITS = "signal.signal(signal.SIGTERM, lambda *_: exit(0))\nprint('ready', flush=True)\ntime.sleep(60)"


@pytest.mark.parametrize(("code", "shown"), [("exit(3)", "3"), ("exit(0)", "0"), ("signal.raise_signal(9)", "-9")])
def test_a_worker_that_ends_ends_all(capsys, code: str, shown: str):
    other = worker(WAITS)
    other.stdout.readline()
    ended = worker(code)
    with StopSignals() as stop:
        assert workers._supervise([other, ended], stop) == 1
    assert other.returncode == 0
    assert capsys.readouterr().err == f"serve: process {ended.pid} ended with exit code {shown}: all end\n"
