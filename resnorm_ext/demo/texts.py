# SPDX-License-Identifier: BSD-3-Clause
"""Real text to encode: the user's own, or documentation strings of Python's standard library."""

from __future__ import annotations

import importlib
import inspect
import re
from pathlib import Path

_MODULES = (
    "argparse asyncio collections datetime decimal difflib email functools heapq http inspect itertools json logging "
    "multiprocessing os pathlib pickle random re sched shutil socket sqlite3 statistics string subprocess tarfile "
    "textwrap threading typing unittest urllib uuid zipfile"
).split()
_SHORTEST = 40  # characters: what is shorter says next to nothing


def read_texts(path: Path) -> list[str]:
    """The paragraphs of a text file: runs of lines between blank ones."""
    try:
        content = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"expected text in UTF-8 in {path}, but {error}") from error
    texts = [text for paragraph in re.split(r"\n\s*\n", content) if (text := " ".join(paragraph.split()))]
    if not texts:
        raise ValueError(f"expected at least one paragraph of text in {path}, but it has none")
    return texts


def standard_library_texts(count: int = 512) -> list[str]:
    """``count`` different documentation strings, in the order in which the modules list them."""
    texts: dict[str, None] = {}
    for name in _MODULES:
        for _, member in inspect.getmembers(importlib.import_module(name)):
            documentation = inspect.getdoc(member)
            if documentation and len(documentation) > _SHORTEST:
                texts[" ".join(documentation.split())] = None
    return list(texts)[:count]
