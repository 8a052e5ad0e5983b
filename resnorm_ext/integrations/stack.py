# SPDX-License-Identifier: BSD-3-Clause
"""Stacks of Hugging Face's layers in one call on packed batches: whether a call may take this path, and the path."""

from __future__ import annotations

from collections.abc import Sequence
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from .. import cuda_attention
from ..build.extension import assume_constant_result
from ..engine.encode import encode_padded
from ..engine.packing import Packing, is_recorded, pack, unpack
from ..engine.prepared import PREPARED, PreparedLayers, prepared_layers
from ..engine.spec import LayerOptions
from ..modules.calls import record
from ..modules.eligibility import autocast_reason, grad_reason, has_global_hooks
from ..modules.originals import Originals
from ..recording import is_exported
from .eligibility import (
    attention_reason,
    captures_outputs,
    hides_first_position,
    key_mask_of,
    mode_reason,
    packing_of_mask,
)
from .packed_layers import PackedLayers, drops, layers_reason
from .spec import TransformersLayer

# The heads that are running, each with whether its result reads padded positions (heads.py).
reads_padding: ContextVar[tuple[tuple[int, bool], ...]] = ContextVar("reads_padding", default=())
READS_PADDING = "resnorm_reads_padding"  # the argument that says so in a traced call


class LayerStack(NamedTuple):
    """Layers that one call runs.

    Attributes:
        owner: the module that keeps what inference makes of them: that holds them, or is the only one.
        layers: at least those.
        spec: how they are made.
        caller: the module whose path ``report`` tells of.
        configs: of the modules around them.
        originals: what the call stands for.
        names_read: the names of arguments that it would do anything with.
        padding: what is done about it (modules/padding.py).
        name: of a layer, for people, with a place for its index.
        trains: whether ``PackedLayers`` computes what they do.
    """

    owner: nn.Module
    layers: Sequence[nn.Module]
    spec: TransformersLayer
    caller: nn.Module
    configs: list[PreTrainedConfig]
    originals: Originals
    names_read: frozenset[str]
    padding: str
    name: str = "layer.{}"
    trains: bool = False

    def given(self, arguments: dict[str, Any]) -> str | None:
        """That one of ``arguments`` is given that the originals read."""
        for name, value in arguments.items():
            if value is not None and value is not False and name in self.names_read:
                return f"{name} is given"
        return None

    def attention_reason(self, configs: Sequence[PreTrainedConfig]) -> str | None:
        unique = {id(config): config for config in (*self.configs, *configs)}.values()
        return attention_reason(unique, self.spec.eager_attention, is_causal=self.spec.is_causal)


class PackedBatch(NamedTuple):
    """A batch that is to go through ``layers`` without padding."""

    layers: PreparedLayers | PackedLayers
    packing: Packing


def lasting_reason(
    spec: TransformersLayer,
    layers: Sequence[nn.Module],
    configs: Sequence[PreTrainedConfig] = (),
    name: str = "layer.{}",
) -> str | None:
    """What keeps ``layers`` from this path at every call, as they are now; ``configs`` are of the modules around."""
    changed = spec.originals.reason()
    if changed is not None:
        return changed
    configs = list(configs)
    for index, layer in enumerate(layers):
        reason = spec.lasting_reason(layer)
        if reason is not None:
            return f"{name.format(index)}{reason}"
        configs.append(layer.get_submodule(spec.attention).config)
    return attention_reason(configs, spec.eager_attention, is_causal=spec.is_causal)


def layers_to_run(stack: LayerStack, x: Tensor, dtype: torch.dtype, arguments: dict[str, Any]) -> PreparedLayers | str:
    """The layers for a packed call on ``x`` with these further arguments; or what stands against it."""
    if captures_outputs():
        return "hidden states or attention weights are asked for"
    reason = mode_reason(x, stack.originals)
    if reason is None and not x.is_cpu:
        reason = f"the input is on {x.device}"
    if reason is None and PREPARED not in stack.owner.__dict__:  # nothing is to be prepared in vain
        reason = stack.attention_reason(())
    if reason is not None:
        return reason
    if x.is_floating_point() and x.dtype != dtype:
        return f"the input is {x.dtype}, not {dtype}"
    reason = stack.given(arguments)
    if reason is not None:
        return reason
    if len(stack.layers) == 0:
        return "there is no layer"
    layers = prepared_layers(stack.owner, stack.layers, stack.spec, x, dtype, stack.name)
    if isinstance(layers, str):
        return layers
    return stack.attention_reason(layers.configs) or layers


