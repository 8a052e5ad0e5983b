# SPDX-License-Identifier: BSD-3-Clause
"""Checkpoints that are whole whenever the program ends, and signals that let it end after a step."""

from __future__ import annotations

import os
import pickle
import signal
import zipfile
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from errors import CheckpointError


def save(path: Path, state: dict[str, Any]) -> None:
    """Writes ``state`` beside ``path``, then puts it there in one step: a program that is killed leaves the one before.

    It may hold tensors, numbers, strings, lists and dictionaries, which load() takes.
    """
    aside = path.with_name(f"{path.name}.part")
    path.parent.mkdir(parents=True, exist_ok=True)
    with aside.open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)


def load(path: Path) -> dict[str, Any]:
    """What save() wrote. Nothing in the file can run code."""
    verify(path)
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (EOFError, KeyError, RuntimeError, ValueError, pickle.UnpicklingError) as error:
        raise CheckpointError(f"{path} is no checkpoint: {_first_line(error)}") from error


def verify(path: Path) -> None:
    """Raises CheckpointError unless ``path`` is a file that torch.save wrote, as it wrote it: torch.load itself
    compares no checksums."""
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except (OSError, EOFError, NotImplementedError, zipfile.BadZipFile) as error:
        raise CheckpointError(f"{path} is no checkpoint, or not a whole one: {_first_line(error)}") from error
    if damaged is not None:
        raise CheckpointError(f"{path} is damaged: {damaged} in it differs from its checksum")


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]


class StopSignals:
    """Notes Ctrl-C and kill while it is entered, instead of ending the program in the middle of a step.

    Attributes:
        received: the signal's number, or None.
    """

    def __init__(self) -> None:
        self.received: int | None = None

    def __enter__(self) -> StopSignals:
        self._before = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = number
