# SPDX-License-Identifier: BSD-3-Clause
"""The same training of a Hugging Face model as it comes and accelerated, one after the other, and both compared.

Each has a process of its own, so that neither's memory counts as the other's.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from types import ModuleType
from typing import Any

import metrics
import pretrained
import torch
from checkpoint import StopSignals
from rich.console import Console
from training import Run
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import resnorm_ext
from resnorm_ext.build.jit import cache_directory
from resnorm_ext.demo.command import bundled_model

VARIANTS = ("stock", "accelerated")


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--only", choices=VARIANTS, help="this variant alone, in this process")
    parser.add_argument("--model", type=Path, metavar="DIR", help="a Hugging Face text model (default: MiniLM)")
    parser.add_argument("--data", type=Path, metavar="FILE", help="the texts' archive (default: pip fetches it, once)")


def read(data: ModuleType, options: argparse.Namespace) -> tuple[list[Any], list[Any]]:
    """What to train on and what to test on, of the texts that ``data`` fetches, reads and splits."""
    train, test = data.split(data.read(options.data or data.fetch(cache_directory())))
    return train[: options.limit], test if options.limit is None else test[: max(options.limit // 4, 1)]


def load(
    auto_model: type, names: Sequence[str], options: argparse.Namespace
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The text model with a new head for classes of these ``names``, the same for every variant, and its tokenizer."""
    torch.manual_seed(options.seed)
    labels = {name: label for label, name in enumerate(names)}
    source = options.model or bundled_model()
    return pretrained.load(auto_model, source, new_head=True, id2label=dict(enumerate(names)), label2id=labels)


def prepare(model: torch.nn.Module, options: argparse.Namespace) -> torch.nn.Module:
    """``model`` with the dropout that was asked for, accelerated where ``options.only`` is."""
    if options.dropout is not None:
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = options.dropout
    # No loss here reads padded positions.
    return resnorm_ext.accelerate(model, padding="skip") if options.only == "accelerated" else model


def keep_result(options: argparse.Namespace, run: Run, test: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What training took, and what ``test`` finds and takes, in a file of the variant's folder."""
    result = {
        "variant": options.only,
        "options": {name: str(value) for name, value in vars(options).items()},
        **asdict(run),
    }
    began = time.perf_counter()
    with torch.autocast("cpu", torch.bfloat16, enabled=options.dtype == "bfloat16"):
        result |= test()
    result["test_seconds"] = time.perf_counter() - began
    (options.output / options.only / "result.json").write_text(json.dumps(result))
    return result


def run_each(script: str, arguments: Sequence[str], output: Path, score: tuple[str, Callable[[Any], float]]) -> int:
    """Runs ``script`` for each variant, plots their losses and prints what they took, with a ``score`` of the results.

    The exit code is that of the first to fail.
    """
    results = []
    for variant in VARIANTS:
        code = _run([sys.executable, script, *arguments, "--only", variant])
        if code != 0:
            return code
        results.append(json.loads((output / variant / "result.json").read_text()))
    metrics.plot_losses({result["variant"]: result["losses"] for result in results}, output / "loss.png")
    Console().print(metrics.comparison(results, *score), f"All of it is in {output}.", highlight=False)
    return 0


def _run(command: Sequence[str]) -> int:
    """The exit code of a process that is told of the signals that reach this one."""
    with StopSignals() as stop:
        # In a session of its own a terminal's Ctrl-C reaches it through here alone, as kill does.
        child = subprocess.Popen(command, start_new_session=True)
        while child.poll() is None:
            if stop.received is not None:
                child.send_signal(stop.received)
                stop.received = None
            time.sleep(0.05)
    if stop.received is not None:  # when the child had ended already
        return 128 + stop.received
    return child.returncode if child.returncode >= 0 else 128 - child.returncode
