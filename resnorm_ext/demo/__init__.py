# SPDX-License-Identifier: BSD-3-Clause
"""``python -m resnorm_ext demo``: a real BERT on real text, as it comes and accelerated, side by side."""

from .command import main

__all__ = ["main"]
