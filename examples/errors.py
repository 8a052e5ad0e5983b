# SPDX-License-Identifier: BSD-3-Clause
"""What ends a program of these with one line that says why, and no traceback."""

from __future__ import annotations

import signal


class CheckpointError(Exception):
    """A checkpoint or model cannot be used: the message names the file, and what is wrong."""


class DataError(Exception):
    """The texts cannot be had: the message says which file is wrong, and how."""


class TrainingError(Exception):
    """A training cannot go on."""


class Stopped(Exception):
    """A signal ended a training, after its last step was saved."""

    def __init__(self, number: int, steps: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name} after step {steps}; --resume goes on from there")
        self.number = number
