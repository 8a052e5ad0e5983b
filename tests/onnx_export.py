# SPDX-License-Identifier: BSD-3-Clause
"""Models as ONNX, by either of torch's exporters, and what they compute there."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import onnx
import torch
from onnx.reference import ReferenceEvaluator
from torch import Tensor, nn

EXPORTERS = {"by torch.export": True, "by torch.jit.trace": False}


def export(
    model: nn.Module, arguments: tuple[Tensor, ...], path: Path, exporter: str, **options: Any
) -> onnx.ModelProto:
    """``model`` in inference as ONNX; there is nothing but ONNX's own operators in it."""
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # speaks of packages that are not installed
    names = [_name(index) for index in range(len(arguments))]
    file = path / "model.onnx"
    with torch.no_grad():
        torch.onnx.export(
            model.eval(), arguments, file, dynamo=EXPORTERS[exporter], input_names=names, verbose=False, **options
        )
    exported = onnx.load(file)
    onnx.checker.check_model(exported)
    assert {opset.domain for opset in exported.opset_import} == {""}
    return exported


def run(exported: onnx.ModelProto, arguments: tuple[Tensor, ...]) -> Tensor:
    """The first output. An argument that nothing depends on may be none of what is exported."""
    given = {_name(index): argument.numpy() for index, argument in enumerate(arguments)}
    needed = {value.name: given[value.name] for value in exported.graph.input}
    return torch.from_numpy(ReferenceEvaluator(exported).run(None, needed)[0])


def _name(index: int) -> str:
    return f"input_{index}"
