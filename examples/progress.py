# SPDX-License-Identifier: BSD-3-Clause
"""What a training shows while it runs."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

EVERY = 20  # steps


class LossProgress(Progress):
    """A bar of the steps, and a line with the mean loss every few of them."""

    def __init__(self, console: Console, name: str, total: int) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
        super().__init__(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console, transient=True)
        self._task, self._total = self.add_task(name, total=total), total

    def step(self, losses: Sequence[float], tokens_per_second: float) -> None:
        """``losses`` are all so far."""
        done = len(losses)
        self.update(self._task, completed=done)
        if done % EVERY == 0 or done == self._total:
            mean = sum(losses[-EVERY:]) / len(losses[-EVERY:])
            self.console.print(
                f"step {done:>5} of {self._total}  loss {mean:.4f}  {tokens_per_second:7,.0f} tokens/s", highlight=False
            )
