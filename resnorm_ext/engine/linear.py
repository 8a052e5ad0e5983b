# SPDX-License-Identifier: BSD-3-Clause
"""Linear layers in inference by ATen, oneDNN or this package's kernel, whichever is the fastest, and weights in the
layout that it reads fastest.

oneDNN and this package's kernel multiply prepacked weights. A prepacked weight is a second copy of it, so a model's
linear layers take twice the memory.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from ..build.extension import extension, when_loaded


class LinearShape(NamedTuple):
    """A linear layer as far as its speed depends on it."""

    dtype: torch.dtype
    in_features: int
    out_features: int


def prepare_linear(
    *parameters: tuple[Tensor, Tensor | None], transposed: bool = False, dtype: torch.dtype | None = None
) -> extension.PreparedLinear:
    """The linear layer of ``(weight, bias)``, or of several with one input, whose outputs are to lie side by side.

    Args:
        parameters: on the CPU, all weights of one dtype and in_features: ``(out_features, in_features)``, or where
            ``transposed`` the other way round. Of several layers all or none have a bias.
        dtype: what is multiplied; the weights' where None.
    """
    weights, biases = zip(*parameters, strict=True)
    return extension.prepare_linear(weights, biases, transposed, weights[0].dtype if dtype is None else dtype)


def choose_backends(shapes: Iterable[LinearShape]) -> None:
    """Measures, for shapes not measured yet in this process, which backend is the fastest one, and uses that.

    One choice for all of ``shapes`` that have one dtype; half-precision ones are multiplied in float32 where that is
    faster (``product_dtype``). Measures nothing where ``RESNORM_LINEAR`` decides, under deterministic algorithms, or
    where only ATen can do it.
    """
    if extension.linear_backend_override() or torch.are_deterministic_algorithms_enabled():
        return
    unmeasured = set(shapes) - _seconds.keys()
    for dtype in {shape.dtype for shape in unmeasured}:
        alike = [shape for shape in unmeasured if shape.dtype == dtype]
        if dtype in _HALVES:
            choose_backends(shape._replace(dtype=torch.float32) for shape in alike)
        elif len(extension.linear_backends(dtype)) == 1:
            continue
        times = _times(alike, extension.linear_backends(dtype))
        backend = min(times, key=times.__getitem__)
        for shape in alike:
            extension.set_linear_backend(*shape, backend)
            _seconds[shape] = times[backend]


def product_dtype(shapes: Iterable[LinearShape]) -> torch.dtype:
    """What to multiply in, for layers with these weights, of one dtype: float32 where the CPU has no fast products of
    the half-precision one that they have."""
    shapes = list(shapes)
    singles = [shape._replace(dtype=torch.float32) for shape in shapes]
    if shapes[0].dtype in _HALVES and all(shape in _seconds for shape in (*shapes, *singles)):
        if sum(_seconds[shape] for shape in singles) < sum(_seconds[shape] for shape in shapes):
            return torch.float32
    return shapes[0].dtype


def _measured_product_dtype(shapes: list[tuple]) -> torch.dtype:
    """What the engine asks where an operator prepares layers by itself."""
    shapes = [LinearShape(*shape) for shape in shapes]
    choose_backends(shapes)
    return product_dtype(shapes)


when_loaded(lambda extension: extension.set_linear_measurement(_measured_product_dtype))

_HALVES = (torch.bfloat16, torch.float16)
_seconds: dict[LinearShape, float] = {}  # that the chosen backend takes, in the mean over shapes measured together
_MEASURED_ROWS = (16, 256)  # a sentence, a batch
_MEASUREMENTS = 5
_TOO_SLOW = 0.02  # seconds for one product that are measured but once


@torch.no_grad()
def _times(shapes: Iterable[LinearShape], backends: list[str]) -> dict[str, float]:
    """Each backend's seconds, as the geometric mean over shapes and rows."""
    log_times = dict.fromkeys(backends, 0.0)
    generator = torch.Generator("cpu")  # the caller's random numbers stay as they are
    count = 0
    for dtype, in_features, out_features in shapes:
        weight = torch.randn(out_features, in_features, generator=generator, device="cpu").to(dtype)
        bias = torch.zeros(out_features, dtype=dtype, device="cpu")
        linears = [extension.PreparedLinear(weight, bias, backend) for backend in backends]
        for rows in _MEASURED_ROWS:
            x = torch.randn(rows, in_features, generator=generator, device="cpu").to(dtype)
            times = _shortest_times(*(partial(linear, x) for linear in linears))
            count += 1
            for backend, seconds in zip(backends, times, strict=True):
                log_times[backend] += math.log(seconds)
    return {backend: math.exp(log_time / count) for backend, log_time in log_times.items()}


def _shortest_times(*functions: Callable[[], object]) -> list[float]:
    """Seconds that each function takes, taken in turns so that a disturbance meets all of them."""
    times = [_time(function) for function in functions]  # the first call warms up
    repeated = [i for i, seconds in enumerate(times) if seconds < _TOO_SLOW]
    for i in repeated:
        times[i] = math.inf
    for _ in range(_MEASUREMENTS):
        for i in repeated:
            times[i] = min(times[i], _time(functions[i]))
    return times


def _time(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start
