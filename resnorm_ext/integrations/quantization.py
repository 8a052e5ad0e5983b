# SPDX-License-Identifier: BSD-3-Clause
"""torch.ao.quantization's eager mode replaces modules by their exact class. This gives the classes that take torch.nn's
place one in its default tables too."""

from __future__ import annotations

import copy
import sys
from functools import cache

from torch import nn

from .. import modules

_LIBRARY = "torch.ao.quantization.quantize"


def register_for_quantization() -> None:
    """Once, where the library is loaded, as it is with torch itself in those releases that this package knows."""
    if _LIBRARY in sys.modules:
        _register()


@cache
def _register() -> None:
    from torch.ao.quantization import quantization_mappings as mappings
    from torch.ao.quantization.quantize import get_default_custom_config_dict

    quantized = mappings.DEFAULT_STATIC_QUANT_MODULE_MAPPINGS
    if nn.LayerNorm in quantized:
        quantized.setdefault(modules.LayerNorm, quantized[nn.LayerNorm])
    observed = get_default_custom_config_dict().get("float_to_observed_custom_module_class", {})
    if nn.MultiheadAttention in observed:
        observed.setdefault(modules.SelfAttention, _attention_observed_as(observed[nn.MultiheadAttention]))


def _attention_observed_as(observed: type[nn.Module]) -> type[nn.Module]:
    """A class whose ``from_float`` takes a SelfAttention for what it derives from, as ``observed``'s has to be sure of.

    Of ``observed``, because torch.ao.quantization looks at that too; there is no instance of it.
    """

    class Observed(observed):
        @classmethod
        def from_float(cls, attention: modules.SelfAttention) -> nn.Module:
            original = copy.copy(attention)
            original.__class__ = nn.MultiheadAttention
            return observed.from_float(original)

    return Observed
