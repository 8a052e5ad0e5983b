# SPDX-License-Identifier: BSD-3-Clause
"""Hugging Face's text encoders as a whole: a call is one call into the engine where that can be (whole_call.py), else
its batch is packed before the embeddings (text_batch.py)."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn

from .eligibility import register_outputs
from .replace import original_forward
from .text_batch import TextModel, hand_over_batch
from .varlen import TextEncoder
from .whole_call import call_whole


def text_model(text_encoder: TextEncoder, module: str) -> type[TextModel]:
    """The class that takes the place of ``text_encoder.model``, of the same name in ``module``."""
    original = text_encoder.model

    @functools.wraps(original.forward)  # whose signature others ask for
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        instead = original_forward(self, replacement)
        if instead is not None:
            return instead(*args, **kwargs)
        if not torch.compiler.is_compiling():
            output = call_whole(self, args, kwargs)
            if output is not None:
                return output
        changed = hand_over_batch(self, args, kwargs)
        args, kwargs = (args, kwargs) if changed is None else changed
        return original.forward(self, *args, **kwargs)

    members = {
        "__module__": module,
        "__doc__": TextModel.__doc__,
        "forward": forward,
        "text_forward": staticmethod(forward),
    }
    replacement = type(original.__name__, (TextModel, original), members)
    register_outputs(replacement)
    return replacement
