# SPDX-License-Identifier: BSD-3-Clause
"""Heads on packed encoders whose loss reads every position: while one is computed, padded positions are too, so that it
is the original's."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from ..build.extension import assume_constant_result
from ..modules.eligibility import is_eager
from .looped import StackLayer
from .stack import READS_PADDING, reads_padding
from .varlen import PackedEncoder

_IGNORED = -100  # the label of positions that a loss leaves out, in torch and transformers


def heads(model: nn.Module) -> Iterator[nn.Module]:
    """The modules of ``model`` whose forward takes labels and runs a packed encoder."""
    for module in model.modules():
        takes_labels = not {"labels", "start_positions"}.isdisjoint(_parameters(type(module)))
        if takes_labels and any(isinstance(inner, PackedEncoder | StackLayer) for inner in module.modules()):
            yield module


def before_head(head: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
    """Forward pre-hook of a head. A call that is traced says by an argument, which transformers' heads hand on to what
    they run, that its loss may read padded positions."""
    arguments = dict(zip(_parameters(type(head)), args, strict=False)) | kwargs
    if torch.compiler.is_compiling():
        says_so = _hands_arguments_on(type(head)) and _reads_padding(arguments)
        return (args, kwargs | {READS_PADDING: True}) if says_so else None
    outer = _outside(head)
    reads_padding.set((*outer, (id(head), any(reads for _, reads in outer) or _reads_padding(arguments))))


def after_head(head: nn.Module, args: tuple, output: Any) -> None:
    """Forward hook of a head, after errors too."""
    if not torch.compiler.is_compiling():
        reads_padding.set(_outside(head))


def _outside(head: nn.Module) -> tuple[tuple[int, bool], ...]:
    """The heads that are running around ``head``; what an interrupt has left of an earlier call is forgotten."""
    running = reads_padding.get()
    known = [index for index, (each, _) in enumerate(running) if each == id(head)]
    return running[: known[0]] if known else running


def _reads_padding(arguments: dict[str, Any]) -> bool:
    """Whether a loss with these labels depends on what is computed at padded positions; True where that is not
    known."""
    if arguments.get("start_positions") is not None:  # softmax over all positions
        return True
    labels, mask = arguments.get("labels"), arguments.get("attention_mask")
    if labels is None or mask is None:
        return False
    if not (isinstance(labels, Tensor) and isinstance(mask, Tensor)):
        return True
    if labels.dim() <= 2 and mask.dim() == 2 and labels.numel() == mask.numel() > mask.size(0):
        if not (is_eager(labels) and is_eager(mask)):
            return True
        return bool(((labels.reshape(mask.shape) != _IGNORED) & (mask == 0)).any())
    by_text = labels.numel() == mask.size(0) or (labels.dim() == 2 and labels.size(1) != mask.size(-1))
    return not by_text


@assume_constant_result
def _hands_arguments_on(head: type[nn.Module]) -> bool:
    return any(each.kind is each.VAR_KEYWORD for each in inspect.signature(head.forward).parameters.values())


@assume_constant_result
def _parameters(head: type[nn.Module]) -> tuple[str, ...]:
    """The names of the arguments of the forward, but for self."""
    return _cached_parameters(head)


@cache
def _cached_parameters(head: type[nn.Module]) -> tuple[str, ...]:
    try:
        return tuple(inspect.signature(head.forward).parameters)[1:]
    except (TypeError, ValueError):
        return ()
