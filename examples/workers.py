# SPDX-License-Identifier: BSD-3-Clause
"""A process for each NUMA node: on that node's CPUs alone, all at one socket, and none goes on where one ends."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from checkpoint import StopSignals

NODES = Path("/sys/devices/system/node")


def run_each(command: Sequence[str], listening: socket.socket, sets: Sequence[set[int]]) -> int:
    """``command`` on each of these sets of CPUs, told the socket that it inherits.

    Until a signal, which all are told of, or until one of them ends, and then all end.
    """
    with StopSignals() as stop, tempfile.TemporaryDirectory() as folder:
        workers = []
        for cpus in sets:
            with _pinned(cpus):
                workers.append(
                    subprocess.Popen(
                        [*command, "--socket", str(listening.fileno()), "--parent", str(os.getpid())],
                        pass_fds=[listening.fileno()],
                        env={**os.environ, "PROMETHEUS_MULTIPROC_DIR": folder},
                        # In a session of its own a terminal's Ctrl-C reaches it through here alone, as kill does.
                        start_new_session=True,
                    )
                )
        listening.close()  # or else it would go on taking connections when no worker does
        return _supervise(workers, stop)


def _supervise(workers: Sequence[subprocess.Popen], stop: StopSignals) -> int:
    while stop.received is None and all(worker.poll() is None for worker in workers):
        time.sleep(0.05)
    failed = [worker for worker in workers if worker.returncode is not None]
    stop.received = stop.received or signal.SIGTERM
    while any(worker.poll() is None for worker in workers):
        if stop.received is not None:
            for worker in workers:
                worker.terminate()  # also for Ctrl-C, at which one that is not ready yet would show a traceback
            stop.received = None
        time.sleep(0.05)
    failed = failed or [worker for worker in workers if worker.returncode not in (0, -signal.SIGTERM)]
    for worker in failed:
        print(f"serve: process {worker.pid} ended with exit code {worker.returncode}: all end", file=sys.stderr)
    return 1 if failed else 0


@contextlib.contextmanager
def _pinned(cpus: set[int]) -> Iterator[None]:
    """What is started meanwhile inherits these CPUs, so that PyTorch finds no others when it is imported."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cpus)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def numa_nodes() -> list[list[int]]:
    """The CPUs of each NUMA node that this process may use, of those nodes that have any."""
    allowed = os.sched_getaffinity(0)
    lists = [(folder / "cpulist").read_text() for folder in sorted(NODES.glob("node[0-9]*"))]
    nodes = [sorted(_cpus(each) & allowed) for each in lists]
    return [node for node in nodes if node] or [sorted(allowed)]


def _cpus(text: str) -> set[int]:
    """Of Linux's form for them, such as 0-3,8."""
    ranges = [part.partition("-") for part in text.strip().split(",") if part]
    return {cpu for first, _, last in ranges for cpu in range(int(first), int(last or first) + 1)}


def cpu_sets(nodes: Sequence[Sequence[int]], processes: int | None) -> list[set[int]]:
    """The CPUs of each process: a node's; of several nodes where there are fewer processes, else a part of a node's.

    Where a node has fewer CPUs than processes, these share them.
    """
    count = processes or len(nodes)
    if count <= len(nodes):
        return [set().union(*nodes[first::count]) for first in range(count)]
    sets = []
    for process in range(count):
        node, part = nodes[process % len(nodes)], process // len(nodes)
        parts = len(range(process % len(nodes), count, len(nodes)))
        sets.append(set(node[part::parts]) if parts <= len(node) else set(node))
    return sets
