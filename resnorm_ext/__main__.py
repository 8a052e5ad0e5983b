# SPDX-License-Identifier: BSD-3-Clause
"""``python -m resnorm_ext COMMAND``: each command is a module of this package with ``main(arguments)``."""

from __future__ import annotations

import argparse
import importlib
import os
import sys

from .build.config import VERSION

COMMANDS = {
    "demo": "encode real text with a real BERT, as it comes and accelerated, and compare",
    "selftest": "show it to work on this machine: every operator on the CPU and every GPU, against formulas in float64",
    "bench": "how much faster than PyTorch on this machine",
    "doctor": "what is wrong, or slower than it need be, on this machine; and what of a model would be accelerated",
    "info": "what this installation is built for, what the machine offers and what is in use",
}


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m resnorm_ext", formatter_class=argparse.RawTextHelpFormatter)
    commands = "\n".join(f"{name}: {purpose}" for name, purpose in COMMANDS.items())
    parser.add_argument("--version", action="version", version=f"resnorm_ext {VERSION}")
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", help=commands)
    command = parser.parse_args(arguments[:1]).command
    try:
        status = importlib.import_module(f".{command}", __package__).main(arguments[1:])
        sys.stdout.flush()  # here, where it is seen that nobody reads on
        return status
    except KeyboardInterrupt:
        return 130  # as a shell says that Ctrl-C ended it
    except BrokenPipeError:  # as after "| head"
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
