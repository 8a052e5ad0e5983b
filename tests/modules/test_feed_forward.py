# SPDX-License-Identifier: BSD-3-Clause
from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import resnorm_ext.modules as rn

TOLERANCE = {"rtol": 1e-9, "atol": 1e-11}  # float64 sums of a few dozen terms near 1, in two orders


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize(
    "activation",
    ["relu", "gelu", F.relu, F.gelu, F.silu, nn.ReLU(), nn.GELU(), nn.GELU("tanh"), nn.Tanh()],
    ids=lambda a: a if isinstance(a, str) else getattr(a, "__name__", str(a)),
)
@pytest.mark.parametrize("shape", [(8,), (3, 8), (2, 3, 8), (0, 8)], ids=str)
def test_forward_and_gradients(shape, activation, bias):
    module = rn.FeedForward(8, 12, 0.0, activation, bias, dtype=torch.float64)
    function = {"relu": F.relu, "gelu": F.gelu}.get(activation, activation)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    expected = F.linear(function(F.linear(x, module.linear1.weight, module.linear1.bias)), *module.linear2.parameters())
    output = module(x)
    torch.testing.assert_close(output, expected, **TOLERANCE)
    inputs = [x, *module.parameters()]
    grad_output = torch.randn_like(output)
    torch.testing.assert_close(
        torch.autograd.grad(output, inputs, grad_output),
        torch.autograd.grad(expected, inputs, grad_output),
        **TOLERANCE,
    )
    with torch.no_grad():
        torch.testing.assert_close(module(x), expected, **TOLERANCE)


def test_state_dict_is_that_of_an_encoder_layer():
    module, layer = rn.FeedForward(8, 12), nn.TransformerEncoderLayer(8, 2, 12)
    expected = {name: value for name, value in layer.state_dict().items() if name.startswith("linear")}
    assert list(module.state_dict()) == list(expected)
    module.load_state_dict(expected, strict=True)


def test_hooks_and_activations_with_state_take_effect():
    module = rn.FeedForward(8, 12, 0.0, nn.GELU(), dtype=torch.float64)
    x = torch.randn(3, 8, dtype=torch.float64)
    expected = module(x)
    module.activation.register_forward_hook(lambda m, a, output: output * 0)
    torch.testing.assert_close(module(x), module.linear2.bias.expand(3, 8), **TOLERANCE)
    module.activation = nn.GELU()
    module.linear2.register_forward_hook(lambda m, a, output: output * 2)
    torch.testing.assert_close(module(x), 2 * expected, **TOLERANCE)


def test_dropout_acts_in_train_mode_only():
    module = rn.FeedForward(8, 12, 1.0)
    x = torch.randn(3, 8)
    torch.testing.assert_close(module(x), module.linear2.bias.expand(3, 8), rtol=0, atol=0)
    assert not torch.allclose(module.eval()(x), module.linear2.bias.expand(3, 8))


def test_bad_arguments():
    with pytest.raises(RuntimeError, match="selu"):
        rn.FeedForward(8, 12, activation="selu")
    with pytest.raises(ValueError, match="between 0 and 1"):
        rn.FeedForward(8, 12, dropout=-0.1)
    with pytest.raises(RuntimeError):
        rn.FeedForward(8, 12)(torch.randn(3, 9))