UNREAD = "the mask cannot be read now, as while a CUDA graph records the call"


def layers_of_call(
    stack: LayerStack,
    x: Tensor,
    dtype: torch.dtype,
    arguments: dict[str, Any],
    outer: Sequence[Tensor] = (),
    *,
    drops_before: bool = False,
) -> PreparedLayers | PackedLayers | str:
    """``layers_to_run``; or the layers as they are, on a GPU and where the call is recorded, because one of the stack's
    parameters, ``x`` or what it is computed from, ``outer``, requires grad. So too where dropout acts in the layers, or
    before them: from one seed a pass without grad drops what the pass with grad does that computes it again."""
    records = torch.is_grad_enabled() and any(each.requires_grad for each in (x, *outer, *stack.owner.parameters()))
    trains, slow = True, None
    if records and stack.trains:
        slow = None if stack.owner.training else grad_reason(stack.owner, x)
    elif drops_before and stack.trains:
        slow = "the embeddings are in training: dropout acts"
    elif stack.trains and cuda_attention.is_gpu(x.device):  # what is prepared is for the CPU
        trains = drops(stack.spec, stack.layers)
    else:
        layers = slow = layers_to_run(stack, x, dtype, arguments)
        if not (isinstance(layers, str) and stack.trains and drops(stack.spec, stack.layers)):
            return layers
    if captures_outputs():
        return "hidden states or attention weights are asked for"
    reason = mode_reason(x, stack.originals) or stack.given(arguments)
    if reason is None and len(stack.layers) == 0:
        reason = "there is no layer"
    reason = reason or layers_reason(stack.spec, stack.layers, stack.name)
    if reason is not None:
        return reason
    layers = PackedLayers(stack.layers, stack.spec, trains=trains, reason=slow)
    return stack.attention_reason(layers.configs) or layers.device_reason(x.device, dtype) or layers


def batch_of(
    stack: LayerStack,
    layers: PreparedLayers | PackedLayers,
    key_mask: Tensor | None,
    shape: torch.Size,
    device: torch.device,
) -> PackedBatch | str:
    """What a call packs of a batch of ``(batch_size, length)`` on ``device`` whose keys ``key_mask`` hides where False;
    or why it does not."""
    if key_mask is not None and is_recorded(key_mask):
        return UNREAD
    reason = padding_reason(stack, key_mask)
    if reason is not None:
        return reason
    trains = isinstance(layers, PackedLayers) and layers.trains
    if trains and stack.padding != "skip" and key_mask is not None and not key_mask.all():
        return layers.reason or "padding is computed in training, unless padding is 'skip'"
    return PackedBatch(layers, packing_of_mask(key_mask, *shape, device))


def packed_batch(
    stack: LayerStack, x: Tensor, attention_mask: Tensor | None, arguments: dict[str, Any]
) -> PackedBatch | str:
    """What a call on padded hidden states packs; or why it cannot."""
    layers = layers_of_call(stack, x, x.dtype, arguments)
    if isinstance(layers, str):
        return layers
    if x.dim() != 3 or not x.numel():
        return f"the input is of shape {tuple(x.shape)}"
    key_mask = None
    if attention_mask is not None:
        if is_recorded(attention_mask):
            return UNREAD
        if attention_mask.dtype == torch.bool and layers.configs[0]._attn_implementation != "sdpa":
            return "the attention adds its mask to the scores, and this one is bool"
        key_mask = key_mask_of(attention_mask, *x.shape[:2])
        if key_mask is None:
            return "the attention mask does not only hide keys"
    return batch_of(stack, layers, key_mask, x.shape[:2], x.device)


