# SPDX-License-Identifier: BSD-3-Clause
"""What is done about padded positions: computed like all others, or skipped, which leaves zeros there."""

from __future__ import annotations

import torch
from torch import Tensor, nn

CHOICES = ("auto", "skip", "compute")
_CHOICE = "_resnorm_padding"  # on the instance


def check_choice(padding: object) -> None:
    """Raises ValueError where ``padding`` is none of the choices."""
    if padding not in CHOICES:
        raise ValueError(f"expected padding to be one of {', '.join(map(repr, CHOICES))}, but got {padding!r}")


class PaddingChoice:
    """A module that may skip padding.

    Attributes:
        padding: ``"skip"`` wherever that is possible, ``"compute"`` always, or by default ``"auto"``: skip where the
            module's original would leave zeros too, or where zeros are what its users expect.
    """

    __jit_unused_properties__ = ("padding",)  # which TorchScript could not compile

    @property
    def padding(self) -> str:
        return self.__dict__.get(_CHOICE, "auto")

    @padding.setter
    def padding(self, padding: str) -> None:
        check_choice(padding)
        self.__dict__[_CHOICE] = padding


def forget_choice(module: nn.Module) -> None:
    module.__dict__.pop(_CHOICE, None)


def torch_may_skip(
    encoder: nn.TransformerEncoder, src: Tensor, mask: Tensor | None, key_padding_mask: Tensor | None
) -> bool:
    """Whether torch.nn's ``encoder`` would, without grad, take nested tensors for this batch, whose padding it then
    skips and fills with zeros, if that is all on the right."""
    first = encoder.layers[0]
    return (
        torch.backends.mha.get_fastpath_enabled()
        and getattr(encoder, "use_nested_tensor", False)
        and not first.training
        and src.dim() == 3
        and key_padding_mask is not None
        and mask is None
        and not torch.is_autocast_enabled()  # for CUDA: that is what torch.nn asks
        and src.device.type in ("cpu", "cuda", "xpu")
    )


def is_on_the_right(hidden: Tensor) -> bool:
    """Whether nothing that ``hidden``, bool ``(batch, length)``, does not hide comes after what it hides. Reads the
    values."""
    return not bool((hidden[:, :-1] & ~hidden[:, 1:]).any())
