# SPDX-License-Identifier: BSD-3-Clause
"""Mistakes raise what torch raises for the same mistake, with what was expected and what came."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from resnorm_ext import functional
from resnorm_ext.functional import add_layer_norm, add_rms_norm, bias_activation, layer_norm, residual_add, rms_norm

from .cases import SEED

X, R = torch.randn(2, 3, 8), torch.randn(2, 3, 8)
V = torch.randn(8)


def error_of(call: Callable) -> Exception:
    with pytest.raises(Exception) as caught:
        call()
    return caught.value


def norms(input=X, residual=R, shape=(8,), *parameters, **options) -> list[Callable]:
    """The same mistake in each operator that normalises."""
    calls = [
        lambda: layer_norm(input, shape, *parameters),
        lambda: add_layer_norm(input, residual, shape, *parameters, **options),
        lambda: add_layer_norm(input, residual, shape, *parameters, prenorm=True, **options),
    ]
    if len(parameters) < 2:  # an RMS norm has no bias
        calls += [
            lambda: rms_norm(input, shape, *parameters),
            lambda: add_rms_norm(input, residual, shape, *parameters, prenorm=True, **options),
        ]
    return calls


def check(torchs: Callable, calls: list[Callable], *words: str) -> None:
    """Each call raises an error of the type of torch's, with all words in its message."""
    expected = error_of(torchs)
    for call in calls:
        for requires_grad in (False, True):
            with torch.set_grad_enabled(requires_grad):
                error = error_of(call)
            assert type(error) is type(expected), error
            assert all(word in str(error) for word in words), error


@pytest.mark.smoke
@pytest.mark.parametrize("shape", [(7,), (3, 7), (4, 8), (2, 2, 3, 8), (-1,), (1,)], ids=str)
def test_normalized_shape_that_is_not_the_inputs(shape):
    check(lambda: F.layer_norm(X, shape), norms(shape=shape), "normalized_shape=", str(list(shape)), "[2, 3, 8]")


def test_empty_normalized_shape():
    check(lambda: F.layer_norm(X, ()), norms(shape=()), "at least 1-dimensional", "normalized_shape = []")


def test_scalar_input():
    scalar = torch.tensor(1.0)
    check(lambda: F.layer_norm(scalar, (1,)), norms(scalar, scalar, (1,)), "normalized_shape=[1]", "[]")


@pytest.mark.parametrize("shape", [(7,), (1,), (8, 1), (1, 8), ()], ids=str)
def test_parameter_shapes(shape):
    wrong = torch.randn(shape)
    words = ("[8]", str(list(shape)))
    check(lambda: F.layer_norm(X, (8,), wrong), norms(X, R, (8,), wrong), "weight", *words)
    check(lambda: F.layer_norm(X, (8,), V, wrong), norms(X, R, (8,), V, wrong), "bias", *words)
    calls = [lambda: add_layer_norm(X, R, (8,), input_bias=wrong), lambda: residual_add(X, R, wrong)]
    check(lambda: F.layer_norm(X, (8,), V, wrong), calls, "input_bias", *words)
    check(lambda: F.layer_norm(X, (8,), V, wrong), [lambda: bias_activation(X, wrong)], "bias", *words)


@pytest.mark.parametrize("shape", [(2, 3, 7), (3, 8), (2, 1, 8), (8,), (1,), (1, 2, 3, 8)], ids=str)
def test_residual_of_another_shape(shape):
    """Not even one that would broadcast: the gradient would be another operation."""
    wrong = torch.randn(shape)
    calls = [lambda: add_layer_norm(X, wrong, (8,)), lambda: residual_add(X, wrong)]
    check(lambda: torch.randn(2, 3, 8) + torch.randn(4, 9), calls, "residual", "[2, 3, 8]", str(list(shape)))


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.bool, torch.complex64, torch.uint8], ids=str)
def test_input_that_is_not_floating_point(dtype):
    wrong = torch.ones(2, 3, 8).to(dtype)
    torchs = lambda: F.layer_norm(wrong, (8,))  # noqa: E731
    check(torchs, norms(wrong, wrong), "expected float32, float64, bfloat16 or float16")
    calls = [lambda: residual_add(wrong, wrong), lambda: residual_add(X, wrong), lambda: add_layer_norm(X, wrong, (8,))]
    calls += [lambda: bias_activation(wrong)]
    check(torchs, calls, "expected float32, float64, bfloat16 or float16", "but got")


