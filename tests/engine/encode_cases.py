# SPDX-License-Identifier: BSD-3-Clause
"""Stacks of layers for torch.ops.resnorm.encode, and what torch.nn gives for them in float64."""

from __future__ import annotations

import copy
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

DIM, HEADS, HIDDEN = 16, 2, 24
ACTIVATIONS = {"relu": F.relu, "gelu": F.gelu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh")}
MASKS = {
    "none": None,
    "full": [[1] * 5] * 3,
    "right": [[1] * 5, [1, 1, 0, 0, 0], [1, 0, 0, 0, 0]],
    "left": [[1] * 5, [0, 0, 0, 1, 1], [0, 0, 0, 0, 1]],
    "holes": [[1] * 5, [1, 0, 1, 1, 0], [1, 0, 0, 0, 1]],
    "hidden": [[1] * 5, [0] * 5, [1, 1, 1, 0, 0]],
}
PADDINGS = ["skip", "skip_unless_first", "skip_if_trailing"]
TOLERANCE = {torch.float64: 1e-11, torch.float32: 2e-5, torch.float16: 1e-2, torch.bfloat16: 8e-2}


def torch_layers(count: int = 2, *, dim: int = DIM, hidden: int = HIDDEN, activation: str = "gelu", **options):
    """float64, in eval mode."""
    options = {"batch_first": True, "activation": ACTIVATIONS[activation], "dtype": torch.float64} | options
    layers = [nn.TransformerEncoderLayer(dim, HEADS, hidden, **options) for _ in range(count)]
    for name, parameter in (pair for layer in layers for pair in layer.named_parameters()):
        scale = parameter.shape[-1] ** -0.5 if parameter.dim() == 2 else 0.3
        nn.init.normal_(parameter, mean=float("norm" in name and "weight" in name), std=scale)
    return nn.ModuleList(layers).eval()


def parameters_of(layers: Iterable[nn.TransformerEncoderLayer], *, separate: bool = False) -> list:
    result = []
    for layer in layers:
        attention = layer.self_attn
        joined = [attention.in_proj_weight, attention.in_proj_bias]
        chunks = [[None] * 3 if each is None else each.chunk(3) for each in joined]
        result += [each for pair in zip(*chunks) for each in pair] if separate else joined
        for module in (attention.out_proj, layer.norm1, layer.linear1, layer.linear2, layer.norm2):
            result += [module.weight, module.bias]
    return result


def encode(x, mask, parameters, count: int = 2, **options):
    options = {"head_dim": DIM // HEADS, "scale": (DIM // HEADS) ** -0.5, "eps": 1e-5, "activation": "gelu"} | options
    return torch.ops.resnorm.encode(x, mask, parameters, count, **options)


def reference(x, mask, layers, *, causal: bool = False, padding: str | None = None) -> Tensor:
    """In float64. Grad mode keeps torch.nn from its fast path."""
    x, layers = x.double(), copy.deepcopy(layers).double()
    future = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1) if causal else None
    with torch.enable_grad():
        for layer in layers:
            x = layer(x, src_mask=future, src_key_padding_mask=None if mask is None else ~mask)
    if mask is not None and padding is not None and not computes_padding(mask.tolist(), padding):
        x = x.masked_fill(~mask.unsqueeze(-1), 0)
    return x.detach()


def computes_padding(mask: list[list[bool]], padding: str) -> bool:
    if padding == "skip_unless_first":
        return not all(row[0] for row in mask)
    return padding == "skip_if_trailing" and any(row != sorted(row, reverse=True) for row in mask)


def mask_of(name: str) -> Tensor | None:
    return None if MASKS[name] is None else torch.tensor(MASKS[name], dtype=torch.bool)


def case(dtype: torch.dtype = torch.float32, **options):
    """Layers of that dtype, their parameters as the operator takes them without grad, and an input."""
    layers = torch_layers(**options).to(dtype)
    parameters = [each if each is None else each.detach() for each in parameters_of(layers)]
    return layers, parameters, torch.randn(3, 5, DIM).to(dtype)


def assert_close(actual, expected, dtype: torch.dtype = torch.float32) -> None:
    torch.testing.assert_close(actual.double(), expected.double(), rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
