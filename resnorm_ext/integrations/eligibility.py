# SPDX-License-Identifier: BSD-3-Clause
"""Whether a call of one of Hugging Face's models may take a path that computes what several of its modules do, and what
its masks say."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, eager_mask, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..engine.packing import Packing, equal_bounds, packing_of
from ..modules.eligibility import autocast_reason, has_global_hooks, is_eager, is_plain
from ..modules.originals import Originals

try:
    from transformers.utils.output_capturing import _CAN_RECORD_REGISTRY, _active_collector
except ImportError:  # the first releases of transformers 5 collect by a forward of the instance, which is seen anyway
    _CAN_RECORD_REGISTRY = _active_collector = None

_CAPTURING_HOOK = ("transformers.utils.output_capturing", "output_capturing_hook")


def captures_outputs() -> bool:
    """Whether the model that is running now collects hidden states or attention weights by hooks."""
    if _active_collector is None:
        return False
    # torch.compile cannot trace ContextVar.get, so transformers uses a global variable there.
    traced = torch.compiler.is_dynamo_compiling()
    return bool(_active_collector.global_var if traced else _active_collector.get())


def register_outputs(model: type[nn.Module]) -> None:
    """Lets instances of ``model`` collect hidden states and attention weights: transformers registers classes by their
    names, as it builds instances."""
    if _CAN_RECORD_REGISTRY is not None:
        dict.__setitem__(_CAN_RECORD_REGISTRY, str(model), model._can_record_outputs)


def is_as_built(module: nn.Module | None, *types: type[nn.Module]) -> bool:
    """``is_plain``, but for the hooks that transformers leaves behind after collecting outputs."""
    return is_plain(module, *types, are_idle=_are_idle)


def _are_idle(hooks: Iterable[Callable]) -> bool:
    kinds = {(getattr(hook, "__module__", None), getattr(hook, "__name__", None)) for hook in hooks}
    return kinds == {_CAPTURING_HOOK} and not captures_outputs()


def mode_reason(x: Tensor, originals: Originals) -> str | None:
    """What about the mode of this call on ``x`` keeps it from a path that stands for ``originals``."""
    if not is_eager(x):
        return "the call is traced or transformed"
    if has_global_hooks():
        return "hooks for all modules are registered"
    return autocast_reason() or originals.reason()


def attention_reason(
    configs: Iterable[PreTrainedConfig], eager_attention: Callable, *, is_causal: bool = False
) -> str | None:
    """What about the attention that any of ``configs`` asks for keeps a call from inference on fused operators: its
    implementation, or that it is causal where it must not be."""
    implementations = set()
    for config in configs:
        if not is_causal and any(_is_set(config, name) for name in ("is_decoder", "is_causal")):
            return "the attention is causal"
        implementations.add(config._attn_implementation)
        reason = implementation_reason(config, eager_attention)
        if reason is not None:
            return reason
    if len(implementations) > 1:
        return f"the attention implementations are {' and '.join(sorted(implementations))}"
    return None


def _is_set(config: PreTrainedConfig, flag: str) -> bool:
    """``getattr(config, flag, False)``, but past a search that takes longer than a norm where there is none."""
    return config.__dict__.get(flag, getattr(type(config), flag, False))


def implementation_reason(config: PreTrainedConfig, eager_attention: Callable) -> str | None:
    """What about the implementation of attention that ``config`` names keeps a call from inference on fused operators:
    it is neither transformers' own eager attention nor its own by scaled_dot_product_attention."""
    implementation = config._attn_implementation
    known = {"eager": (eager_attention, eager_mask), "sdpa": (sdpa_attention_forward, sdpa_mask)}
    if implementation not in known:
        return f"the attention implementation is {implementation}"
    in_use = (
        ALL_ATTENTION_FUNCTIONS.get(implementation, eager_attention),
        ALL_MASK_ATTENTION_FUNCTIONS.get(implementation),
    )
    return None if in_use == known[implementation] else f"{implementation} attention has been redefined"


def packing_of_mask(key_mask: Tensor | None, batch_size: int, length: int, device: torch.device) -> Packing:
    """The packing, on ``device``, of ``key_mask``, bool ``(batch_size, length)``; None, or all True, hides nothing."""
    if key_mask is not None and not key_mask.all():
        return packing_of(key_mask)
    cu_seqlens = equal_bounds(batch_size, length, device)
    return Packing(cu_seqlens, torch.arange(batch_size * length, device=device), batch_size, length, length)


def key_mask_of(attention_mask: Tensor, batch_size: int, length: int) -> Tensor | None:
    """The bool ``(batch_size, length)`` of keys to attend to, if that is all ``attention_mask`` says; else None.

    ``attention_mask`` is what the attention adds to the scores or, bool, attends to where True: ``(batch_size, 1,
    length, length)``. Its values are read.
    """
    shape = (batch_size, 1, length, length)
    if attention_mask.dim() != 4 or any(m not in (1, n) for m, n in zip(attention_mask.shape, shape, strict=True)):
        return None
    mask = attention_mask.expand(shape)
    keys = mask[:, 0, 0]
    if not torch.equal(mask, keys[:, None, None].expand(shape)):
        return None
    if keys.dtype == torch.bool:
        return keys
    attended = keys == 0
    return attended if (attended | (keys <= torch.finfo(keys.dtype).min)).all() else None


def hides_first_position(key_mask: Tensor, *, of_any_sequence: bool) -> bool:
    """Whether a sequence does not have a token at position 0, where poolers and heads read: any, or one that has tokens
    at all."""
    hidden = ~key_mask[:, 0]
    return bool((hidden if of_any_sequence else hidden & key_mask.any(1)).any())
