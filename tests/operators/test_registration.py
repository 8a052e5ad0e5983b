# SPDX-License-Identifier: BSD-3-Clause
"""The operators as PyTorch's dispatcher, its tracers and its tensor subclasses see them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from resnorm_ext.build.extension import ensure_loaded, extension, load_extension, read_info

from .cases import CASES, DTYPES, FULL_CASES, SEED, require_grad

N = 8
ROW = [N]


def tensors(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32, requires_grad: bool = False) -> list[Tensor]:
    return [torch.randn(shape).to(dtype).requires_grad_(requires_grad) for shape in shapes]


def samples(requires_grad: bool) -> dict[str, tuple]:
    """Arguments of every public operator, all of them or as few as possible."""
    x, r = tensors((2, 3, N), (2, 3, N), requires_grad=requires_grad)
    weight, bias, input_bias = tensors((N,), (N,), (N,), requires_grad=requires_grad)
    feed_forward = tensors((5, N), (5,), (3, 5), (3,), requires_grad=requires_grad)
    return {
        "layer_norm": (x, ROW, weight, bias, 1e-5),
        "layer_norm ": (x, ROW),
        "residual_add": (x, r, input_bias, 0.3, SEED, torch.float64),
        "residual_add ": (x, r),
        "add_layer_norm": (x, r, ROW, weight, bias, 1e-5, input_bias, 0.3, SEED, True, torch.float64),
        "add_layer_norm ": (x, r, ROW),
        "rms_norm": (x, ROW, weight, 1e-5),
        "rms_norm ": (x, ROW),
        "add_rms_norm": (x, r, ROW, weight, 1e-5, input_bias, 0.3, SEED, True, torch.float64),
        "add_rms_norm ": (x, r, ROW),
        "bias_activation": (x, bias, "gelu_tanh"),
        "bias_activation ": (x,),
        "bias_activation  ": (x, bias, "relu", 0.3, SEED),
        "feed_forward": (x, *feed_forward, "gelu", 0.3, SEED),
        "feed_forward ": (x, feed_forward[0], None, feed_forward[2], None, "relu"),
    }


def inner_samples() -> dict[str, tuple]:
    """Arguments of the operators that the public ones are made of, and of those that write."""
    x, r, y, s = tensors(*[(2, 3, N)] * 4)
    weight, bias, input_bias = tensors((N,), (N,), (N,))
    mean, rstd = tensors((2, 3), (2, 3))
    half = x.bfloat16()
    return {
        "layer_norm_out": (x, ROW, weight, bias, 1e-5, y),
        "residual_add_out": (x, r, input_bias, 0.3, SEED, None, s),
        "add_layer_norm_out": (x, r, ROW, weight, bias, 1e-5, input_bias, 0.3, SEED, None, y, s),
        "add_layer_norm_out ": (x, r, ROW, None, None, 1e-5, None, 0.0, None, None, y, None),
        "rms_norm_out": (x, ROW, weight, 1e-5, y),
        "add_rms_norm_out": (x, r, ROW, weight, None, input_bias, 0.3, SEED, None, y, s),
        "bias_activation_out": (x, bias, "relu", 0.3, SEED, y),
        "_bias_activation_backward": (y, x, bias, "gelu", 0.3, SEED, [True, True, True]),
        "_bias_activation_backward ": (half, half, None, "relu", 0.0, None, [True, False, False]),
        "_norm_forward": (x, r, input_bias, 0.3, SEED, None, ROW, weight, bias, 1e-5, True, True, True),
        "_norm_forward ": (half, None, None, 0.0, None, None, ROW, None, None, 1e-5, False, False, True),
        "_norm_forward  ": (x, r, None, 0.0, None, None, ROW, weight, None, 1e-5, False, False, False),
        "_norm_out": (x, r, input_bias, 0.3, SEED, None, ROW, weight, bias, 1e-5, True, y, s),
        "_norm_out ": (x, None, None, 0.0, None, None, ROW, None, None, 1e-5, False, y, None),
        "_norm_backward": (
            *(y, s, x, mean, rstd, input_bias, 0.3, SEED, torch.bfloat16, ROW, weight, bias, 1e-5, True, [True] * 5),
        ),
        "_norm_backward ": (
            *(y, None, x, None, rstd, None, 0.0, None, torch.float32, ROW, weight, None, 1e-5, False),
            [True, False, False, True, False],
        ),
        "_residual_add_backward": (y, input_bias, 0.3, SEED, torch.bfloat16, [True, True]),
        "_residual_add_backward ": (y, None, 0.0, None, torch.float32, [True, False]),
    }


def operator(name: str):
    ensure_loaded()
    return getattr(torch.ops.resnorm, name.strip()).default


@pytest.mark.parametrize("requires_grad", [False, True], ids=["", "grad"])
@pytest.mark.parametrize("name", samples(False))
def test_opcheck_of_public_operators(name, requires_grad):
    torch.library.opcheck(operator(name), samples(requires_grad)[name])


@pytest.mark.parametrize("name", inner_samples())
def test_opcheck_of_inner_operators(name):
    torch.library.opcheck(operator(name), inner_samples()[name])


@pytest.mark.parametrize("case", FULL_CASES, ids=str)
def test_a_recorded_training_step_is_replayed(case):
    """With leaves that require grad too: the statistics that it takes from the forward pass are there."""
    inputs = case.make_inputs((4, N))

    def step(*leaves: Tensor) -> tuple[Tensor, ...]:
        outputs = case.ours(dict(zip(inputs, leaves)))
        return torch.autograd.grad(sum(output.square().sum() for output in outputs), leaves)

    leaves = list(require_grad(inputs).values())
    torch.testing.assert_close(make_fx(step)(*leaves)(*leaves), step(*leaves))


def test_statistics_are_returned_beside_a_backward_pass_too():
    x, weight = tensors((2, N), (N,), requires_grad=True)
    for residual in (None, x.detach()):
        call = (x, residual, None, 0.0, None, None, ROW, weight, None, 1e-5, True, residual is not None, True)
        results = operator("_norm_forward")(*call)
        with torch.no_grad():
            expected = operator("_norm_forward")(*call)
        assert [r is None for r in results] == [e is None for e in expected]
        assert results[0].requires_grad and not results[2].requires_grad and not results[3].requires_grad
        torch.testing.assert_close(results[2:], expected[2:])


def test_a_sums_out_needs_a_residual():
    x = torch.randn(2, N)
    with pytest.raises(RuntimeError, match="Expected a residual beside the sum's out"):
        operator("_norm_out")(x, None, None, 0.0, None, None, ROW, None, None, 1e-5, True, x.clone(), x.clone())


def test_every_operator_has_its_samples_here():
    ensure_loaded()
    registered = {
        schema.name.removeprefix("resnorm::")
        for schema in torch._C._jit_get_all_schemas()
        if schema.name.startswith("resnorm::")
    }
    here = {
        name for name in registered if any(kind in name for kind in ("norm", "residual_add", "bias_", "feed_forward"))
    }
    assert here == {name.strip() for name in [*samples(False), *inner_samples()]}


@pytest.mark.smoke
def test_cuda_kernels_are_registered_exactly_where_they_were_built():
    library = Path(load_extension().__file__)
    built = read_info(library)["cuda"] is not None
    assert built == (extension.build_info()["cuda"] is not None)
    norms = ("layer_norm", "add_layer_norm", "rms_norm", "add_rms_norm", "_norm_forward", "_norm_backward", "_norm_out")
    for name in (*norms, "residual_add", "residual_add_out", "_residual_add_backward"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"resnorm::{name}", "CUDA") == built


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_fake_results_describe_the_real_ones(case, dtype):
    inputs = case.make_inputs((2, 3, 8), dtype, residual=torch.float32)
    inputs["input"] = inputs["input"].transpose(0, 1)
    if case.adds:
        inputs["residual"] = inputs["residual"].transpose(0, 1)
    real = case.ours(inputs)
    with FakeTensorMode() as mode:
        fake = case.ours({n: mode.from_tensor(t) for n, t in inputs.items()}, seed=mode.from_tensor(SEED))
    for actual, expected in zip(fake, real, strict=True):
        assert (actual.dtype, actual.shape, actual.stride()) == (expected.dtype, expected.shape, expected.stride())


@pytest.mark.parametrize("case", FULL_CASES, ids=str)
def test_meta_tensors(case):
    inputs = {name: tensor.to("meta") for name, tensor in case.make_inputs((2, 3, 8)).items()}
    outputs = case.ours(inputs, seed=SEED.to("meta"))
    assert all(o.shape == (2, 3, 8) and o.is_meta for o in outputs)
    leaves = require_grad(inputs)
    torch.autograd.backward(case.ours(leaves, seed=SEED.to("meta")), [torch.empty_like(o) for o in outputs])
    assert all(leaf.grad.shape == leaf.shape and leaf.grad.is_meta for leaf in leaves.values())


class Spy(TorchFunctionMode):
    def __init__(self) -> None:
        self.seen: list[str] = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.seen.append(str(function))
        return function(*args, **(kwargs or {}))


class DispatchSpy(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.seen.append(str(function))
        return function(*args, **(kwargs or {}))


class Tagged(Tensor):
    """A subclass that sees the calls it takes part in, as those of quantization and sharding libraries do."""

    seen: list[str] = []  # noqa: RUF012

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        cls.seen.append(str(function))
        return super().__torch_function__(function, types, args, kwargs)


@pytest.mark.parametrize("case", FULL_CASES, ids=str)
def test_torch_function_modes_and_subclasses_see_the_operator(case):
    inputs = case.make_inputs((2, 8))
    expected = case.ours(inputs)
    with Spy() as spy:
        results = case.ours(inputs)
    assert f"resnorm.{case.operator}" in " ".join(spy.seen)
    assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))
    for name in inputs:
        Tagged.seen.clear()
        results = case.ours(inputs | {name: inputs[name].as_subclass(Tagged)})
        assert f"resnorm.{case.operator}" in " ".join(Tagged.seen), name
        assert all(type(a) is Tagged and torch.equal(a, b) for a, b in zip(results, expected, strict=True))


@pytest.mark.parametrize("case", FULL_CASES, ids=str)
def test_torch_dispatch_modes_see_one_operator_forward_and_one_backward(case):
    leaves = require_grad(case.make_inputs((2, 8)))
    with DispatchSpy() as spy:
        outputs = case.ours(leaves)
    ours = [name for name in spy.seen if name.startswith("resnorm")]
    forward = "resnorm._norm_forward.default" if case.normalizes else f"resnorm.{case.operator}.default"
    backward = f"resnorm._{'norm' if case.normalizes else case.operator}_backward.default"
    assert ours == [forward]
    with DispatchSpy() as spy:
        torch.autograd.grad(outputs, leaves.values(), [torch.ones_like(o) for o in outputs])
    assert [name for name in spy.seen if name.startswith("resnorm")] == [backward]
    with torch.no_grad(), DispatchSpy() as spy:
        case.ours(leaves)
    assert [name for name in spy.seen if name.startswith("resnorm")] == [f"resnorm.{case.operator}.default"]


@pytest.mark.parametrize("case", FULL_CASES, ids=str)
def test_inference_mode(case):
    inputs = case.make_inputs((3, 8))
    expected = case.ours(inputs)
    with torch.inference_mode():
        results = case.ours(require_grad(inputs))
        in_place = {name: tensor.clone() for name, tensor in inputs.items()}
        outs = tuple(in_place[target] for target in ("input", "residual")[: len(results)])
        case.ours(in_place, out=outs if case.prenorm else outs[0])
    for result, out, value in zip(results, outs, expected, strict=True):
        assert result.is_inference() and torch.equal(result, value) and torch.equal(out, value)
