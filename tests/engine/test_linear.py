# SPDX-License-Identifier: BSD-3-Clause
from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from resnorm_ext import functional
from resnorm_ext.engine.linear import prepare_linear

from .linear_cases import ACTIVATIONS, IN, OUT, ROWS, operands, reference


class TestOperator:
    @pytest.mark.parametrize("activation", ACTIVATIONS)
    def test_every_row_count(self, backend, activation):
        for rows in ROWS:
            x, weight, bias = operands(rows)
            output = functional.linear(x, weight, bias, activation=activation)
            expected = reference(x, weight, bias, activation)
            assert output.shape == expected.shape and output.is_contiguous()
            torch.testing.assert_close(output.double(), expected, rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("activation", ACTIVATIONS)
    def test_every_dtype(self, backend, dtype, activation):
        x, weight, bias = operands((3, 35), dtype)
        output = functional.linear(x, weight, bias, activation=activation)
        expected = reference(x, weight, bias, activation)
        assert output.dtype == dtype
        tolerance = 1e-12 if dtype == torch.float64 else 4 * torch.finfo(dtype).eps
        torch.testing.assert_close(output.double(), expected, rtol=tolerance, atol=8 * tolerance)

    @pytest.mark.parametrize("leading", [(), (7,), (2, 3, 5), (0, 4)])
    def test_leading_dimensions_and_no_bias(self, backend, leading):
        x, weight, _ = operands(leading)
        expected = reference(x, weight, None, "none")
        torch.testing.assert_close(functional.linear(x, weight).double(), expected, rtol=1e-5, atol=1e-5)

    def test_strides(self, backend):
        x, weight, bias = operands(48)
        x, weight = x.t().contiguous().t(), weight.t().contiguous().t()
        expected = reference(x, weight, bias, "gelu")
        output = functional.linear(x, weight, bias, activation="gelu")
        torch.testing.assert_close(output.double(), expected, rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("bias", [torch.randn(OUT, 2)[:, 0], torch.ones(1).expand(OUT), torch.randn(OUT).flip(0)])
    def test_strides_of_the_bias(self, backend, bias):
        x, weight, _ = operands(64)
        torch.testing.assert_close(functional.linear(x, weight, bias), F.linear(x, weight, bias), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(prepare_linear((weight, bias))(x), F.linear(x, weight, bias), rtol=1e-5, atol=1e-5)

    def test_nothing_is_written_and_nothing_is_shared(self, backend):
        arguments = operands(64)
        before = [tensor.clone() for tensor in arguments]
        x, weight, bias = arguments
        outputs = [functional.linear(x, weight, bias) for _ in range(3)]
        outputs[0].zero_()
        torch.testing.assert_close(outputs[1], outputs[2], rtol=0, atol=0)
        assert all(map(torch.equal, arguments, before))

    @pytest.mark.parametrize("activation", ACTIVATIONS)
    def test_gradients(self, backend, activation):
        arguments = [t.double().requires_grad_() for t in operands(4)]

        def call(x, weight, bias):
            return functional.linear(x, weight, bias, activation=activation)

        assert torch.autograd.gradcheck(call, arguments)
        assert torch.autograd.gradgradcheck(call, arguments)

    @pytest.mark.parametrize("requires_grad", [False, True])
    def test_opcheck(self, backend, requires_grad):
        x, weight, bias = (t.requires_grad_(requires_grad) for t in operands((2, 3)))
        for arguments in ((x, weight), (x, weight, bias, "gelu")):
            torch.library.opcheck(torch.ops.resnorm.linear.default, arguments)

    def test_torch_func(self, backend):
        x, weight, bias = operands((3, 5))

        def loss(function, weight, x):
            return function(x, weight, bias).square().sum()

        for transform in (torch.func.grad, torch.func.jacrev):
            ours = torch.func.vmap(transform(lambda w, x: loss(functional.linear, w, x)), (None, 0))(weight, x)
            theirs = torch.func.vmap(transform(lambda w, x: loss(F.linear, w, x)), (None, 0))(weight, x)
            torch.testing.assert_close(ours, theirs)
        _, ours = torch.func.jvp(lambda x: functional.linear(x, weight, bias, activation="gelu"), (x,), (x,))
        _, theirs = torch.func.jvp(lambda x: F.gelu(F.linear(x, weight, bias)), (x,), (x,))
        torch.testing.assert_close(ours, theirs)

    @pytest.mark.parametrize("requires_grad", [False, True])
    def test_compiles_without_a_graph_break(self, backend, requires_grad):
        x, weight, bias = (t.requires_grad_(requires_grad) for t in operands((2, 3)))

        def call(x, weight, bias):
            return functional.linear(x, weight, bias, activation="gelu")

        compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
        output, expected = compiled(x, weight, bias), call(x, weight, bias)
        torch.testing.assert_close(output, expected)
        if requires_grad:
            grads = torch.autograd.grad(output.sum(), (x, weight, bias))
            torch.testing.assert_close(grads, torch.autograd.grad(expected.sum(), (x, weight, bias)))

    @pytest.mark.parametrize("requires_grad", [False, True])
    def test_autocast_casts_as_torch_does(self, backend, requires_grad):
        x, weight, bias = (t.requires_grad_(requires_grad) for t in operands(5))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            output = functional.linear(x, weight, bias, activation="relu")
            torch.testing.assert_close(output, F.relu(F.linear(x, weight, bias)))
        assert output.dtype == torch.bfloat16

    @pytest.mark.parametrize(
        ("change", "error", "message"),
        [
            ({"input": torch.ones(3, IN + 1)}, RuntimeError, rf"shape \(\*, {IN}\).*\[3, {IN + 1}\]"),
            ({"input": torch.ones(3, IN, dtype=torch.int64)}, NotImplementedError, "Long"),
            ({"weight": torch.ones(IN)}, RuntimeError, rf"2-dimensional.*\[{IN}\]"),
            ({"weight": torch.ones(OUT, IN, dtype=torch.float64)}, RuntimeError, "Float.*Double"),
            ({"weight": torch.ones(OUT, IN, device="meta")}, RuntimeError, "cpu.*meta"),
            ({"bias": torch.ones(OUT + 1)}, RuntimeError, rf"\[{OUT}\].*\[{OUT + 1}\]"),
            ({"activation": "elu"}, ValueError, "gelu_tanh, but got elu"),
        ],
    )
    def test_bad_input(self, change, error, message):
        x, weight, bias = operands(3)
        arguments = {"input": x, "weight": weight, "bias": bias} | change
        with pytest.raises(error, match=message):
            functional.linear(**arguments)
