# SPDX-License-Identifier: BSD-3-Clause
"""The mask is a pure function of the seed and of where an element stands."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from resnorm_ext import reference
from resnorm_ext.functional import add_layer_norm, residual_add

from .cases import DTYPES
from .layouts import LAYOUTS, lay_out

pytestmark = pytest.mark.every_isa

SEEDS = st.sampled_from([0, 1, -1, 2**63 - 1, -(2**63), 2**32, 2**32 - 1, 0x1234_5678_9ABC_DEF0])
OPERATORS = {
    "residual_add": lambda input, residual, **options: residual_add(input, residual, **options),
    "add_layer_norm": lambda input, residual, **options: add_layer_norm(
        input, residual, input.shape[-1:], prenorm=True, **options
    )[1],
}


@pytest.fixture(params=OPERATORS.values(), ids=OPERATORS.keys())
def sum_of(request):
    return request.param


@given(
    shape=st.lists(st.integers(1, 9), max_size=2).flatmap(
        lambda leading: st.integers(1, 300).map(lambda n: (*leading, n))
    ),
    p=st.sampled_from([1e-3, 0.1, 0.25, 0.5, 0.9]) | st.floats(0, 1),
    seed=SEEDS,
    layouts=st.tuples(*[st.sampled_from(LAYOUTS[:-1])] * 3),
    dtype=st.sampled_from(DTYPES),
)
@pytest.mark.parametrize("operator", OPERATORS)
def test_mask_is_the_references_forward_and_backward(operator, shape, p, seed, layouts, dtype):
    """Of ones, so that what is kept is the scale and what is dropped is zero."""
    seed = torch.tensor(seed)
    input = lay_out(torch.ones(shape, dtype=dtype), layouts[0]).requires_grad_()
    residual = lay_out(torch.zeros(shape, dtype=dtype), layouts[1])
    keep = torch.ones(shape, dtype=torch.bool)
    if reference.dropout_threshold(p):
        keep = reference.dropout_keep_mask(seed, shape, p)
    expected = (keep * reference.dropout_scale(p)).to(dtype)
    s = OPERATORS[operator](input, residual, dropout_p=p, training=True, seed=seed)
    assert torch.equal(s, expected)
    s.backward(lay_out(torch.ones(shape, dtype=dtype), layouts[2]))
    assert torch.equal(input.grad, expected)


def test_a_mask_of_many_threads_and_rows(sum_of):
    """Every row's first element is somewhere else in a Philox block of eight."""
    shape, seed = (5003, 333), torch.tensor(77)
    s = sum_of(torch.ones(shape), torch.zeros(shape), dropout_p=0.5, training=True, seed=seed)
    assert torch.equal(s != 0, reference.dropout_keep_mask(seed, shape, 0.5))


def test_the_draw_is_over_elements_not_dimensions(sum_of):
    """A mask depends on the shape through the element's index alone."""
    seed, options = torch.tensor(5), {"dropout_p": 0.5, "training": True}
    flat = sum_of(torch.ones(1, 360), torch.zeros(1, 360), seed=seed, **options)
    for shape in [(360,), (4, 90), (3, 4, 30), (360, 1)]:
        s = sum_of(torch.ones(shape), torch.zeros(shape), seed=seed, **options)
        assert torch.equal(s.flatten(), flat.flatten())


@pytest.mark.smoke
def test_seed_is_drawn_anew_and_reproducible(sum_of):
    input, residual = torch.ones(4, 256), torch.zeros(4, 256)

    def draws() -> list[torch.Tensor]:
        torch.manual_seed(3)
        return [sum_of(input, residual, dropout_p=0.5, training=True) for _ in range(3)]

    first, second = draws(), draws()
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not torch.equal(first[0], first[1]) and not torch.equal(first[1], first[2])


def test_no_dropout_draws_nothing(sum_of):
    input, residual = torch.randn(2, 3, 8)
    state = torch.get_rng_state()
    for options in [{"dropout_p": 0.5, "training": False}, {"dropout_p": 0.0, "training": True}]:
        torch.testing.assert_close(sum_of(input, residual, **options), input + residual)
    assert torch.equal(torch.get_rng_state(), state)


def test_forward_and_backward_share_a_drawn_mask(sum_of):
    input = torch.ones(16, 100, requires_grad=True)
    s = sum_of(input, torch.zeros(16, 100), dropout_p=0.4, training=True)
    s.sum().backward()
    assert torch.equal(input.grad, s)
    assert 0.3 < (s == 0).double().mean() < 0.5


def test_the_backward_keeps_its_seed_when_the_callers_tensor_changes(sum_of):
    """As any saved tensor: a change in place is an error, never another mask."""
    seed = torch.tensor(1)
    input = torch.ones(4, 64, requires_grad=True)
    s = sum_of(input, torch.zeros(4, 64), dropout_p=0.5, training=True, seed=seed)
    seed.fill_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        s.sum().backward()


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_statistics(sum_of, p):
    """Rate and expectation over many seeds, and no correlation of neighbours, of rows, or between seeds."""
    rows, cols = 400, 512
    ones, zeros = torch.ones(rows, cols), torch.zeros(rows, cols)
    masks = torch.stack(
        [sum_of(ones, zeros, dropout_p=p, training=True, seed=torch.tensor(seed)) for seed in range(8)]
    ).double()
    deviation = (p / (1 - p)) ** 0.5
    assert abs(masks.mean() - 1) < 5 * deviation / masks.numel() ** 0.5
    noise = (masks - 1) / deviation
    limit = 5 / (rows * cols) ** 0.5
    assert (noise[..., :-1] * noise[..., 1:]).mean().abs() < limit
    assert (noise[:, :-1] * noise[:, 1:]).mean().abs() < limit
    assert (noise[:-1] * noise[1:]).mean().abs() < limit
    assert (noise.mean((0, 1)).abs() < 6 / (8 * rows) ** 0.5).all()
