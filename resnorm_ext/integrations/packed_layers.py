# SPDX-License-Identifier: BSD-3-Clause
"""Hugging Face's post-norm encoder layers on packed batches: their weights, if they are as they were built, and whether
a call may take this path."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.activations import GELUActivation, NewGELUActivation

from ..engine.linear import LinearShape, prepare_linear
from ..engine.packing import unpack
from ..engine.post_norm import Norm, PostNormLayer, encode
from ..modules.eligibility import activation_name
from .replace import named_modules
from .transformers import (
    PackedBatch,
    attention_obstacle,
    captures_outputs,
    hides_first_position,
    is_as_built,
    key_mask_of,
    mode_obstacle,
    packing_of_mask,
)

_log = logging.getLogger(__name__)

WITHOUT_EFFECT = ("cache_position", "return_dict")  # on what an encoder computes


@dataclass(frozen=True)
class LayerKind:
    """How a library's layer is made.

    Attributes:
        types: the classes that the layer may have.
        parts: the modules that it is made of, by name, and the classes that they may have. Those below are among them.
        num_heads: the attention's attribute.
        dropouts: those on what is added to the residual.
        activation: the module and the attribute of it that holds the function.
        chunked: the module and the method of it that the feed-forward runs by, which an instance may have its own of.
    """

    types: tuple[type[nn.Module], ...]
    parts: dict[str, tuple[type[nn.Module], ...]]
    attention: str
    num_heads: str
    projections: tuple[str, str, str]
    attention_dropout: str
    attention_output: str
    attention_norm: str
    intermediate: str
    activation: tuple[str, str]
    output: str
    output_norm: str
    dropouts: tuple[str, ...]
    chunked: tuple[str, str]
    eager_attention: Callable

    def activation_of(self, parts: dict[str, nn.Module]) -> str | None:
        module, attribute = self.activation
        return _activation_name(getattr(parts[module], attribute))

    def denses(self) -> tuple[str, str, str]:
        return self.attention_output, self.intermediate, self.output


def acts(dropout: nn.Dropout) -> bool:
    """Whether ``dropout`` drops anything."""
    return dropout.training and dropout.p > 0.0


def _parts_as_built(layer: nn.Module, kind: LayerKind) -> dict[str, nn.Module] | str:
    """The parts of ``layer``; or the name of what is not as it was built, and why."""
    if not is_as_built(layer, *kind.types):
        return _not_as_built(layer, *kind.types)
    parts = {"": layer}
    for name, types in kind.parts.items():
        parent, _, child = name.rpartition(".")
        part = parts[parent]._modules.get(child)
        if not is_as_built(part, *types):
            return f".{name}{_not_as_built(part, *types)}"
        parts[name] = part
    module, method = kind.chunked
    if method in parts[module].__dict__:
        return f"{module and '.'}{module} has a {method} of its own"
    if kind.activation_of(parts) is None:
        return f".{'.'.join(kind.activation)} is neither ReLU nor GELU, or has hooks"
    return parts


def _not_as_built(module: nn.Module | None, *types: type[nn.Module]) -> str:
    actual = type(module)
    if actual in types:
        return " has hooks, a forward or tensors of its own"
    return f" is a {actual.__module__}.{actual.__qualname__}, not a {types[-1].__name__}"


def post_norm_layer(layer: nn.Module, kind: LayerKind, dtype: torch.dtype) -> PostNormLayer | str:
    """``layer`` for a packed call in ``dtype``; or what stands against it."""
    parts = _parts_as_built(layer, kind)
    if isinstance(parts, str):
        return parts
    attention = parts[kind.attention]
    if getattr(layer, "is_decoder", False) or attention.is_causal:
        return " is a decoder's"
    attention_drops = attention.training and parts[kind.attention_dropout].p > 0.0
    if attention_drops or any(acts(parts[name]) for name in kind.dropouts):
        return " is in training: dropout acts"
    try:
        linears = {name: _weight_and_bias(parts[name]) for name in (*kind.projections, *kind.denses())}
        norms = {
            name: Norm(*_weight_and_bias(parts[name]), parts[name].eps)
            for name in (kind.attention_norm, kind.output_norm)
        }
    except KeyError as error:
        return f" has a {error} that is not a parameter"
    if any(weight.dtype != dtype or not weight.is_cpu for weight, _ in linears.values()):
        return f" is not in {dtype} on the CPU, as its input"
    projections = [linears[name] for name in kind.projections]
    if len({bias is None for _, bias in projections}) > 1:
        return f".{kind.attention} has biases for some of its projections only"
    return PostNormLayer(
        num_heads=getattr(attention, kind.num_heads),
        scale=attention.scaling,
        qkv=prepare_linear(*projections),
        attention_output=prepare_linear(linears[kind.attention_output]),
        attention_norm=norms[kind.attention_norm],
        intermediate=prepare_linear(linears[kind.intermediate]),
        activation=kind.activation_of(parts),
        output=prepare_linear(linears[kind.output]),
        output_norm=norms[kind.output_norm],
    )


def _weight_and_bias(module: nn.Module) -> tuple[Tensor, Tensor | None]:
    """Raises KeyError where they are not parameters. nn.Module's attributes cost more than all else here."""
    return module._parameters["weight"], module._parameters["bias"]


