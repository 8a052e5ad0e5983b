# SPDX-License-Identifier: BSD-3-Clause
"""Text as bytes, in windows to learn from and to be tested on: Python's own documentation, or a file of one's own.

Every Python has the first: the language reference that its help() shows, and the documentation strings of the standard
library's sources, both under the PSF licence. They are read, and none of the sources runs.
"""

from __future__ import annotations

import ast
import bisect
import random
import re
import sysconfig
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from errors import DataError
from torch import Tensor
from torch.utils.data import Dataset

from resnorm_ext.data import pack_sequences

VOCABULARY = 256
START = 0  # comes before a document's first byte; text does not have it
IGNORED = -100  # the label of a byte that is there as context alone
HELD_OUT = 0.1

_NOT_THE_LIBRARY = {"dist-packages", "idle_test", "site-packages", "test", "tests"}
_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


@dataclass(frozen=True)
class Document:
    name: str
    content: bytes


def split(documents: Sequence[Document]) -> tuple[list[Document], list[Document]]:
    """About nine tenths of the bytes to train on and one to test on, in random order, always the same."""
    shuffled = random.Random(0).sample(documents, len(documents))
    ends = list(accumulate(len(document.content) for document in shuffled))
    cut = bisect.bisect(ends, (1 - HELD_OUT) * ends[-1])
    return shuffled[:cut], shuffled[cut:]


def split_file(path: Path, shortest: int) -> tuple[list[Document], list[Document]]:
    """The beginning of a file, in any encoding or none, to train on, and its last tenth to test on.

    Raises DataError where it has fewer than ``shortest`` bytes.
    """
    content = path.read_bytes()
    if len(content) < shortest:
        raise DataError(f"expected {path} to have {shortest:,} bytes or more, but it has {len(content):,}")
    cut = round((1 - HELD_OUT) * len(content))
    return [Document(str(path), content[:cut])], [Document(f"the end of {path}", content[cut:])]


def python_documentation() -> list[Document]:
    """A document for each topic of the language reference, and for each public module of the standard library."""
    folder = Path(sysconfig.get_path("stdlib"))
    texts = {f"topic {name}": text for name, text in topics.items()}
    for path in sorted(folder.rglob("*.py")):
        name = path.relative_to(folder)
        if not any(part in _NOT_THE_LIBRARY or re.match("_(?!_)", part) for part in name.parts):
            texts[str(name)] = _documentation_strings(path)
    return without_repeats(texts)


def without_repeats(texts: dict[str, str]) -> list[Document]:
    """Each paragraph once, where it comes first: topics contain others, and what is held out must not be learned."""
    documents, seen = [], {""}
    for name, text in texts.items():
        kept = []
        for paragraph in re.split(r"\n\s*\n", text):
            words = " ".join(paragraph.split())
            if words not in seen:
                seen.add(words)
                kept.append(paragraph.strip("\n"))
        if kept:
            documents.append(Document(name, "\n\n".join(kept).encode()))
    return documents


class Windows(Dataset):
    """Pieces of documents with the byte that follows each of theirs.

    Args:
        documents: of one byte or more.
        context: bytes of a window; the last one of a document may have fewer.
        overlap: how many of them a window shares with the one before, whose labels there are ``IGNORED``: every byte of
            a document is a label once.
        limit: how many windows; all where None.

    Attributes:
        names: of the windows.
    """

    def __init__(self, documents: Sequence[Document], context: int, overlap: int = 0, limit: int | None = None) -> None:
        self._context, self._overlap = context, overlap
        places = (
            (document, begin)
            for document in documents
            for begin in range(0, max(len(document.content) - overlap, 1), context - overlap)
        )
        self._places = list(places)[:limit]
        self.names = [f"{document.name} from byte {begin}" for document, begin in self._places]

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int) -> dict[str, Any]:
        document, begin = self._places[index]
        following = document.content[begin : begin + self._context]
        before = document.content[begin - 1 : begin] if begin else bytes([START])
        labels = torch.tensor(list(following))
        if begin:
            labels[: self._overlap] = IGNORED
        return {"input_ids": torch.tensor(list(before + following[:-1])), "labels": labels, "index": index}

    def labelled(self) -> bytes:
        """All bytes that are labels."""
        labels = torch.cat([self[index]["labels"] for index in range(len(self))])
        return bytes(labels[labels != IGNORED].tolist())


def collate(items: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
    """Windows one after another, whatever their lengths, without padding."""
    packed = pack_sequences([item["input_ids"] for item in items])
    return {
        "input_ids": packed.tokens,
        "cu_seqlens": packed.cu_seqlens,
        "labels": torch.cat([item["labels"] for item in items]),
        "attention_mask": torch.ones_like(packed.tokens),  # by which the training counts tokens
        "index": torch.tensor([item["index"] for item in items]),
    }


def compressed_bits_per_byte(text: bytes, before: bytes, compress: Callable[[bytes], bytes]) -> float:
    """What ``text`` adds to ``before`` when both are compressed."""
    return 8 * (len(compress(before + text)) - len(compress(before))) / len(text)


def _documentation_strings(path: Path) -> str:
    nodes = [node for node in ast.walk(ast.parse(path.read_bytes())) if isinstance(node, _DOCUMENTED)]
    nodes.sort(key=lambda node: getattr(node, "lineno", 0))  # the walk goes by depth
    return "\n\n".join(filter(None, map(ast.get_docstring, nodes)))