def test_residual_dtype_that_is_not_floating_point():
    for dtype in (torch.int64, torch.complex64):
        for call in (
            lambda dtype=dtype: residual_add(X, R, residual_dtype=dtype),
            lambda dtype=dtype: add_layer_norm(X, R, (8,), prenorm=True, residual_dtype=dtype),
        ):
            assert type(error_of(call)) is NotImplementedError


def test_devices():
    away = {"X": X.to("meta"), "V": V.to("meta")}
    words = ("meta", "cpu")
    check(lambda: F.layer_norm(X, (8,), away["V"]), norms(X, R, (8,), away["V"]), "weight", *words)
    check(lambda: F.layer_norm(X, (8,), V, away["V"]), norms(X, R, (8,), V, away["V"]), "bias", *words)
    calls = [
        lambda: residual_add(X, away["X"]),
        lambda: residual_add(away["X"], R),
        lambda: residual_add(X, R, away["V"]),
        lambda: add_layer_norm(X, away["X"], (8,)),
        lambda: add_layer_norm(X, R, (8,), input_bias=away["V"]),
        lambda: add_rms_norm(X, R, (8,), input_bias=away["V"]),
        lambda: residual_add(X, R, dropout_p=0.5, training=True, seed=SEED.to("meta")),
        lambda: residual_add(X, R, out=away["X"]),
        lambda: bias_activation(X, away["V"]),
        lambda: bias_activation(X, out=away["X"]),
        lambda: layer_norm(X, (8,), out=away["X"]),
        lambda: rms_norm(X, (8,), out=away["X"]),
        lambda: add_layer_norm(X, R, (8,), prenorm=True, out=(torch.empty_like(X), away["X"])),
    ]
    check(lambda: torch.add(X, away["X"]), calls, *words)


@pytest.mark.parametrize("activation", ["none", "elu", "GELU", ""])
def test_activation_that_is_none_of_ours(activation):
    for call in (lambda: bias_activation(X, V, activation), lambda: bias_activation(X, V, activation, out=X.clone())):
        error = error_of(call)
        assert type(error) is ValueError and "expected" in str(error).lower() and f"but got {activation}" in str(error)


@pytest.mark.parametrize("p", [-0.1, 1.0001, float("nan"), float("inf")])
def test_dropout_probability(p):
    """Checked in eval mode too, as torch.nn.functional.dropout does."""
    for training in (True, False):
        options = {"dropout_p": p, "training": training}
        calls = [lambda o=options: residual_add(X, R, **o), lambda o=options: add_layer_norm(X, R, (8,), **o)]
        if p == p:
            check(lambda: F.dropout(X, p), calls, "between 0 and 1", "but got")
        else:
            assert all(type(error_of(call)) is ValueError for call in calls)


@pytest.mark.parametrize("p", [-0.1, 1.0001, float("nan")])
def test_dropout_probability_at_the_dispatchers_door(p):
    functional.ensure_loaded()
    ops = torch.ops.resnorm
    assert type(error_of(lambda: ops.residual_add(X, R, None, p, SEED))) is ValueError
    assert type(error_of(lambda: ops.add_layer_norm(X, R, [8], dropout_p=p, seed=SEED))) is ValueError


@pytest.mark.parametrize(
    ("seed", "got"),
    [(torch.tensor([1]), "[1]"), (torch.tensor(1.0), "Float"), (torch.tensor(1, dtype=torch.int32), "Int")],
    ids=str,
)
def test_seed(seed, got):
    options = {"dropout_p": 0.5, "training": True, "seed": seed}
    for call in (lambda: residual_add(X, R, **options), lambda: add_layer_norm(X, R, (8,), **options)):
        error = error_of(call)
        assert type(error) is RuntimeError and "int64 scalar" in str(error) and got in str(error)


def test_missing_seed_at_the_dispatchers_door():
    functional.ensure_loaded()
    error = error_of(lambda: torch.ops.resnorm.residual_add(X, R, None, 0.5, None))
    assert type(error) is RuntimeError and "seed" in str(error) and "None" in str(error)


