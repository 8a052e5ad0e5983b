# SPDX-License-Identifier: BSD-3-Clause
"""What a call of one of Hugging Face's text encoders packs before its embeddings (varlen.py), and how it is handed to
them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..build.extension import assume_constant_result
from ..recording import is_exported
from .eligibility import implementation_reason, is_as_built
from .replace import Replacement, named_modules
from .stack import PackedBatch, batch_of, keys_only, layers_of_call
from .varlen import MODEL_METHODS, PackedEncoder, PackedLinear, TextEncoder, carrying, embeddings_as_built


class TextModel(Replacement, nn.Module):
    """A text encoder from ids to its output.

    Attributes:
        text_forward: its own forward; another one on an instance or a subclass may compute something else.
    """

    text_forward: Callable[..., Any]


_OUTPUT_FLAGS = ("output_attentions", "output_hidden_states")


def hand_over_batch(model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
    """What a call of the model goes on with: an input that carries the packed batch, where there can be one. Also a
    forward pre-hook, of subclasses that are called as the library's own class is.

    Nobody reads the mask then. But the model would make one of length by length of it, which costs more than the
    embeddings, so it goes on as one of four dimensions, which is taken as it is; so it does while torch.compile or
    torch.export traces the call, which cannot pack here.
    """
    encoder = None if is_exported() else encoder_of(model)
    if encoder is None:
        return None
    text_encoder = encoder.text_encoder
    arguments = arguments_of(text_encoder, args, kwargs)
    if arguments is None:
        return None
    changed, mask = {}, arguments.get("attention_mask")
    if not torch.compiler.is_compiling():
        batch = packed_batch_of(model, encoder, text_encoder, arguments)
        if isinstance(batch, str):
            return None
        name = "inputs_embeds" if arguments.get("input_ids") is None else "input_ids"
        changed[name] = carrying(arguments[name], batch)
    elif torch.is_grad_enabled() or _reason_while_traced(model) is not None:
        return None
    elif mask is None:  # of which the model would make one of length by length
        x = arguments.get("inputs_embeds") if arguments.get("input_ids") is None else arguments["input_ids"]
        mask = None if x is None else torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
    elif mask.dim() != 2:
        return None
    if mask is not None:
        changed["attention_mask"] = keys_only(model, mask)
    given = text_encoder.arguments[: len(args)]
    args = tuple(changed.get(name, value) for name, value in zip(given, args, strict=True))
    return args, kwargs | {name: value for name, value in changed.items() if name not in given}


def arguments_of(text_encoder: TextEncoder, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any] | None:
    """A call's arguments by name; None where packing does not know them all, or one is given twice."""
    given = dict(zip(text_encoder.arguments, args, strict=False))
    return None if len(args) > len(given) or any(name in kwargs for name in given) else given | kwargs


def packing_hooks(model: nn.Module, kind: type[nn.Module]) -> Iterator[tuple[nn.Module, Callable]]:
    """The modules of ``model`` of subclasses of this class that pack their batch, and the hook by which they do."""
    for _, module in named_modules(model, kind):
        is_hooked = hand_over_batch in module._forward_pre_hooks.values()
        if is_hooked or not (isinstance(module, TextModel) or encoder_of(module) is None):
            yield module, hand_over_batch


def encoder_of(model: nn.Module) -> PackedEncoder | None:
    """The encoder that the model's forward calls, if it packs."""
    for name, child in model._modules.items():
        if isinstance(child, PackedEncoder) and child.text_encoder.encoder_name == name:
            return child
    return None


def _reason_of_model(model: nn.Module, text_encoder: TextEncoder) -> str | None:
    """What of ``model`` may read its arguments before its embeddings and encoder do."""
    changed = text_encoder.model_originals.reason()
    if changed is not None:
        return changed
    replaced = isinstance(model, TextModel)
    ours = {"forward": type(model).text_forward} if replaced else {}
    for method in MODEL_METHODS:
        known = ours.get(method, getattr(text_encoder.model, method, None))
        if method in model.__dict__ or getattr(type(model), method, None) is not known:
            return f"the model has a {method} of its own"
    if not replaced and next(reversed(model._forward_pre_hooks.values())) is not hand_over_batch:
        return "another pre-hook comes later"
    return None


@assume_constant_result
def _reason_while_traced(model: nn.Module) -> str | None:
    return _reason_of_model(model, encoder_of(model).text_encoder)


def packed_batch_of(
    model: nn.Module, encoder: PackedEncoder, text_encoder: TextEncoder, arguments: dict[str, Any]
) -> PackedBatch | str:
    """What the model's call with these arguments packs; or why the embeddings cannot be packed.

    Where only they cannot, the encoder will still find out that it can.
    """
    changed = _reason_of_model(model, text_encoder)
    if changed is not None:
        return changed
    if any(arguments.get(flag, getattr(model.config, flag, False)) for flag in _OUTPUT_FLAGS):
        return "hidden states or attention weights are asked for"
    embeddings = model.embeddings
    if not is_as_built(encoder, text_encoder.encoder) or not embeddings_as_built(embeddings, text_encoder):
        return "embeddings or encoder have hooks or are not as they were built"
    between = [model._modules[name] for name in text_encoder.between if name in model._modules]
    if not all(is_as_built(module, PackedLinear) for module in between):
        return "what lies between embeddings and encoder is not as it was built"
    x = arguments.get("input_ids")
    x = arguments.get("inputs_embeds") if x is None else x
    key_mask = arguments.get("attention_mask")
    padding_id = embeddings.padding_id()
    first_position = 0 if padding_id is None else padding_id + 1
    if x is None or x.dim() < 2 or first_position + x.size(1) > embeddings.position_ids.size(1):
        return "the arguments are not valid"
    stack = encoder.layer_stack()
    if stack.configs != [model.config]:  # by whose implementation the mask is made
        reason = implementation_reason(model.config, stack.spec.eager_attention)
        if reason is not None:
            return reason
    others = {name: value for name, value in arguments.items() if name not in (*text_encoder.arguments, "use_cache")}
    dtype = embeddings.word_embeddings.weight.dtype
    outer = (*embeddings.parameters(), *(parameter for module in between for parameter in module.parameters()))
    dropout = embeddings.dropout
    drops_before = dropout.training and dropout.p > 0.0
    layers = layers_of_call(stack, x, dtype, others, outer, drops_before=drops_before)
    if isinstance(layers, str):
        return layers
    if key_mask is not None:
        if type(key_mask) is not Tensor or key_mask.shape != x.shape[:2] or key_mask.device != x.device:
            return "the attention mask is not that of a padded batch"
        key_mask = key_mask.to(torch.bool)
    return batch_of(stack, layers, key_mask, x.shape[:2], x.device)
