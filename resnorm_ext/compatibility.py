# SPDX-License-Identifier: BSD-3-Clause
"""Which versions of other libraries the integrations are for."""

from __future__ import annotations

import re

_OLDEST_TRANSFORMERS = (5, 2)


def transformers_reason(version: str) -> str | None:
    """What keeps models of this version of transformers as they are."""
    if tuple(map(int, re.findall(r"\d+", version)[:2])) >= _OLDEST_TRANSFORMERS:
        return None
    needed = ".".join(map(str, _OLDEST_TRANSFORMERS))
    return f"transformers {version} is installed, and {needed} or newer is needed"
