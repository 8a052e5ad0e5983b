# SPDX-License-Identifier: BSD-3-Clause
"""Shows an installation to work on this machine: every operator and an encoder, forward and backward, in every dtype,
against formulas in float64; on the CPU with the kernels of every instruction set that it has, and on each GPU."""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import functional, reference
from .build.extension import load_extension
from .integrations import accelerate

# Largest error, relative to the norm of the right result; a gradient of a sum over rows adds up as many roundings.
_LIMITS = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1.5e-2, torch.float16: 2e-3}
_EPS = 1e-5
_DROPOUT = {"dropout_p": 0.25, "training": True}

Inputs = dict[str, Tensor]
Call = Callable[..., Tensor]


@dataclass(frozen=True)
class Check:
    """What was compared, and how far apart it was; ``error`` is None where it could not be computed at all."""

    name: str
    device: str
    kernels: str
    dtype: str
    error: float | None
    limit: float
    reason: str = ""

    @property
    def passed(self) -> bool:
        return self.error is not None and self.error <= self.limit


def _norm_shapes(*names: str) -> dict[str, tuple[int, ...]]:
    return {name: (37, 200) if name in ("input", "residual") else (200,) for name in names}


# Name: the shapes of the inputs, the operator and the formula. Rows are not a whole number of vectors.
_OPERATORS: dict[str, tuple[dict[str, tuple[int, ...]], Call, Call]] = {
    "layer_norm": (
        _norm_shapes("input", "weight", "bias"),
        lambda seed, **i: functional.layer_norm(i["input"], (200,), i["weight"], i["bias"], _EPS),
        lambda seed, **i: reference.layer_norm(i["input"], (200,), i["weight"], i["bias"], _EPS),
    ),
    "rms_norm": (
        _norm_shapes("input", "weight"),
        lambda seed, **i: functional.rms_norm(i["input"], (200,), i["weight"], _EPS),
        lambda seed, **i: reference.rms_norm(i["input"], (200,), i["weight"], _EPS),
    ),
    "residual_add": (
        _norm_shapes("input", "residual", "input_bias"),
        lambda seed, **i: functional.residual_add(**i, seed=seed, **_DROPOUT),
        lambda seed, **i: reference.residual_add(**i, seed=seed, dropout_p=_DROPOUT["dropout_p"]),
    ),
    "add_layer_norm": (
        _norm_shapes("input", "residual", "weight", "bias", "input_bias"),
        lambda seed, **i: torch.cat(
            functional.add_layer_norm(normalized_shape=(200,), **i, seed=seed, **_DROPOUT, prenorm=True)
        ),
        lambda seed, **i: torch.cat(
            reference.add_layer_norm(normalized_shape=(200,), **i, seed=seed, dropout_p=_DROPOUT["dropout_p"])[:2]
        ),
    ),
    "add_rms_norm": (
        _norm_shapes("input", "residual", "weight"),
        lambda seed, **i: torch.cat(
            functional.add_rms_norm(normalized_shape=(200,), eps=_EPS, **i, seed=seed, **_DROPOUT, prenorm=True)
        ),
        lambda seed, **i: torch.cat(
            reference.add_rms_norm(normalized_shape=(200,), eps=_EPS, **i, seed=seed, dropout_p=_DROPOUT["dropout_p"])[
                :2
            ]
        ),
    ),
    "bias_activation": (
        _norm_shapes("input", "bias"),
        lambda seed, **i: functional.bias_activation(**i, activation="gelu"),
        lambda seed, **i: reference.bias_activation(**i, activation="gelu"),
    ),
    "linear": (
        {"input": (37, 200), "weight": (72, 200), "bias": (72,)},
        lambda seed, **i: functional.linear(**i, activation="relu"),
        lambda seed, **i: F.relu(F.linear(**i)),
    ),
    "feed_forward": (
        {"input": (37, 72), "weight1": (200, 72), "bias1": (200,), "weight2": (72, 200), "bias2": (72,)},
        lambda seed, **i: functional.feed_forward(*i.values(), activation="gelu"),
        lambda seed, **i: F.linear(F.gelu(F.linear(i["input"], i["weight1"], i["bias1"])), i["weight2"], i["bias2"]),
    ),
    "packed_attention": (
        {"qkv": (37, 3, 2, 32)},
        lambda seed, qkv: functional.packed_attention(qkv, _bounds(qkv), causal=True),
        lambda seed, qkv: reference.packed_attention(qkv, _bounds(qkv), causal=True),
    ),
}


def _bounds(qkv: Tensor) -> Tensor:
    return torch.tensor([0, 20, 21, 37], dtype=torch.int32, device=qkv.device)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m resnorm_ext selftest", description=__doc__)
    parser.add_argument("--json", action="store_true", help="one JSON object with every check")
    parser.add_argument("--this-isa", action="store_true", help="on the CPU, only the kernels that are in use")
    options = parser.parse_args(arguments)
    began, shown = time.monotonic(), not options.json
    checks: list[Check] = []
    for group in groups(options.this_isa):
        checks += group
        if shown and group:
            failed = [check for check in group if not check.passed]
            print(f"{group[0].device}, {group[0].kernels}: {len(group) - len(failed)} of {len(group)} checks passed")
            for check in failed:
                found = check.reason or f"error {check.error:.2g}, limit {check.limit:.2g}"
                print(f"  {check.name}, {check.dtype}: {found}")
    passed = all(check.passed for check in checks)
    if shown:
        print(f"{'passed' if passed else 'FAILED'} in {time.monotonic() - began:.0f} s")
    else:
        found = {"passed": passed, "checks": [{**asdict(check), "passed": check.passed} for check in checks]}
        print(json.dumps(found, indent=2, allow_nan=False))
    return 0 if passed else 1


