# SPDX-License-Identifier: BSD-3-Clause
"""Existing models on this package's operators: ``accelerate(model)``, ``restore(model)``, ``report(model)``."""

from .accelerate import accelerate, refresh, restore
from .report import LeftAlone, Replaced, Report, report

__all__ = ["LeftAlone", "Replaced", "Report", "accelerate", "refresh", "report", "restore"]
