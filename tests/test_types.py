# SPDX-License-Identifier: BSD-3-Clause
"""What a type checker learns of the package, by a program as a user writes it."""

from __future__ import annotations

from pathlib import Path

import pytest

import resnorm_ext

PROGRAM = """\
import torch
from torch import Tensor, nn

import resnorm_ext
from resnorm_ext import TransformerEncoder, TransformerEncoderLayer, functional

x = torch.randn(2, 8)
y: Tensor = functional.layer_norm(x, (8,))
y = functional.add_layer_norm(x, x, (8,), dropout_p=0.1, training=True)
y, s = functional.add_layer_norm(x, x, (8,), prenorm=True)
y = functional.add_rms_norm(x, x, (8,))
y, s = functional.add_rms_norm(x, x, (8,), prenorm=True, out=(y, s))
linear: nn.Linear = resnorm_ext.accelerate(nn.Linear(2, 2))
text = str(resnorm_ext.report(linear))
out: Tensor = TransformerEncoder(TransformerEncoderLayer(8, 2, 16), 1)(torch.randn(1, 2, 8))
"""


def checked(program: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    api = pytest.importorskip("mypy.api")
    path = folder / "program.py"
    path.write_text(program)
    monkeypatch.setenv("MYPYPATH", str(Path(resnorm_ext.__file__).parents[1]))
    options = ["--strict", "--follow-imports=silent", "--cache-dir", str(folder / "cache"), "--no-error-summary"]
    return api.run([*options, str(path)])[0].splitlines()


def test_programs_under_strict_mypy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    assert checked(PROGRAM, tmp_path, monkeypatch) == []
    wrong = PROGRAM + "one: Tensor = functional.add_layer_norm(x, x, (8,), prenorm=True)\n"
    (message,) = checked(wrong, tmp_path, monkeypatch)
    assert 'expression has type "tuple[Tensor, Tensor]"' in message