def groups(this_isa_alone: bool = False) -> Iterator[list[Check]]:
    """The checks of each kind of kernels, as they are done."""
    extension = load_extension()
    in_use = extension.cpu_isa()
    yield list(checks_on(torch.device("cpu"), in_use))
    if this_isa_alone:
        return
    for isa in extension.supported_cpu_isas():
        if isa != in_use:
            yield checks_with(isa)
    for index in range(torch.cuda.device_count()):
        kernels = "kernels of its own" if extension.build_info()["cuda"] is not None else "torch's operators"
        yield list(checks_on(torch.device("cuda", index), kernels))


def checks_with(isa: str) -> list[Check]:
    """By a process of its own: kernels are chosen once for each."""
    command = [sys.executable, "-m", "resnorm_ext", "selftest", "--json", "--this-isa"]
    run = subprocess.run(command, env=os.environ | {"RESNORM_CPU_ISA": isa}, capture_output=True, text=True)
    try:
        found = json.loads(run.stdout)["checks"]
    except json.JSONDecodeError:
        reason = (run.stderr.strip().splitlines() or [f"ended with status {run.returncode}"])[-1]
        return [Check("all", "cpu", isa, "", None, 0.0, reason)]
    return [Check(**{name: value for name, value in check.items() if name != "passed"}) for check in found]


def checks_on(device: torch.device, kernels: str) -> Iterator[Check]:
    for dtype in _LIMITS:
        if device.type == "cuda" and dtype == torch.bfloat16 and not torch.cuda.is_bf16_supported(False):
            continue
        for name in _OPERATORS:
            yield from _checks(name, device, kernels, dtype, partial(_compare_operator, name, device, dtype))
        yield from _checks("encoder", device, kernels, dtype, partial(_compare_encoder, device, dtype))


def _checks(
    name: str,
    device: torch.device,
    kernels: str,
    dtype: torch.dtype,
    compare: Callable[[], Iterator[tuple[str, float]]],
) -> Iterator[Check]:
    where = (str(device), kernels, str(dtype).removeprefix("torch."))
    try:
        for what, error in compare():
            limit = _LIMITS[dtype] * (4.0 if what else 1.0)
            finite = math.isfinite(error)
            reason = "" if finite else f"the result is not finite: error {error}"
            yield Check(f"{name}{what}", *where, error if finite else None, limit, reason)
    except Exception as error:  # what is broken must not hide the rest
        yield Check(name, *where, None, _LIMITS[dtype], f"{type(error).__name__}: {error}".splitlines()[0])


def _compare_operator(name: str, device: torch.device, dtype: torch.dtype) -> Iterator[tuple[str, float]]:
    """(what, relative error) of the result and the gradients."""
    shapes, ours, formula = _OPERATORS[name]
    generator = torch.Generator().manual_seed(0)
    values = {each: torch.randn(shape, generator=generator, dtype=torch.float64) for each, shape in shapes.items()}
    if name in ("linear", "feed_forward"):
        values = {each: value / value.size(-1) ** 0.5 if value.dim() > 1 else value for each, value in values.items()}
    inputs = {each: value.to(device, dtype).requires_grad_() for each, value in values.items()}
    exact = {each: value.detach().double().requires_grad_() for each, value in inputs.items()}
    seed = torch.tensor(1234, device=device)
    actual, expected = ours(seed, **inputs), formula(seed, **exact)
    yield "", _relative_error(actual, expected)
    gradient = torch.randn(expected.shape, generator=generator, dtype=torch.float64).to(device, dtype)
    gradients = torch.autograd.grad(actual, list(inputs.values()), gradient)
    expected_gradients = torch.autograd.grad(expected, list(exact.values()), gradient.double())
    for each, got, wanted in zip(inputs, gradients, expected_gradients, strict=True):
        yield f", gradient of {each}", _relative_error(got, wanted)


def _compare_encoder(device: torch.device, dtype: torch.dtype) -> Iterator[tuple[str, float]]:
    """An accelerated encoder of torch.nn with padding, in inference and training."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(64, 4, 128, dropout=0.0, batch_first=True, activation="gelu")
    exact = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).to(device, dtype).double()
    ours = accelerate(copy.deepcopy(exact).to(dtype))
    x = torch.randn(3, 11, 64).to(device, dtype)
    padding = (torch.arange(11) >= torch.tensor([[11], [4], [7]])).to(device)
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # whose results at padded positions are others
    try:
        wanted = exact(x.double(), src_key_padding_mask=padding)[~padding]
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)
    with torch.no_grad():
        inferred = ours.eval()(x, src_key_padding_mask=padding)[~padding]
    yield " in inference", _relative_error(inferred, wanted)
    trained = ours.train()(x, src_key_padding_mask=padding)[~padding]
    yield " in training", _relative_error(trained, wanted)
    gradient = torch.randn(wanted.shape).to(device, dtype)
    gradients = torch.autograd.grad(trained, list(ours.parameters()), gradient)
    expected = torch.autograd.grad(wanted, list(exact.parameters()), gradient.double())
    apart = torch.stack([(a - b).norm() for a, b in zip(gradients, expected, strict=True)])
    largest = torch.stack([each.norm() for each in expected]).max()
    yield " in training, gradients", float(apart.max() / largest)  # torch's max, which keeps a NaN


def _relative_error(actual: Tensor, expected: Tensor) -> float:
    actual, expected = actual.detach().double(), expected.detach()
    return float((actual - expected).norm() / expected.norm())
