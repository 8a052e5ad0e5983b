# SPDX-License-Identifier: BSD-3-Clause
"""Any shape, strides and dtypes, new results and given ones, against the float64 formula."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from .cases import CASES, DTYPES, FULL_CASES, HALVES, Case
from .exactness import check_results
from .layouts import LAYOUTS, WRITABLE_LAYOUTS, empty, lay_out

# Around the widths of vectors and unrolled loops, hidden sizes people use, and odd ones.
COLS = st.integers(1, 70) | st.sampled_from([127, 128, 129, 255, 257, 384, 511, 768, 1000, 1023, 1025, 2049, 3001])
SHAPES = st.tuples(
    st.lists(st.integers(0, 6), min_size=0, max_size=3).map(tuple),
    st.tuples(COLS) | st.tuples(st.integers(1, 5), st.integers(1, 33)),
)
DTYPE_MIXES = st.sampled_from(DTYPES).flatmap(
    lambda dtype: st.fixed_dictionaries(
        {
            "dtype": st.just(dtype),
            "parameters": st.sampled_from((dtype, torch.float32) if dtype in HALVES else (dtype,)),
            "residual": st.sampled_from((dtype, *DTYPES)),
            "residual_dtype": st.sampled_from((None, *DTYPES)),
        }
    )
)


def make(case: Case, shape, dtypes) -> tuple[dict[str, Tensor], dict]:
    """(inputs, options) of a call."""
    (leading, row), dtypes = shape, dict(dtypes)
    residual_dtype = dtypes.pop("residual_dtype")
    inputs = case.make_inputs((*leading, *row), normalized_dims=len(row), **dtypes)
    return inputs, {"normalized_dims": len(row), **({"residual_dtype": residual_dtype} if case.adds else {})}


def empty_results(case: Case, inputs, options, layouts) -> list[tuple[Tensor, Tensor]]:
    """(view, memory) for each result, in its documented dtype."""
    dtype = inputs["input"].dtype
    dtypes = {"y": dtype}
    if case.adds:
        dtypes["s"] = options["residual_dtype"] or torch.promote_types(dtype, inputs["residual"].dtype)
    return [
        empty(inputs["input"].shape, dtypes[name], layout) for name, layout in zip(case.outputs, layouts, strict=False)
    ]


@pytest.mark.every_isa
@pytest.mark.smoke
@pytest.mark.parametrize("case", FULL_CASES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_usual_size(case, dtype):
    inputs, options = make(case, ((4, 16), (768,)), {"dtype": dtype, "residual_dtype": None})
    check_results(case, inputs, case.ours(inputs, **options), **options)


@pytest.mark.every_isa
@given(
    case=st.sampled_from(CASES),
    shape=SHAPES,
    dtypes=DTYPE_MIXES,
    layouts=st.lists(st.sampled_from(LAYOUTS), min_size=5, max_size=5),
)
@settings(max_examples=4 * settings.default.max_examples)
def test_any_shape_strides_and_dtypes(case, shape, dtypes, layouts):
    inputs, options = make(case, shape, dtypes)
    inputs = {name: lay_out(t, layout) for (name, t), layout in zip(inputs.items(), layouts, strict=False)}
    before = {name: tensor.clone() for name, tensor in inputs.items()}
    results = case.ours(inputs, **options)
    check_results(case, inputs, results, **options)
    assert all(result.is_contiguous() for result in results)
    assert [r.dtype for r in results] == [view.dtype for view, _ in empty_results(case, inputs, options, layouts)]
    assert all(torch.equal(inputs[name], before[name]) for name in inputs), "an input was written"


@pytest.mark.every_isa
@given(
    case=st.sampled_from(CASES),
    shape=SHAPES,
    dtypes=DTYPE_MIXES,
    layouts=st.lists(st.sampled_from(WRITABLE_LAYOUTS), min_size=2, max_size=2),
)
@settings(max_examples=4 * settings.default.max_examples)
def test_out_of_any_strides_receives_the_same_bits_and_nothing_around_it_is_written(case, shape, dtypes, layouts):
    inputs, options = make(case, shape, dtypes)
    expected = case.ours(inputs, **options)
    outs = empty_results(case, inputs, options, layouts)
    views = tuple(view for view, _ in outs)
    results = case.ours(inputs, **options, out=views if case.prenorm else views[0])
    for (view, memory), result, value in zip(outs, results, expected, strict=True):
        assert result is view and torch.equal(view, value)
        assert memory.isnan().sum() == memory.numel() - view.numel()


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("layout", WRITABLE_LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("targets", [("input", "residual"), ("residual", "input")], ids="/".join)
def test_in_place(case, layout, dtype, targets):
    """y in the place of input and s in that of residual, and the other way round."""
    inputs, options = make(case, ((2, 3), (37,)), {"dtype": dtype, "residual_dtype": None})
    if not case.adds and targets[0] == "residual":
        pytest.skip("layer_norm has no residual")
    expected = case.ours(inputs, **options)
    inputs = {name: lay_out(tensor, layout) for name, tensor in inputs.items()}
    outs = tuple(inputs[target] for target in targets[: len(case.outputs)])
    case.ours(inputs, **options, out=outs if case.prenorm else outs[0])
    assert all(torch.equal(out, value) for out, value in zip(outs, expected, strict=True))


@pytest.mark.parametrize("case", FULL_CASES, ids=str)
@pytest.mark.parametrize("cols", [1, 5, 768])
def test_no_rows(case, cols):
    inputs = case.make_inputs((0, cols))
    assert all(result.shape == (0, cols) for result in case.ours(inputs))


def test_a_scalar_residual_add():
    from resnorm_ext.functional import residual_add

    input, residual, bias = torch.tensor(2.0), torch.tensor(3.0), torch.tensor(0.5)
    assert residual_add(input, residual).item() == 5.0
    assert residual_add(input, residual, bias).item() == 5.5


@pytest.mark.parametrize("case", FULL_CASES, ids=str)
def test_one_huge_row_and_many_tiny_ones(case):
    for shape in [(1, 300_007), (60_001, 3), (3, 65536)]:
        inputs, options = make(case, (shape[:1], shape[1:]), {"dtype": torch.float32, "residual_dtype": None})
        check_results(case, inputs, case.ours(inputs, **options), **options)


@pytest.mark.parametrize("eps", [0.0, 1e-12, 1e-5, 0.5])
def test_eps(eps):
    for case in FULL_CASES:
        if case.normalizes:
            inputs = case.make_inputs((4, 33), torch.float64)
            for result, expected in zip(case.ours(inputs, eps=eps), case.reference(inputs, eps=eps), strict=True):
                torch.testing.assert_close(result, expected, rtol=1e-12, atol=1e-12)
