# SPDX-License-Identifier: BSD-3-Clause
"""Linear layers by this package's own product."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from resnorm_ext.build.extension import ensure_loaded, extension
from resnorm_ext.engine.linear import prepare_linear

from .linear_cases import ACTIVATIONS, IN, OUT, ROWS, operands, reference


@pytest.fixture(autouse=True)
def loaded():
    ensure_loaded()


@pytest.fixture
def packing():
    extension.set_linear_backend(torch.float32, IN, OUT, "resnorm")
    yield
    extension.set_linear_backend(torch.float32, IN, OUT, "aten")


def prepacked_linear(weight: torch.Tensor, bias: torch.Tensor | None):
    return extension.PreparedLinear(weight, bias, "resnorm")


def test_a_row_is_the_same_in_every_batch():
    x, weight, bias = operands(200)
    linear = prepacked_linear(weight, bias)
    whole = linear(x, "gelu")
    for row in (0, 7, 64, 199):
        assert torch.equal(linear(x[row : row + 1], "gelu")[0], whole[row])


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_row_count(packing, activation):
    for rows in ROWS:
        x, weight, bias = operands(rows)
        output = prepare_linear((weight, bias))(x, activation)
        assert output.shape == (rows, OUT) and output.is_contiguous()
        expected = reference(x, weight, bias, activation)
        torch.testing.assert_close(output.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("leading", [(), (7,), (2, 3, 5), (0, 4)])
def test_leading_dimensions_and_no_bias(packing, leading):
    x, weight, _ = operands(leading)
    expected = reference(x, weight, None, "none")
    torch.testing.assert_close(prepare_linear((weight, None))(x).double(), expected, rtol=1e-5, atol=1e-5)


def test_strides(packing):
    x, weight, bias = operands((3, 16))
    expected = reference(x, weight, bias, "gelu")
    x, weight = x.transpose(0, 2).contiguous().transpose(0, 2), weight.t().contiguous()
    output = prepare_linear((weight, bias), transposed=True)(x, "gelu")
    torch.testing.assert_close(output.double(), expected, rtol=1e-5, atol=1e-5)


def test_bfloat16_with_an_odd_number_of_features():
    if "resnorm" not in extension.linear_backends(torch.bfloat16):
        pytest.skip("this CPU does not multiply bfloat16")
    x, weight, bias = (tensor.bfloat16() for tensor in operands(9))
    x, weight = x[:, 1:], weight[:, 1:]
    output = prepacked_linear(weight, bias)(x)
    expected = reference(x, weight, bias, "none")
    torch.testing.assert_close(output.double(), expected, rtol=2**-8, atol=2**-6)


@pytest.mark.parametrize("shape", [(0, 8), (8, 0)])
def test_no_features(shape):
    extension.set_linear_backend(torch.float32, shape[1], shape[0], "resnorm")
    x, weight = torch.randn(3, shape[1]), torch.randn(shape)
    assert torch.equal(prepare_linear((weight, None))(x), F.linear(x, weight))


def test_a_weight_of_no_elements_is_refused():
    with pytest.raises(RuntimeError, match=r"Expected a weight of at least one element, but got weight of shape \[0"):
        prepacked_linear(torch.randn(0, IN), None)
