# SPDX-License-Identifier: BSD-3-Clause
"""How everything here is timed.

Contenders run in turn, one sample of each after the other, so that all meet the machine in the same state, and none the
caches of another; a figure is the median of its samples. A timer belongs to a device; all have the same interface.
"""

from __future__ import annotations

import contextlib
import resource
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import NamedTuple

import torch

Call = Callable[[], object]

MINIMUM_SAMPLES = 5


@dataclass(frozen=True)
class Measurement:
    seconds: float  # of one call
    samples: int
    method: str
    page_faults: float | None = None  # minor ones, of one call; CPU
    host_seconds: float | None = None  # until an eager call has returned, its kernels queued; CUDA

    def as_dict(self) -> dict[str, object]:
        """For a line of results, where digits that the next run changes would only take room."""
        measured = {name: value for name, value in asdict(self).items() if value is not None}
        return {name: float(f"{v:.5g}") if isinstance(v, float) else v for name, v in measured.items()}


class Sampler(NamedTuple):
    """Takes samples of one contender."""

    sample: Callable[[], float]  # seconds of one call
    details: dict[str, object]


class CpuTimer:
    """Wall-clock time of calls from Python."""

    SAMPLE_SECONDS = 2e-3  # a sample repeats a short call until it lasts this long

    def __init__(self, samples: int, seconds: float = 4.0):
        """After ``seconds`` a case gets no more samples than the least."""
        self.samples, self.seconds = samples, seconds

    def context(self) -> contextlib.AbstractContextManager:
        """Where contenders have to be made and measured."""
        return contextlib.nullcontext()

    def measure(self, contenders: dict[str, Call], least_bytes: int) -> dict[str, Measurement]:
        samplers = {name: self._sampler(call) for name, call in contenders.items()}
        return _in_turn(samplers, self.samples, self.seconds)

    def copy(self, bytes_moved: int) -> Call:
        """A plain copy that reads and writes ``bytes_moved`` in all: the roof of that size."""
        return _copy(bytes_moved, "cpu")

    def _sampler(self, call: Call) -> Sampler:
        for _ in range(3):
            call()
        repeats = max(1, round(self.SAMPLE_SECONDS / max(_wall_clock(call, 1), 1e-7)))
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        _wall_clock(call, repeats)
        faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

        def sample() -> float:
            call()  # not timed: the caches hold what the contender before has left
            return _wall_clock(call, repeats)

        return Sampler(sample, {"method": "wall clock", "page_faults": faults / repeats})


class CudaTimer:
    """Time on the device, without what the host spends on launching: events around the replay of a CUDA graph.

    The L2 cache is flushed before each sample. Calls that move very little are captured several times in one graph, or
    the events would be most of what is timed; all but the first of these find their input in the cache.
    """

    SMALL_BYTES, SMALL_CALLS = 1 << 22, 20
    # Writing this much also takes longer than queueing what follows, so that the device never waits for the host.
    FLUSH_BYTES = 1 << 28

    def __init__(self, samples: int, seconds: float = 2.0):
        self.samples, self.seconds = samples, seconds
        # Backward runs on its forward's stream, and only what is on the captured stream is captured.
        self._stream = torch.cuda.Stream()
        l2_bytes = torch.cuda.get_device_properties("cuda").L2_cache_size
        self._flush = torch.empty(max(2 * l2_bytes, self.FLUSH_BYTES), dtype=torch.int8, device="cuda")

    def context(self) -> contextlib.AbstractContextManager:
        return torch.cuda.stream(self._stream)

    def measure(self, contenders: dict[str, Call], least_bytes: int) -> dict[str, Measurement]:
        calls = self.SMALL_CALLS if least_bytes < self.SMALL_BYTES else 1
        samplers = {name: self._sampler(call, calls) for name, call in contenders.items()}
        return _in_turn(samplers, self.samples, self.seconds)

    def copy(self, bytes_moved: int) -> Call:
        return _copy(bytes_moved, "cuda")

    def _sampler(self, call: Call, calls: int) -> Sampler:
        for _ in range(3):
            call()
        torch.cuda.synchronize()
        host_seconds = statistics.median(_wall_clock(call, 1) for _ in range(20))
        torch.cuda.synchronize()
        try:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=self._stream):
                _repeat(call, calls)
            replay, method = graph.replay, f"CUDA graph, calls in it: {calls}"
        except RuntimeError as error:
            torch.cuda.synchronize()
            replay = lambda: _repeat(call, calls)  # noqa: E731
            method = f"events around {calls} eager calls, not to be captured: {str(error).splitlines()[0]}"
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

        def sample() -> float:
            self._flush.zero_()
            begin.record()
            replay()
            end.record()
            end.synchronize()
            return begin.elapsed_time(end) * 1e-3 / calls

        sample()  # the first replay uploads the graph
        return Sampler(sample, {"method": method, "host_seconds": host_seconds})


def timer_for(device: str, samples: int) -> CpuTimer | CudaTimer:
    return (CpuTimer if device == "cpu" else CudaTimer)(samples)


def _in_turn(samplers: dict[str, Sampler], samples: int, limit: float) -> dict[str, Measurement]:
    seconds: dict[str, list[float]] = {name: [] for name in samplers}
    began = time.perf_counter()
    for taken in range(samples):
        if taken >= MINIMUM_SAMPLES and time.perf_counter() - began > limit:
            break
        for name, sampler in samplers.items():
            seconds[name].append(sampler.sample())
    return {
        name: Measurement(statistics.median(values), len(values), **samplers[name].details)
        for name, values in seconds.items()
    }


def _copy(bytes_moved: int, device: str) -> Call:
    source = torch.randn(max(1, bytes_moved // 8), device=device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def _repeat(call: Call, times: int) -> None:
    for _ in range(times):
        call()


def _wall_clock(call: Call, repeats: int) -> float:
    began = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - began) / repeats
