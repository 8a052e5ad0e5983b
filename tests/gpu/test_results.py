# SPDX-License-Identifier: BSD-3-Clause
"""Results and gradients of every plan, option, dtype and layout, against the float64 formula and our CPU kernels."""

from __future__ import annotations

import pytest
import torch
from operators.cases import DTYPES, FULL_NORM_CASES, HALVES, NORM_CASES, Case, eps_of
from operators.exactness import Roundings, check_gradients, check_results, incoming_gradients
from operators.layouts import LAYOUTS, WRITABLE_LAYOUTS, empty, lay_out

from .device import COLUMNS, DEVICE, ONE_OF_EACH, results_and_gradients, seed_at, to_cpu, to_device

pytestmark = pytest.mark.cuda

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16


def check(case: Case, inputs, residual_dtype: torch.dtype | None = None, layouts=("contiguous",) * 6) -> None:
    """Results and gradients of ``inputs``, which are on the CPU and go to the device in ``layouts``."""
    options = {"residual_dtype": residual_dtype} if case.adds else {}
    inputs = {name: lay_out(tensor, layout) for (name, tensor), layout in zip(inputs.items(), layouts)}
    there = {name: lay_out(to_device(tensor), layout) for (name, tensor), layout in zip(inputs.items(), layouts)}
    grads = incoming_gradients(case, inputs, residual_dtype)
    grads_there = [lay_out(to_device(grad), layouts[-1]) for grad in grads]
    grads = to_cpu(grads_there)
    results, gradients = to_cpu(results_and_gradients(case, there, grads_there, **options))
    check_results(case, inputs, results, **options)
    check_gradients(case, inputs, gradients, grads, residual_dtype=residual_dtype)

    with torch.no_grad():
        alone = case.ours(there, seed=seed_at(there), **options)
    assert all(torch.equal(a.cpu(), b) for a, b in zip(alone, results, strict=True)), "differs from that without grad"
    assert all(result.is_contiguous() for result in alone)

    on_cpu = results_and_gradients(case, inputs, grads, **options)
    dropped_alike = case.dropout_p == 0
    for name, ours, cpus in zip(case.outputs, results, on_cpu[0], strict=True):
        assert ours.dtype == cpus.dtype
        assert_near(ours, cpus, Roundings.OTHER_DEVICE_HALF if ours.dtype in HALVES else Roundings.OTHER_DEVICE)
        if name == "s" and dropped_alike:
            assert torch.equal(ours, cpus)
    for name, gradient in gradients.items():
        roundings = Roundings.OTHER_FORMULA * eps_of(coarsest(inputs, residual_dtype)) / eps_of(gradient.dtype)
        assert_near(gradient, on_cpu[1][name], roundings)


def coarsest(inputs, residual_dtype: torch.dtype | None) -> torch.dtype:
    dtypes = {tensor.dtype for tensor in inputs.values()} | ({residual_dtype} if residual_dtype else set())
    return max(dtypes, key=eps_of)


def assert_near(actual: torch.Tensor, expected: torch.Tensor, roundings: float) -> None:
    if actual.numel():
        bound = roundings * eps_of(actual.dtype) * max(expected.abs().max().item(), 1.0)
        torch.testing.assert_close(actual.double(), expected.double(), rtol=0, atol=bound)


@pytest.mark.parametrize("cols", ONE_OF_EACH)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", NORM_CASES, ids=str)
def test_options(case, dtype, cols):
    check(case, case.make_inputs((5 if cols < 10_000 else 2, cols), dtype))


@pytest.mark.parametrize("cols", [cols for cols in COLUMNS if cols not in ONE_OF_EACH])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", FULL_NORM_CASES, ids=str)
def test_row_lengths(case, dtype, cols):
    check(case, case.make_inputs((3, cols), dtype))


@pytest.mark.parametrize("shape", [(70_001, 8), (70_000, 2, 5), (5003, 64), (5003, 256), (2500, 768), (601, 1001)])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("case", FULL_NORM_CASES, ids=str)
def test_more_rows_than_are_at_work_at_once(case, dtype, shape):
    """And than the grid's second dimension may have."""
    check(case, case.make_inputs(shape, dtype))


@pytest.mark.parametrize("shape", [(300, 8192), (150, 20480), (40, 65536)])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_more_long_rows_than_blocks_or_clusters(dtype, shape):
    check(FULL_NORM_CASES[-1], FULL_NORM_CASES[-1].make_inputs(shape, dtype))


MIXES = [
    *[
        mix
        for half in HALVES
        for mix in [
            {"dtype": half, "residual": half, "parameters": F32, "residual_dtype": None},
            {"dtype": half, "residual": F32, "parameters": F32, "residual_dtype": None},
            {"dtype": half, "residual": F32, "parameters": half, "residual_dtype": None},
            {"dtype": half, "residual": half, "parameters": half, "residual_dtype": F32},
            {"dtype": half, "residual": F32, "parameters": F32, "residual_dtype": half},
            {"dtype": half, "residual": F64, "parameters": half, "residual_dtype": None},
            {"dtype": half, "residual": half, "parameters": F32, "residual_dtype": F64},
        ]
    ],
    {"dtype": BF16, "residual": F16, "parameters": BF16, "residual_dtype": None},
    {"dtype": F16, "residual": BF16, "parameters": F32, "residual_dtype": F16},
    {"dtype": F32, "residual": BF16, "parameters": F32, "residual_dtype": None},
    {"dtype": F32, "residual": F32, "parameters": F32, "residual_dtype": BF16},
    {"dtype": F32, "residual": F64, "parameters": F32, "residual_dtype": None},
    {"dtype": F64, "residual": F32, "parameters": F64, "residual_dtype": F32},
]


