# SPDX-License-Identifier: BSD-3-Clause
"""A text encoder's layers on packed batches by differentiable operators: where a backward pass may follow, and on GPUs.

Linear layers may be adapters, which are called as the modules that they are.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.utils import parametrize
from torch.nn.utils.prune import BasePruningMethod
from transformers import PreTrainedConfig

from .. import cuda_attention, functional
from ..engine.packing import Packing
from ..engine.spec import LayerSpec, module_at
from ..modules.dropout import dropout
from ..modules.encoder_stack import ResidualStream
from .eligibility import is_as_built


class PackedLayers:
    """Post-norm layers on their own parameters, instead of ``PreparedLayers``.

    Attributes:
        trains: whether the call is, or repeats, one for training.
        reason: why a call that is not for training is run like this, and not faster.
        configs: of the layers' attentions.
    """

    def __init__(
        self, layers: Sequence[nn.Module], spec: LayerSpec, *, trains: bool, reason: str | None = None
    ) -> None:
        self._layers, self._spec, self.trains, self.reason = layers, spec, trains, reason
        self.configs: list[PreTrainedConfig] = [layer.get_submodule(spec.attention).config for layer in layers]

    def device_reason(self, device: torch.device, dtype: torch.dtype) -> str | None:
        """Why hidden states of ``dtype`` on ``device`` go no faster packed."""
        if not cuda_attention.is_gpu(device):
            return None if device.type == "cpu" else f"the input is on {device}"
        if torch.is_autocast_enabled(device.type) and dtype != torch.float64:
            dtype = torch.get_autocast_dtype(device.type)
        attentions = [module_at(layer, self._spec.attention) for layer in self._layers]
        head_dims = {int(getattr(attention, self._spec.head_dim)) for attention in attentions}
        rates = {self._attention_dropout(layer) for layer in self._layers}
        if all(cuda_attention.kernel_of(device, dtype, dim, rate) for dim in head_dims for rate in rates):
            return None
        return (
            f"no kernel attends to packed {dtype} of head_dim {', '.join(map(str, sorted(head_dims)))}"
            + (", with dropout" if max(rates) > 0.0 else "")
            + (", deterministically" if torch.are_deterministic_algorithms_enabled() else "")
        )

    def _attention_dropout(self, layer: nn.Module) -> float:
        """transformers asks the attention whether it is in training, not its dropout."""
        module, name = self._spec.dropouts.attention_weights
        in_training = module_at(layer, self._spec.attention).training
        return float(getattr(module_at(layer, module), name)) if in_training else 0.0

    def encode(self, tokens: Tensor, packing: Packing) -> Tensor:
        """The last layer's output for packed ``tokens``, ``(tokens, dim)``."""
        for layer in self._layers:
            run = partial(self._run, layer, packing=packing)
            if getattr(layer, "gradient_checkpointing", False) and layer.training:
                tokens = layer._gradient_checkpointing_func(run, tokens)
            else:
                tokens = run(tokens)
        return tokens

    def _run(self, layer: nn.Module, tokens: Tensor, *, packing: Packing) -> Tensor:
        spec, dropouts = self._spec, self._spec.dropouts
        stream = ResidualStream(tokens, owns_x=False, owns_updates=False)
        update = self._attend(layer, tokens, packing)
        stream.add_and_normalize(
            update, self._dropout(layer, dropouts.attention_update), module_at(layer, spec.attention_norm)
        )
        update = self._feed_forward(layer, stream.x)
        stream.add_and_normalize(
            update, self._dropout(layer, dropouts.update), module_at(layer, spec.feed_forward_norm)
        )
        return stream.x

    def _attend(self, layer: nn.Module, tokens: Tensor, packing: Packing) -> Tensor:
        spec, attention = self._spec, module_at(layer, self._spec.attention)
        head_dim = int(getattr(attention, spec.head_dim))
        parts = [_linear(layer, name, tokens).unflatten(-1, (-1, head_dim)) for name in spec.projections]
        scale = None if spec.scaling is None else float(getattr(attention, spec.scaling))
        dropout_p, bounds = self._attention_dropout(layer), (packing.cu_seqlens, packing.max_seqlen)
        if cuda_attention.has_kernel(parts[0], *bounds, scale=scale, dropout_p=dropout_p):
            context = cuda_attention.attend(*parts, *bounds, scale=scale, dropout_p=dropout_p)
        else:
            context = functional.packed_attention(
                torch.stack(parts, 1), packing.cu_seqlens, scale=scale, dropout_p=dropout_p, training=True
            )
        return _linear(layer, spec.attention_output, context.flatten(1))

    def _feed_forward(self, layer: nn.Module, tokens: Tensor) -> Tensor:
        spec = self._spec
        first, second = (module_at(layer, name[:-1]) for name in (spec.intermediate, spec.output))
        activation = getattr(module_at(layer, spec.activation[0]), spec.activation[1])
        rate = spec.dropout_rate(layer, spec.dropouts.activation)
        if is_as_built(first, nn.Linear) and is_as_built(second, nn.Linear):
            return functional.feed_forward(
                tokens,
                first.weight,
                first.bias,
                second.weight,
                second.bias,
                activation=spec.activation_name(activation),
                dropout_p=rate,
                training=True,
            )
        hidden = activation(_linear(layer, spec.intermediate, tokens))
        return _linear(layer, spec.output, dropout(hidden, rate) if rate > 0.0 else hidden)

    def _dropout(self, layer: nn.Module, place: tuple[str, str] | None) -> nn.Dropout:
        return _NO_DROPOUT if place is None else module_at(layer, place[0])


_NO_DROPOUT = nn.Dropout(0.0)


def layers_reason(spec: LayerSpec, layers: Sequence[nn.Module], name: str) -> str | None:
    """What keeps ``layers``, as they are now, from ``PackedLayers``; ``name`` is a layer's, with a place for its
    index."""
    for index, layer in enumerate(layers):
        reason = spec.lasting_reason(layer, is_linear=_is_linear)
        if reason is not None:
            return f"{name.format(index)}{reason}"
    return None


def drops(spec: LayerSpec, layers: Sequence[nn.Module]) -> bool:
    """Whether dropout acts in any of ``layers``, which need not be as they were built: adapters have their own."""
    modules = (module for layer in layers for module in layer.modules())
    if any(isinstance(each, _DropoutNd) and each.training and each.p > 0.0 for each in modules):
        return True
    try:
        return any(spec.dropout_rate(layer, place) > 0.0 for layer in layers for place in spec.dropout_places())
    except AttributeError:
        return False


def _is_linear(module: nn.Module) -> bool:
    """Whether ``module`` computes each row of a matrix from that row alone: a linear layer, parametrized or not, or an
    adapter around one. Hooks may do anything with a batch, but for those by which torch prunes."""
    if any(map(_does_more, module.modules())):
        return False
    if parametrize.is_parametrized(module):
        return parametrize.type_before_parametrizations(module) is nn.Linear
    tuners = sys.modules.get("peft.tuners.tuners_utils")
    return type(module) is nn.Linear or (tuners is not None and isinstance(module, tuners.BaseTunerLayer))


def _does_more(module: nn.Module) -> bool:
    return bool(
        "forward" in module.__dict__
        or module._forward_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or not all(isinstance(hook, BasePruningMethod) for hook in module._forward_pre_hooks.values())
    )


def _linear(layer: nn.Module, name: str, x: Tensor) -> Tensor:
    module = module_at(layer, name[:-1])
    return functional.linear(x, module.weight, module.bias) if is_as_built(module, nn.Linear) else module(x)
