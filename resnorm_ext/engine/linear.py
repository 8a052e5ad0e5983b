# SPDX-License-Identifier: BSD-3-Clause
"""Linear layers in inference by ATen, oneDNN or this package's kernel, whichever is the fastest, and weights in the
layout that it reads fastest.

oneDNN and this package's kernel multiply packed weights. A packed weight is a second copy of it (so a model's linear
layers take twice the memory), kept here and not in the modules, whose deepcopy, pickling and state_dict know nothing of
it. It goes when its parameter goes, and is made anew when the parameter has changed.
"""

from __future__ import annotations

import math
import time
import weakref
from collections.abc import Callable, Iterable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from .._extension import extension


class LinearShape(NamedTuple):
    """A linear layer as far as its speed depends on it."""

    dtype: torch.dtype
    in_features: int
    out_features: int


class _Entry(NamedTuple):
    prepared: extension.PreparedLinear
    fingerprint: int
    # Kept alive, so that no other parameter can come to lie where these lay and be taken for them.
    storages: tuple[torch.UntypedStorage, ...]
    sources: tuple[weakref.ref, ...]


_entries: dict[tuple[int, ...], _Entry] = {}
_generation = 0


def generation() -> int:
    """Grows whenever something is forgotten: what was made of parameters before is to be made anew."""
    return _generation


def prepare_linear(*parameters: tuple[Tensor, Tensor | None], transposed: bool = False) -> extension.PreparedLinear:
    """The linear layer of ``(weight, bias)``, or of several with one input, whose outputs are to lie side by side.

    All weights are on the CPU and of one dtype and in_features: ``(out_features, in_features)``, or where
    ``transposed`` the other way round. Of several layers all or none have a bias.
    """
    weight, _ = parameters[0]
    in_dim, out_dim = (0, 1) if transposed else (1, 0)
    out_features = sum(weight.size(out_dim) for weight, _ in parameters)
    backend = extension.linear_backend(weight.dtype, weight.size(in_dim), out_features)
    if len(parameters) == 1 and (backend == "aten" or weight.is_inference()):
        return _prepare(parameters, transposed, "aten")
    tensors = [tensor for pair in parameters for tensor in pair if tensor is not None]
    if any(tensor.is_inference() for tensor in tensors):  # they count no versions: their changes would go unnoticed
        return _prepare(parameters, transposed, "aten")

    key = (*map(id, tensors), transposed)
    fingerprint = extension.weight_fingerprint(tensors)
    entry = _entries.get(key)
    if entry is None or entry.fingerprint != fingerprint or entry.prepared.backend != backend:
        entry = _entries[key] = _Entry(
            _prepare(parameters, transposed, backend),
            fingerprint,
            tuple(tensor.untyped_storage() for tensor in tensors),
            tuple(weakref.ref(tensor, lambda _: _entries.pop(key, None)) for tensor in tensors),
        )
    return entry.prepared


def _prepare(
    parameters: tuple[tuple[Tensor, Tensor | None], ...], transposed: bool, backend: str
) -> extension.PreparedLinear:
    weights, biases = zip(*parameters, strict=True)
    weights = [weight.detach().t() if transposed else weight.detach() for weight in weights]
    weight = weights[0] if len(weights) == 1 else torch.cat(weights)
    bias = biases[0]
    if bias is not None:  # detached, as the weights are: a parameter that is held here would never go
        bias = bias.detach() if len(biases) == 1 else torch.cat([bias.detach() for bias in biases])
    return extension.PreparedLinear(_pack(weight, backend), bias, backend, weight.size(0))


def _pack(weight: Tensor, backend: str) -> Tensor:
    if backend == "resnorm":
        return extension.packed_linear_pack_weight(weight)
    return extension.onednn_pack_weight(weight) if backend == "onednn" else weight


def forget_linears(parameters: Iterable[Tensor]) -> None:
    """Frees what is kept for any of ``parameters``."""
    global _generation
    _generation += 1
    forgotten = set(map(id, parameters))
    for key in [key for key in list(_entries) if not forgotten.isdisjoint(key)]:
        _entries.pop(key, None)


def available_backends(dtype: torch.dtype) -> list[str]:
    """Those that multiply in ``dtype`` on this machine."""
    supported = {"onednn": extension.onednn_supports, "resnorm": extension.packed_linear_supports}
    return ["aten", *(name for name, supports in supported.items() if supports(dtype))]


def choose_backends(shapes: Iterable[LinearShape]) -> None:
    """Measures, for shapes not measured yet in this process, which backend is the fastest one, and uses that.

    One choice for all of ``shapes`` that have one dtype. Measures nothing where ``RESNORM_LINEAR`` decides, under
    deterministic algorithms, or where only ATen can do it.
    """
    if extension.linear_backend_override() or torch.are_deterministic_algorithms_enabled():
        return
    unmeasured = set(shapes) - _measured
    for dtype in {shape.dtype for shape in unmeasured}:
        backends = available_backends(dtype)
        if len(backends) > 1:
            alike = [shape for shape in unmeasured if shape.dtype == dtype]
            backend = _fastest_backend(alike, backends)
            for shape in alike:
                extension.set_linear_backend(*shape, backend)
            _measured.update(alike)


_measured: set[LinearShape] = set()
_MEASURED_ROWS = (16, 256)  # a sentence, a batch
_MEASUREMENTS = 5


@torch.no_grad()
def _fastest_backend(shapes: Iterable[LinearShape], backends: list[str]) -> str:
    """By the geometric mean of their times."""
    log_times = dict.fromkeys(backends, 0.0)
    generator = torch.Generator("cpu")  # the caller's random numbers stay as they are
    for dtype, in_features, out_features in shapes:
        weight = torch.randn(out_features, in_features, generator=generator, device="cpu").to(dtype)
        bias = torch.zeros(out_features, dtype=dtype, device="cpu")
        linears = []
        for backend in backends:
            linears.append(extension.PreparedLinear(_pack(weight, backend), bias, backend, out_features))
        for rows in _MEASURED_ROWS:
            x = torch.randn(rows, in_features, generator=generator, device="cpu").to(dtype)
            times = _shortest_times(*(partial(linear, x) for linear in linears))
            for backend, seconds in zip(backends, times, strict=True):
                log_times[backend] += math.log(seconds)
    return min(log_times, key=log_times.__getitem__)


def _shortest_times(*functions: Callable[[], object]) -> list[float]:
    """Seconds that each function takes, taken in turns so that a disturbance meets all of them."""
    times = [math.inf] * len(functions)
    for function in functions:
        function()
    for _ in range(_MEASUREMENTS):
        for i, function in enumerate(functions):
            start = time.perf_counter()
            function()
            times[i] = min(times[i], time.perf_counter() - start)
    return times