def test_a_python_integer_is_no_seed():
    assert type(error_of(lambda: residual_add(X, R, dropout_p=0.5, training=True, seed=3))) is TypeError


class TestOut:
    """Unlike torch's, which resize or cast: a result that does not fit is a mistake."""

    @pytest.mark.parametrize("shape", [(2, 3, 7), (6, 8), (0,)], ids=str)
    def test_shape(self, shape):
        out = torch.empty(shape)
        for call in self.calls(out):
            error = error_of(call)
            assert type(error) is RuntimeError and "[2, 3, 8]" in str(error) and str(list(shape)) in str(error)
        assert out.shape == shape

    def test_dtype(self):
        out = torch.empty(2, 3, 8, dtype=torch.int64)
        expected = error_of(lambda: torch.add(X, R, out=out))
        for dtype in (torch.int64, torch.bfloat16, torch.float64):
            for call in self.calls(out.to(dtype)):
                assert type(error_of(call)) is type(expected)

    def calls(self, out) -> list[Callable]:
        return [
            lambda: layer_norm(X, (8,), out=out),
            lambda: residual_add(X, R, out=out),
            lambda: bias_activation(X, out=out),
            lambda: add_layer_norm(X, R, (8,), out=out),
            lambda: add_layer_norm(X, R, (8,), prenorm=True, out=(torch.empty_like(X), out)),
            lambda: rms_norm(X, (8,), out=out),
            lambda: add_rms_norm(X, R, (8,), prenorm=True, out=(torch.empty_like(X), out)),
        ]

    def test_nothing_is_written_when_an_argument_is_wrong(self):
        out = torch.zeros(2, 3, 8)
        error_of(lambda: add_layer_norm(X, R, (8,), V[:7], out=out))
        error_of(lambda: add_layer_norm(X, R, (8,), prenorm=True, out=(out, out[..., :7])))
        assert not out.any()

    def test_a_single_tensor_for_two_results(self):
        error = error_of(lambda: add_layer_norm(X, R, (8,), prenorm=True, out=torch.empty(2, 3, 8)))
        assert type(error) is TypeError and "(y, s)" in str(error) and "Tensor" in str(error)

    def test_two_tensors_for_one_result(self):
        error = error_of(lambda: add_layer_norm(X, R, (8,), out=(torch.empty(2, 3, 8), torch.empty(2, 3, 8))))
        assert type(error) is TypeError and "Tensor" in str(error) and "tuple" in str(error)

    def test_an_inference_tensor_is_not_written(self):
        with torch.inference_mode():
            out = torch.zeros(2, 3, 8)
        for call in (
            lambda: layer_norm(X, (8,), out=out),
            lambda: add_layer_norm(X, R, (8,), out=out),
            lambda: rms_norm(X, (8,), out=out),
        ):
            assert "inference tensor" in str(error_of(call))
            assert not out.any()


@pytest.mark.parametrize(
    ("ours", "torchs"),
    [
        (lambda: layer_norm(X, 8), lambda: F.layer_norm(X, 8)),
        (lambda: layer_norm(X, "8"), lambda: F.layer_norm(X, "8")),
        (lambda: layer_norm(X, (8.0,)), lambda: F.layer_norm(X, (8.0,))),
        (lambda: layer_norm(None, (8,)), lambda: F.layer_norm(None, (8,))),
        (lambda: layer_norm([1.0], (1,)), lambda: F.layer_norm([1.0], (1,))),
        (lambda: layer_norm(X, (8,), [1.0] * 8), lambda: F.layer_norm(X, (8,), [1.0] * 8)),
        (lambda: layer_norm(X, (8,), eps="a"), lambda: F.layer_norm(X, (8,), eps="a")),
        (lambda: rms_norm(X, 8), lambda: F.rms_norm(X, 8)),
        (lambda: rms_norm(X, (8,), eps="a"), lambda: F.rms_norm(X, (8,), eps="a")),
        (lambda: rms_norm(X, (8,), V, V), lambda: F.rms_norm(X, (8,), V, V)),
        (lambda: layer_norm(X, (8,), eps=None), lambda: F.layer_norm(X, (8,), eps=None)),
        (lambda: layer_norm(), lambda: F.layer_norm()),
        (lambda: layer_norm(X, (8,), epsilon=1), lambda: F.layer_norm(X, (8,), epsilon=1)),
        (lambda: residual_add(X, None), lambda: torch.add(X, None)),
        (lambda: residual_add(X, 1.0), lambda: torch.add(X, "1")),
        (lambda: add_layer_norm(X, 1.0, (8,)), lambda: torch.add(X, "1")),
        (lambda: layer_norm(X.to_sparse(), (8,)), lambda: F.layer_norm(X.to_sparse(), (8,))),
    ],
)
def test_arguments_of_the_wrong_kind(ours, torchs):
    assert type(error_of(ours)) is type(error_of(torchs))