@pytest.mark.parametrize("cols", [33, 768, 1001, 4096, 20001, 140000])
@pytest.mark.parametrize("mix", MIXES, ids=lambda mix: "/".join(str(dtype)[6:] for dtype in mix.values()))
@pytest.mark.parametrize("case", FULL_NORM_CASES[1:], ids=str)
def test_mixed_dtypes(case, mix, cols):
    dtypes = dict(mix)
    residual_dtype = dtypes.pop("residual_dtype")
    check(case, case.make_inputs((3, cols), **dtypes), residual_dtype)


@pytest.mark.parametrize("cols", [37, 768, 4100])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", FULL_NORM_CASES, ids=str)
def test_layouts(case, layout, dtype, cols):
    """Of all operands, and of one beside contiguous ones."""
    inputs = case.make_inputs((2, 3, cols), dtype)
    check(case, inputs, layouts=(layout,) * 6)
    for place in range(6):
        layouts = ["contiguous"] * 6
        layouts[place] = layout
        check(case, inputs, layouts=layouts)


@pytest.mark.parametrize("cols", [37, 768, 4100, 140000])
@pytest.mark.parametrize("layout", WRITABLE_LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", FULL_NORM_CASES, ids=str)
def test_out_receives_the_same_bits_and_nothing_around_it_is_written(case, dtype, layout, cols):
    inputs = to_device(case.make_inputs((2, 2, cols), dtype))
    seed = seed_at(inputs)
    expected = case.ours(inputs, seed=seed)
    outs = [empty(result.shape, result.dtype, layout, DEVICE) for result in expected]
    views = tuple(view for view, _ in outs)
    before = [view._version for view in views]
    results = case.ours(inputs, seed=seed, out=views if case.prenorm else views[0])
    for (view, memory), version, result, value in zip(outs, before, results, expected, strict=True):
        assert result is view and view._version == version + 1 and torch.equal(view, value)
        assert memory.isnan().sum() == memory.numel() - view.numel()
    assert not any(tensor._version for tensor in inputs.values())


@pytest.mark.parametrize("cols", [37, 768, 4096, 20001, 140000])
@pytest.mark.parametrize("layout", ["contiguous", "offset", "row strided", "transposed"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("targets", [("input", "residual"), ("residual", "input")], ids="/".join)
@pytest.mark.parametrize("case", FULL_NORM_CASES, ids=str)
def test_in_place(case, targets, dtype, layout, cols):
    if not case.adds and targets[0] == "residual":
        pytest.skip("layer_norm has no residual")
    inputs = to_device(case.make_inputs((2, 3, cols), dtype))
    expected = case.ours(inputs, seed=seed_at(inputs))
    inputs = {name: lay_out(tensor, layout) for name, tensor in inputs.items()}
    outs = tuple(inputs[target] for target in targets[: len(case.outputs)])
    before = [out._version for out in outs]
    case.ours(inputs, seed=seed_at(inputs), out=outs if case.prenorm else outs[0])
    assert all(torch.equal(out, value) for out, value in zip(outs, expected, strict=True))
    assert [out._version for out in outs] == [version + 1 for version in before]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(0, 1), (0, 768), (2, 0, 768), (0, 20480), (3, 0), (0, 0)], ids=str)
@pytest.mark.parametrize("case", FULL_NORM_CASES, ids=str)
def test_no_rows_or_no_columns(case, shape, dtype):
    inputs = to_device(case.make_inputs(shape, dtype))
    grads = to_device(incoming_gradients(case, inputs))
    results, gradients = results_and_gradients(case, inputs, grads)
    assert all(result.shape == shape for result in results)
    for name, gradient in gradients.items():
        assert torch.equal(gradient, torch.zeros_like(inputs[name]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_column(dtype):
    """It is its own mean: the output is the bias, and no gradient comes through the norm but what rounding leaves."""
    case = Case("add_layer_norm", ("weight", "bias"))
    inputs = to_device(case.make_inputs((5000, 1), dtype))
    grads = to_device(incoming_gradients(case, inputs))
    (y,), gradients = results_and_gradients(case, inputs, grads)
    assert torch.equal(y, inputs["bias"].expand_as(y))
    assert all(gradients[name].abs().max() < 1e-4 for name in ("input", "residual"))
    rtol = Roundings.OTHER_DEVICE_HALF * eps_of(dtype)
    torch.testing.assert_close(gradients["bias"].double(), grads[0].double().sum(0), rtol=rtol, atol=1e-3)
