# SPDX-License-Identifier: BSD-3-Clause
"""Hugging Face's models that loop over their layers themselves: the first layer runs all of them in one call where it
can, and the others hand on what it gave.

The model's pre-hook says so to them, by an argument that such models pass on to every layer.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..engine.packing import pack
from ..modules.calls import record
from ..modules.originals import Originals
from ..modules.padding import PaddingChoice
from ..recording import is_exported
from .replace import Replacement, original_forward
from .spec import TransformersLayer
from .stack import LayerStack, encode_packed, encode_traced, keys_only, packed_batch


class StackCall:
    """One call of a model's layers.

    Attributes:
        layers: all of them.
        masked: whether the model was given a mask; it may make one all the same, which hides nothing.
        is_open: whether none of them has been called yet.
        output: what they give, once the first has run them all; None before, and where it could not.
    """

    def __init__(self, layers: nn.ModuleList, masked: bool) -> None:
        self.layers, self.masked = layers, masked
        self.is_open = True
        self.output: Tensor | None = None


class StackLayer(Replacement, nn.Module):
    """A layer that runs the whole stack that it is the first of. Padding is skipped by those that are a PaddingChoice
    too, as text encoders do (varlen.py), at the first one's choice.

    Attributes:
        spec: how the layers are made.
        looped: the class of the model; set by Family, as the next two.
        model_originals: how it calls them.
        mask_position: how many arguments come before the mask.
        clamps_float16: whether the original keeps float16 outputs finite.
    """

    chooses_path = True

    spec: TransformersLayer
    looped: type[nn.Module]
    model_originals: Originals
    mask_position: int
    clamps_float16 = False

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        resnorm_call: StackCall | None = None,
        **kwargs: Any,
    ) -> Tensor:
        forward = original_forward(self, StackLayer)
        if forward is not None:
            return forward(hidden_states, attention_mask, **kwargs)
        if resnorm_call is not None and resnorm_call.output is not None:
            record(self, "packed")
            return resnorm_call.output
        owners = [self]
        if resnorm_call is not None and resnorm_call.is_open:
            resnorm_call.is_open = False
            owners = [resnorm_call.layers, self]
        mask = None if resnorm_call is not None and not resnorm_call.masked else attention_mask
        output = None
        for owner in owners:
            output = self._encode(owner, hidden_states, mask, kwargs)
            if isinstance(output, Tensor):
                if owner is not self:
                    resnorm_call.output = output
                return output
        if not torch.compiler.is_compiling():
            record(self, "original", output)
        return self.fused(hidden_states, attention_mask, **kwargs)

    def fused(self, hidden_states: Tensor, attention_mask: Tensor | None, **kwargs: Any) -> Tensor:
        """The layer alone, on fused operators where it has some."""
        return super().forward(hidden_states, attention_mask, **kwargs)

    def layer_stack(self, owner: nn.Module) -> LayerStack:
        """Of all layers that ``owner`` holds, or of this layer alone."""
        return LayerStack(
            owner=owner,
            layers=(self,) if owner is self else owner,
            spec=self.spec,
            caller=self,
            configs=[],
            originals=self.spec.originals,
            names_read=self.spec.names_read,
            padding=self.padding if isinstance(self, PaddingChoice) else "compute",
            name="the layer" if owner is self else "layers.{}",
        )

    def _encode(
        self, owner: nn.Module, x: Tensor, attention_mask: Tensor | None, arguments: dict[str, Any]
    ) -> Tensor | str | None:
        """The output of ``layer_stack(owner)``, or why it is not to run."""
        if attention_mask is not None and not isinstance(self, PaddingChoice):
            return "attention_mask is given"
        if self.clamps_float16 and x.dtype == torch.float16:
            return "float16 outputs are clamped"
        if torch.compiler.is_compiling():
            layers = (self,) if owner is self else owner
            return encode_traced(self, owner, layers, self.spec, x, attention_mask, arguments)
        stack = self.layer_stack(owner)
        batch = packed_batch(stack, x, attention_mask, arguments)
        return batch if isinstance(batch, str) else encode_packed(stack, pack(x, batch.packing), batch)


def announce_stack(model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
    """Forward pre-hook of the model."""
    layers = model.layers
    if is_exported() or len(layers) == 0 or not all(isinstance(layer, StackLayer) for layer in layers):
        return None
    first = layers[0]
    if "forward" in model.__dict__ or type(model).forward is not first.looped.forward:  # it may leave layers out
        return None
    if model.training and getattr(model, "layerdrop", 0.0) > 0.0:  # then it does
        return None
    if first.model_originals.reason() is not None:
        return None
    masked = kwargs.get("attention_mask") is not None or len(args) > first.mask_position
    kwargs = kwargs | {"resnorm_call": StackCall(layers, masked)}
    if torch.compiler.is_compiling() and isinstance(first, PaddingChoice):
        mask = kwargs.get("attention_mask")
        if isinstance(mask, Tensor) and mask.dim() == 2 and not torch.is_grad_enabled():
            kwargs["attention_mask"] = keys_only(model, mask)
    return args, kwargs
