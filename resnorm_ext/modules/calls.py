# SPDX-License-Identifier: BSD-3-Clause
"""Which path the calls of accelerated modules took, for ``report``, and a warning where speed is lost."""

from __future__ import annotations

import copy
import logging
import warnings
from collections import Counter

import torch
from torch import nn

_log = logging.getLogger("resnorm_ext")

_CALLS = "_resnorm_calls"  # on the instance
_WARN_AFTER = 3


class Model:
    """What the modules of one accelerated model share."""

    __slots__ = ("has_warned",)

    def __init__(self) -> None:
        self.has_warned = False

    def __deepcopy__(self, memo: dict) -> Model:
        return Model()

    def __reduce__(self) -> tuple[type[Model], tuple[()]]:
        return Model, ()


class Calls:
    """The calls of one module. A copy or a pickle of it has none yet.

    Attributes:
        counts: how many calls took which path, by path and the reason why it was not the fastest one.
        last: path and reason of the last call.
    """

    __slots__ = ("_in_a_row", "counts", "last", "model")

    def __init__(self, model: Model) -> None:
        self.model = model
        self.counts: Counter[tuple[str, str | None]] = Counter()
        self.last: tuple[str, str | None] | None = None
        self._in_a_row = 0

    def add(self, module: nn.Module, path: str, reason: str | None, is_slow: bool) -> None:
        self.last = (path, reason)
        self.counts[self.last] += 1
        self._in_a_row = self._in_a_row + 1 if is_slow and not module.training else 0
        if self._in_a_row >= _WARN_AFTER and not self.model.has_warned:
            self.model.has_warned = True
            warnings.warn(
                f"{_WARN_AFTER} calls in a row of the accelerated {type(module).__name__}, in eval mode, have not "
                f"taken its fast path: {reason}. resnorm_ext.report(model) tells more; this is said once.",
                stacklevel=3,
            )

    def __deepcopy__(self, memo: dict) -> Calls:
        return Calls(copy.deepcopy(self.model, memo))

    def __reduce__(self) -> tuple[type[Calls], tuple[Model]]:
        return Calls, (self.model,)


def record_from_now(module: nn.Module, model: Model) -> None:
    """Has the calls of ``module`` recorded."""
    module.__dict__[_CALLS] = Calls(model)


def forget_record(module: nn.Module) -> None:
    module.__dict__.pop(_CALLS, None)


def calls_of(module: nn.Module) -> Calls | None:
    return module.__dict__.get(_CALLS)


def record(module: nn.Module, path: str, reason: str | None = None, *, is_slow: bool | None = None) -> None:
    """Notes that this call of ``module`` takes ``path``, and why it is not the fastest, if it is not.

    ``is_slow``: whether the model's user should hear of it; where None, whether there is a reason.
    """
    if torch.compiler.is_compiling():
        return
    if _log.isEnabledFor(logging.DEBUG):
        _log.debug("%s: %s%s", type(module).__name__, path, "" if reason is None else f", because {reason}")
    calls = module.__dict__.get(_CALLS)
    if calls is not None:
        calls.add(module, path, reason, reason is not None if is_slow is None else is_slow)