def padding_reason(stack: LayerStack, key_mask: Tensor | None) -> str | None:
    """Why positions that ``key_mask`` hides are to be computed all the same."""
    if key_mask is None:
        return None
    if hides_first_position(key_mask, of_any_sequence=stack.padding != "skip"):
        return "position 0 is hidden, as by padding on the left, and may be read"
    if may_read_padding(stack.padding) and not key_mask.all():
        return "padding is to be computed" if stack.padding == "compute" else "the loss reads padded positions"
    return None


def may_read_padding(choice: str) -> bool:
    """Whether, with this choice about padding, somebody may want what is computed there."""
    return choice == "compute" or (choice == "auto" and any(reads for _, reads in reads_padding.get()))


def encode_packed(stack: LayerStack, tokens: Tensor, batch: PackedBatch) -> Tensor:
    """The last layer's output for the packed ``tokens``, padded again."""
    layers, packing = batch
    if isinstance(layers, PackedLayers):
        record(stack.caller, "packed", layers.reason)
        return unpack(layers.encode(tokens, packing), packing)
    record(stack.caller, "packed")
    return unpack(layers.encode(tokens, packing.cu_seqlens), packing)


def encode(stack: LayerStack, x: Tensor, attention_mask: Tensor | None, arguments: dict[str, Any]) -> Tensor | None:
    """The last layer's output for padded hidden states; None where the original computation is to run."""
    batch = packed_batch(stack, x, attention_mask, arguments)
    if isinstance(batch, str):
        record(stack.caller, "original", batch)
        return None
    return encode_packed(stack, pack(x, batch.packing), batch)


def keys_only(model: nn.Module, mask: Tensor) -> Tensor:
    """``mask``, of two dimensions, as one of four that says no more than which keys are hidden, where ``model`` takes
    that as it is: it would make one of length by length. Else as it is."""
    takes = model.config._attn_implementation == "sdpa" and not model._forward_hooks
    return mask.to(torch.bool)[:, None, None] if takes else mask


def encode_traced(
    module: nn.Module,
    owner: nn.Module,
    layers: Sequence[nn.Module],
    spec: TransformersLayer,
    x: Tensor,
    attention_mask: Tensor | None,
    arguments: dict[str, Any],
) -> Tensor | None:
    """``encode`` of ``module.layer_stack(owner)``, which has these ``layers``, where torch.compile or torch.export
    traces the call: as one operator, which reads the mask when it runs. A mask that hides keys alone is known by its
    shape, ``(batch, 1, 1, length)``."""
    padding = getattr(module, "padding", None)
    if attention_mask is not None and arguments.get(READS_PADDING) and padding != "skip":
        return None
    if is_exported() or torch.is_grad_enabled() or captures_outputs() or x.dim() != 3:
        return None
    if not x.is_cpu:  # elsewhere nothing would be packed
        return None
    if attention_mask is not None and (attention_mask.dtype != torch.bool or attention_mask.shape[1:3] != (1, 1)):
        return None
    given = tuple(name for name, value in arguments.items() if value is not None and value is not False)
    values = (padding, attention_mask is not None, *spec.traced_values(layers))
    options = _traced_options(module, owner, x.dtype, given, values)
    if options is None:
        return None
    parameters = [tensor for layer in layers for tensor in spec.parameters(layer)]
    key_mask = None if attention_mask is None else attention_mask[:, 0, 0].expand(x.shape[0], x.shape[1])
    return encode_padded(
        x,
        key_mask,
        parameters,
        LayerOptions(*options),
        num_layers=len(layers),
        is_causal=spec.is_causal,
        padding="skip_unless_first",
    )


@assume_constant_result
def _traced_options(
    module: nn.Module, owner: nn.Module, dtype: torch.dtype, given: tuple[str, ...], values: tuple
) -> tuple | None:
    """What all layers of the stack are beside their parameters, as they are while the call is traced; None where it is
    not to be one operator."""
    stack = module.layer_stack(owner)
    padding, masked, *_ = values
    if (masked and padding == "compute") or stack.given(dict.fromkeys(given, True)) is not None:
        return None
    if has_global_hooks() or autocast_reason() is not None:
        return None
    if len(stack.layers) == 0 or lasting_reason(stack.spec, stack.layers, stack.configs) is not None:
        return None
    return stack.spec.common_options(stack.layers, dtype)
