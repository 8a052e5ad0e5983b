# SPDX-License-Identifier: BSD-3-Clause
"""What torch.ops.resnorm.encode refuses, and in which words."""

from __future__ import annotations

import pytest
import torch

from .encode_cases import DIM, case, encode, mask_of, parameters_of, torch_layers

pytestmark = pytest.mark.usefixtures("fresh")


def replaced(index: int, change) -> dict:
    """The arguments of a call whose parameter of this index is changed."""
    _, parameters, _ = case()
    parameters[index] = change(parameters[index])
    return {"parameters": parameters}


ERRORS = {  # arguments that differ from a right call's, exception, message
    "two dimensions": (lambda: {"x": torch.ones(5, DIM)}, RuntimeError, r"\(batch, length, dim\), but got \[5, 16\]"),
    "integers": (
        lambda: {"x": torch.ones(3, 5, DIM, dtype=torch.long)},
        NotImplementedError,
        "expected float32, float64, bfloat16 or float16, but got Long",
    ),
    "sparse": (lambda: {"x": torch.ones(3, 5, DIM).to_sparse()}, (RuntimeError, NotImplementedError), "[Ss]parse"),
    "mask of floats": (lambda: {"mask": torch.ones(3, 5)}, RuntimeError, "key_mask of dtype Bool on cpu.*got Float"),
    "mask of another shape": (
        lambda: {"mask": torch.ones(3, 4, dtype=torch.bool)},
        RuntimeError,
        r"key_mask to be of shape \[3, 5\], but got key_mask of shape \[3, 4\]",
    ),
    "mask on another device": (
        lambda: {"mask": torch.ones(3, 5, dtype=torch.bool, device="meta")},
        RuntimeError,
        "key_mask of dtype Bool on cpu, the input's device, but got Bool on meta",
    ),
    "a parameter too few": (
        lambda: {"parameters": case()[1][:-1]},
        RuntimeError,
        "12 or 16 parameters for each of at least one layer, but got 23 for 2 layers",
    ),
    "no layers": (lambda: {"parameters": [], "count": 0}, RuntimeError, "at least one layer, but got 0 for 0 layers"),
    "negative layers": (lambda: {"parameters": [], "count": -1}, RuntimeError, "but got 0 for -1 layers"),
    "no weight": (lambda: replaced(2, lambda _: None), RuntimeError, "weights of all linear layers, but got None"),
    "vector for a weight": (
        lambda: replaced(2, lambda w: w[0]),
        RuntimeError,
        r"the attention's output of layer 0 to be of shape \(out_features, 16\), but got \[16\]",
    ),
    "in_features": (
        lambda: replaced(18, lambda w: w[:, 1:]),
        RuntimeError,
        r"the feed-forward's input of layer 1 to be of shape \(out_features, 16\), but got \[24, 15\]",
    ),
    "out_features": (
        lambda: replaced(20, lambda w: w[1:]),
        RuntimeError,
        r"the bias of the feed-forward's output of layer 1 to be of shape \[15\], but got \[16\]",
    ),
    "part of a head": (lambda: replaced(0, lambda w: w[:45]), RuntimeError, r"to be of shape \[45\], but got \[48\]"),
    "head_dim": (lambda: {"head_dim": 5}, RuntimeError, "whole heads of 5 features each in layer 0, but got 48"),
    "no head_dim": (lambda: {"head_dim": 0}, ValueError, "head_dim > 0, but got 0"),
    "norm's shape": (lambda: replaced(4, lambda w: w[1:]), RuntimeError, r"shape \[16\], but got .* shape \[15\]"),
    "norm's dtype": (
        lambda: replaced(5, torch.Tensor.double),
        RuntimeError,
        "dtype Float .*got a norm's bias of Double",
    ),
    "dtype": (
        lambda: replaced(8, torch.Tensor.bfloat16),
        RuntimeError,
        "the feed-forward's output of layer 0 to be Float on cpu, as the input is, but got BFloat16 on cpu",
    ),
    "device": (lambda: replaced(8, lambda w: w.to("meta")), RuntimeError, "Float on cpu.* but got Float on meta"),
    "norm's device": (lambda: replaced(10, lambda w: w.to("meta")), RuntimeError, "on cpu.* but got .* on meta"),
    "activation": (lambda: {"activation": "silu"}, ValueError, "relu, gelu or gelu_tanh, but got silu"),
    "padding": (
        lambda: {"padding": "compute"},
        ValueError,
        "skip, skip_unless_first or skip_if_trailing, but got compute",
    ),
}


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("name", ERRORS)
def test_what_does_not_fit_is_refused(name, grad):
    change, error, message = ERRORS[name]
    _, parameters, x = case()
    arguments = {"x": x, "mask": mask_of("right"), "parameters": parameters} | change()
    if grad and arguments["x"].is_floating_point():
        arguments["x"] = arguments["x"].requires_grad_()
    with pytest.raises(error, match=message):
        encode(**arguments)


def test_separate_projections_that_differ_are_refused():
    parameters = parameters_of(torch_layers(1), separate=True)
    for changes, message in (
        ({1: None}, "biases for all projections of layer 0 or for none"),
        ({3: None}, "biases for all projections of layer 0 or for none"),
        ({2: parameters[2][:8], 3: parameters[3][:8]}, "as many queries, keys and values in layer 0"),
    ):
        changed = [changes.get(i, each) for i, each in enumerate(parameters)]
        with pytest.raises(RuntimeError, match=message):
            encode(torch.ones(3, 5, DIM).double(), None, changed, 1)
