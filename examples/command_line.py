# SPDX-License-Identifier: BSD-3-Clause
"""Options that the trainings have in common, and what they answer to a user's mistakes and signals."""

from __future__ import annotations

import argparse
import math
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from errors import CheckpointError, DataError, Stopped, TrainingError


def training_parser(description: str | None, output: Path, **defaults: float) -> argparse.ArgumentParser:
    """The options of a training that writes to ``output``, where it has other ``defaults`` with those."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    add, count = parser.add_argument, number(int, 1)
    add("--epochs", type=count, default=2, help="default: %(default)s")
    batches = parser.add_mutually_exclusive_group()
    batches.add_argument("--batch-size", type=count, default=32, help="examples of a batch (default: %(default)s)")
    batches.add_argument(
        "--token-budget", type=count, help="tokens of a batch, of examples of like lengths; a longer one goes alone"
    )
    add("--lr", type=number(float, 0), default=1e-4, help="the highest learning rate (default: %(default)s)")
    add("--dropout", type=number(float, 0, 1), help="every rate in the model (default: as it comes)")
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="bfloat16 is by autocast")
    add("--seed", type=number(int, 0, 2**31 - 1), default=0)
    add("--limit", type=count, help="examples to train on, and a quarter as many to test on (default: all)")
    add("--resume", nargs="?", type=Path, const=True, metavar="FILE", help="from FILE, or else the last checkpoint")
    add("--save-every", type=count, default=200, metavar="STEPS", help="default: %(default)s")
    add("--output", type=Path, default=output, metavar="DIR", help="default: %(default)s")
    parser.set_defaults(**defaults)
    return parser


def number(kind: type, low: float, high: float = float("inf")) -> Callable[[str], Any]:
    """An option's type: a number of ``kind`` from ``low`` to ``high``."""

    bounds = f"from {low} to {high}" if math.isfinite(high) else f"of {low} or more"

    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not (low <= value <= high and math.isfinite(value)):
            raise argparse.ArgumentTypeError(f"expected a number {bounds}, but got {text!r}")
        return value

    return parse


def exit_code(name: str, program: Callable[[], int]) -> int:
    """What ``program`` returns; where it ends otherwise, a line on stderr that says why, and a code as a shell's."""
    try:
        return program()
    except (CheckpointError, DataError, TrainingError, ImportError, OSError) as error:
        print(f"{name}: {error}", file=sys.stderr)
        return 1
    except Stopped as stopped:
        print(f"{name}: {stopped}", file=sys.stderr)
        return 128 + stopped.number
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
