# SPDX-License-Identifier: BSD-3-Clause
"""The position-wise feed-forward block of a Transformer (Vaswani et al. 2017, section 3.3)."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.jit import is_scripting

from .. import functional
from .dropout import dropout
from .eligibility import activation_name, has_global_hooks, is_eager, is_plain
from .linear import linear
from .originals import COMMON
from .tracing import asks_for_original

_ACTIVATIONS = {"relu": F.relu, "gelu": F.gelu}


class FeedForward(nn.Module):
    """``linear2(dropout(activation(linear1(input))))``, as in ``torch.nn.TransformerEncoderLayer``.

    Args:
        d_model: width of input and output.
        dim_feedforward: width between the two linear layers.
        dropout: probability of zeroing an activation in train mode.
        activation: ``"relu"``, ``"gelu"`` or a callable.
        bias: whether the linear layers have one.

    Shape: ``(*, d_model)`` to ``(*, d_model)``.

    Raises RuntimeError for an unknown name of an activation, ValueError for a ``dropout`` outside [0, 1].
    """

    def __init__(
        self,
        d_model: int,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        activation: str | Callable[[Tensor], Tensor] = F.relu,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.linear1 = nn.Linear(d_model, dim_feedforward, bias, device, dtype)
        self.dropout = nn.Dropout(dropout)
        self.linear2 = nn.Linear(dim_feedforward, d_model, bias, device, dtype)
        if isinstance(activation, str):
            if activation not in _ACTIVATIONS:
                raise RuntimeError(f"expected activation to be relu, gelu or a callable, but got {activation!r}")
            activation = _ACTIVATIONS[activation]
        self.activation = activation

    def forward(self, input: Tensor) -> Tensor:
        if is_scripting():
            return self.linear2(self.dropout(self.activation(self.linear1(input))))
        is_as_built = (
            not asks_for_original(input)
            and is_plain(self.linear1, nn.Linear)
            and is_plain(self.dropout, nn.Dropout)
            and is_plain(self.linear2, nn.Linear)
            and not has_global_hooks()
            and COMMON.reason() is None
        )
        if is_as_built:
            return feed_forward(self, input)
        return self.linear2(self.dropout(self.activation(self.linear1(input))))


def feed_forward(block: nn.Module, x: Tensor) -> Tensor:
    """The feed-forward block of the ``linear1``, ``activation``, ``dropout`` and ``linear2`` that ``block`` holds."""
    epilogue = activation_name(block.activation)
    if epilogue is not None and torch.is_grad_enabled() and is_eager(x) and x.is_cpu:
        return functional.feed_forward(
            x,
            block.linear1.weight,
            block.linear1.bias,
            block.linear2.weight,
            block.linear2.bias,
            activation=epilogue,
            dropout_p=block.dropout.p,
            training=block.dropout.training,
        )
    hidden = linear(block.linear1, x, block.linear1.weight, block.linear1.bias, epilogue or "none")
    if epilogue is None:
        hidden = block.activation(hidden)
    if block.dropout.training and block.dropout.p > 0.0:
        hidden = dropout(hidden, block.dropout.p)
    return linear(block.linear2, hidden, block.linear2.weight, block.linear2.bias)
