# SPDX-License-Identifier: BSD-3-Clause
"""Rows far from zero: what is left of a small spread on a large base, against the float64 result."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from norm_operations import EPS
from results import OURS

from resnorm_ext import reference
from resnorm_ext.functional import layer_norm

ROWS, COLUMNS = 64, 768
BASES = (1e3, 1e4, 1e5, 1e6)
SPREADS = (1.0, 1e-1, 1e-2, 1e-3)


def row_accuracy(device: str) -> Iterator[tuple[dict[str, object], str, dict[str, float]]]:
    """(case, contender, root-mean-square and largest error)."""
    random = torch.Generator(device).manual_seed(0)
    noise = torch.randn(ROWS, COLUMNS, generator=random, device=device)
    weight, bias = torch.randn(2, COLUMNS, generator=random, device=device)
    for base in BASES:
        for spread in SPREADS:
            x = base + spread * noise
            case = {"operation": "accuracy", "dtype": "float32", "base": base, "spread": spread}
            expected = reference.layer_norm(x.double(), (COLUMNS,), weight.double(), bias.double(), EPS)
            for contender, function in {OURS: layer_norm, "torch": F.layer_norm}.items():
                error = function(x, (COLUMNS,), weight, bias, EPS).double() - expected
                measured = {"rms_error": error.square().mean().sqrt(), "largest_error": error.abs().max()}
                yield case, contender, {name: float(f"{value.item():.3g}") for name, value in measured.items()}