def _activation_name(function: Any) -> str | None:
    """The name by which ``functional.linear`` knows ``function``."""
    if is_as_built(function, GELUActivation) and function.act in (F.gelu, function._gelu_python):
        return "gelu"
    if is_as_built(function, NewGELUActivation):
        return "gelu_tanh"
    return activation_name(function)


def linear_shapes(model: nn.Module, kind: LayerKind) -> Iterator[LinearShape]:
    """Of the products that the packed path of the models in ``model`` has."""
    for _, layer in named_modules(model, kind.types[0]):
        parts = _parts_as_built(layer, kind)
        if isinstance(parts, str):
            continue
        query, *_ = projections = [parts[name] for name in kind.projections]
        if not query.weight.is_cpu:
            continue
        yield LinearShape(query.weight.dtype, query.in_features, sum(linear.out_features for linear in projections))
        for linear in (parts[name] for name in kind.denses()):
            yield LinearShape(linear.weight.dtype, linear.in_features, linear.out_features)


def encoder_obstacle(encoder: nn.Module, kind: LayerKind) -> str | None:
    """What about its modules keeps ``encoder`` from the packed path at present."""
    for index, layer in enumerate(encoder.layer):
        parts = _parts_as_built(layer, kind)
        if isinstance(parts, str):
            return f"layer.{index}{parts}"
    return None


def packed_batch_of_encoder(
    encoder: nn.Module,
    kind: LayerKind,
    config: PreTrainedConfig,
    x: Tensor,
    attention_mask: Tensor | None,
    arguments: dict[str, Any],
) -> PackedBatch | str:
    """What ``encoder``'s call on padded hidden states packs; or why it cannot."""
    if captures_outputs():
        return "hidden states or attention weights are asked for"
    others = {name: value for name, value in arguments.items() if name not in ("position_ids", *WITHOUT_EFFECT)}
    layers = layers_to_run(encoder, kind, config, x, x.dtype, others)
    if isinstance(layers, str):
        return layers
    key_mask = None
    if attention_mask is not None:
        if attention_mask.dtype == torch.bool and config._attn_implementation != "sdpa":
            return "the attention adds its mask to the scores, and this one is bool"
        key_mask = key_mask_of(attention_mask, *x.shape[:2])
        if key_mask is None:
            return "the attention mask does not only hide keys"
        if hides_first_position(key_mask):
            return "position 0 is hidden, and a pooler may read it"
    return PackedBatch(packing_of_mask(key_mask, *x.shape[:2]), layers)


def layers_to_run(
    encoder: nn.Module,
    kind: LayerKind,
    config: PreTrainedConfig,
    x: Tensor,
    dtype: torch.dtype,
    arguments: dict[str, Any],
) -> list[PostNormLayer] | str:
    """``encoder``'s layers for a packed call on ``x`` with these further arguments; or what stands against it."""
    obstacle = mode_obstacle(x) or attention_obstacle(config, kind.eager_attention)
    if obstacle is not None:
        return obstacle
    if x.is_floating_point() and x.dtype != dtype:
        return f"the input is {x.dtype}, not {dtype}"
    for name, value in arguments.items():
        if value is not None and value is not False:
            return f"{name} is given"
    layers = []
    for index, module in enumerate(encoder.layer._modules.values()):
        layer = post_norm_layer(module, kind, dtype)
        if isinstance(layer, str):
            return f"layer.{index}{layer}"
        layers.append(layer)
    return layers or "there are no layers"


def encode_packed(encoder: nn.Module, tokens: Tensor, batch: PackedBatch) -> Tensor:
    """The last layer's output for the packed ``tokens``, padded again."""
    packing = batch.packing
    _log.debug(
        "%s: packed, %d tokens of %d x %d", type(encoder).__name__, len(tokens), packing.batch_size, packing.length
    )
    return unpack(encode(tokens, packing.cu_seqlens, batch.layers), packing)


def log_obstacle(encoder: nn.Module, obstacle: str) -> None:
    _log.debug("%s: original computation, because %s", type(encoder).__name__, obstacle)
