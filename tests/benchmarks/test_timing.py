# SPDX-License-Identifier: BSD-3-Clause
"""The CPU's timer as it is, and CUDA's on a device that only keeps a log."""

from __future__ import annotations

import contextlib
import time
from types import SimpleNamespace

import pytest
import timing
import torch


def test_cpu_timer_takes_contenders_in_turn():
    log = []
    calls = {"a": lambda: log.append("a") or time.sleep(3e-3), "b": lambda: log.append("b") or time.sleep(5e-3)}
    measured = timing.CpuTimer(samples=4).measure(calls, 0)
    assert "".join(log).endswith("aabb" * 4)  # the first call of a sample is not timed
    assert 3e-3 <= measured["a"].seconds < measured["b"].seconds and measured["a"].samples == 4


def test_cpu_timer_stops_at_its_limit():
    measured = timing.CpuTimer(samples=100, seconds=0).measure({"a": lambda: time.sleep(1e-3)}, 0)
    assert measured["a"].samples == timing.MINIMUM_SAMPLES


def test_cpu_timer_counts_page_faults(monkeypatch: pytest.MonkeyPatch):
    """Of each contender by itself. What the system says is made up here: not every system counts them."""
    faults = 0

    def fault() -> None:
        nonlocal faults
        faults += 3
        time.sleep(3e-3)

    usage = SimpleNamespace(RUSAGE_SELF=0, getrusage=lambda who: SimpleNamespace(ru_minflt=faults))
    monkeypatch.setattr(timing, "resource", usage)
    measured = timing.CpuTimer(samples=1).measure({"faults": fault, "none": int}, 0)
    assert measured["faults"].page_faults == 3 and measured["none"].page_faults == 0


class FakeCuda:
    """What CudaTimer uses of torch.cuda, for a device on which every sample takes 8 µs."""

    def __init__(self, captures: bool):
        self.captures, self.log = captures, []

    def module(self) -> SimpleNamespace:
        nothing = lambda *arguments: None  # noqa: E731
        flush = SimpleNamespace(zero_=lambda: self.log.append("flush"))
        event = SimpleNamespace(
            record=lambda: self.log.append("event"), synchronize=nothing, elapsed_time=lambda end: 8e-3
        )
        cuda = SimpleNamespace(
            Stream=lambda: "stream",
            Event=lambda enable_timing: event,
            CUDAGraph=lambda: SimpleNamespace(replay=lambda: self.log.append("replay")),
            graph=self.graph,
            synchronize=nothing,
            get_device_properties=lambda device: SimpleNamespace(L2_cache_size=50 << 20),
        )
        return SimpleNamespace(cuda=cuda, empty=lambda *arguments, **options: flush, int8=torch.int8)

    @contextlib.contextmanager
    def graph(self, graph, stream):
        assert stream == "stream"
        self.log.append("capture")
        yield
        if not self.captures:
            raise RuntimeError("operation not permitted when stream is capturing\nand more")


@pytest.mark.parametrize("least_bytes, calls", [(1 << 10, 20), (1 << 30, 1)])
def test_cuda_timer_replays_a_graph_over_a_flushed_cache(monkeypatch: pytest.MonkeyPatch, least_bytes: int, calls: int):
    cuda = FakeCuda(captures=True)
    monkeypatch.setattr(timing, "torch", cuda.module())
    measured = timing.CudaTimer(samples=6).measure({"a": lambda: cuda.log.append("call")}, least_bytes)
    captured = cuda.log[cuda.log.index("capture") + 1 :]
    assert captured == ["call"] * calls + ["flush", "event", "replay", "event"] * (1 + 6)
    assert measured["a"].seconds == pytest.approx(8e-6 / calls) and measured["a"].host_seconds >= 0
    assert measured["a"].method == f"CUDA graph, calls in it: {calls}"


def test_cuda_timer_says_what_could_not_be_captured(monkeypatch: pytest.MonkeyPatch):
    cuda = FakeCuda(captures=False)
    monkeypatch.setattr(timing, "torch", cuda.module())
    measured = timing.CudaTimer(samples=5).measure({"a": lambda: cuda.log.append("call")}, 1 << 30)
    assert cuda.log[-4:] == ["flush", "event", "call", "event"]
    assert "eager" in measured["a"].method and "not permitted when stream is capturing" in measured["a"].method
    assert "and more" not in measured["a"].method