def test_lists_and_sizes_are_normalized_shapes_as_in_torch():
    expected = F.layer_norm(X, (3, 8))
    for shape in ([3, 8], (3, 8), torch.Size([3, 8]), X.shape[1:]):
        torch.testing.assert_close(layer_norm(X, shape), expected)


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64])
def test_other_dtypes_while_a_call_is_traced(dtype):
    with FakeTensorMode():
        x = torch.ones(2, 8, dtype=dtype)
        for call in (lambda: layer_norm(x, (8,)), lambda: residual_add(x, x), lambda: add_layer_norm(x, x, (8,))):
            error = error_of(call)
            assert type(error) is RuntimeError and "expected float32, float64" in str(error)


MEAN, BIAS = torch.zeros(2, 3), torch.zeros(8)
NORM = {"grad_output": X, "grad_sum": X, "sum": X, "mean": MEAN, "rstd": MEAN, "input_bias": BIAS, "dropout_p": 0.0}
NORM |= {"seed": None, "residual_dtype": torch.float32, "normalized_shape": [8], "weight": V, "bias": BIAS, "eps": 1e-5}
NORM |= {"centered": True, "output_mask": [True] * 5}
RESIDUAL_ADD = {"grad_output": X, "input_bias": BIAS, "dropout_p": 0.0, "seed": None, "input_dtype": torch.float32}
RESIDUAL_ADD |= {"output_mask": [True] * 2}
BIAS_ACTIVATION = {"grad_output": X, "input": X, "bias": BIAS, "activation": "gelu", "dropout_p": 0.0, "seed": None}
BIAS_ACTIVATION |= {"output_mask": [True] * 3}
BACKWARD = {"_norm": NORM, "_residual_add": RESIDUAL_ADD, "_bias_activation": BIAS_ACTIVATION}


@pytest.mark.parametrize("requires_grad", [False, True], ids=["kernel", "formula"])
@pytest.mark.parametrize(
    ("operator", "change", "expected", "got"),
    [
        (operator, change, expected, got)
        for change, expected, got in [
            ({"grad_output": X[:1]}, "[2, 3, 8]", "[1, 3, 8]"),
            ({"mean": MEAN[:1]}, "[2, 3]", "[1, 3]"),
            ({"mean": None}, "a mean", "None"),
            ({"centered": False}, "no mean", "one"),
            ({"rstd": MEAN.double()}, "Float", "Double"),
            ({"weight": V[:7]}, "[8]", "[7]"),
            ({"weight": None}, "weight", "None"),
            ({"bias": None}, "bias", "None"),
            ({"input_bias": None}, "input_bias", "None"),
            ({"input_bias": BIAS[:1]}, "[8]", "[1]"),
            ({"dropout_p": 0.5}, "seed", "None"),
        ]
        for operator, arguments in BACKWARD.items()
        if arguments.keys() >= change.keys() and not (operator == "_residual_add" and "grad_output" in change)
    ],
)
def test_bad_arguments_of_backward_at_the_dispatchers_door(operator, change, expected, got, requires_grad):
    functional.ensure_loaded()
    arguments = BACKWARD[operator] | change
    arguments["grad_output"] = arguments["grad_output"].detach().requires_grad_(requires_grad)
    error = error_of(lambda: getattr(torch.ops.resnorm, operator + "_backward")(**arguments))
    assert type(error) is RuntimeError and expected in str(error) and got in str(error)
