# SPDX-License-Identifier: BSD-3-Clause
"""A plain training loop, in one process or several, that can be stopped at any step and goes on to the same curve."""

from __future__ import annotations

import argparse
import math
import signal
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import checkpoint
import memory
import parallel
import torch
from checkpoint import StopSignals
from errors import CheckpointError, Stopped, TrainingError
from progress import LossProgress
from rich.console import Console
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, Sampler
from transformers import get_linear_schedule_with_warmup

from resnorm_ext.data import TokenBudgetSampler

# Options that a curve does not depend on: a run goes on only where all the others are the same.
NOT_SETTINGS = ("data", "only", "output", "parallel", "resume", "save_every", "trainer")


@dataclass
class Task:
    """What is trained on what; ``options`` are the command line's."""

    model: torch.nn.Module  # called with a batch, it gives what has a .loss
    dataset: Sequence[dict[str, Any]]  # tokens, not yet padded, and the item's index
    names: Sequence[str]  # of the dataset's items, for an error
    collate: Callable
    options: argparse.Namespace
    folder: Path
    console: Console


@dataclass
class Run:
    """How far a training has come, and what its steps took. Tokens are real ones, not padding."""

    epoch: int = 0
    batch: int = 0  # the next one of this epoch
    tokens: int = 0
    seconds: float = 0.0
    peak_mib: float = 0.0  # the most that a process has had in memory until the last step
    losses: list[float] = field(default_factory=list)


def batch_sampler(task: Task) -> Sampler[list[int]]:
    """Shuffled batches that follow from the seed and the epoch alone: the same ones for every variant, and again.

    Of several processes each takes its share of every batch; with a token budget, of the batches.
    """
    options, (processes, rank) = task.options, parallel.world()
    if options.token_budget is not None:
        lengths = [len(item["input_ids"]) for item in task.dataset]
        return TokenBudgetSampler(lengths, options.token_budget, seed=options.seed)
    if options.batch_size % processes:
        raise TrainingError(
            f"expected --batch-size to be a multiple of {processes} processes, but got {options.batch_size}"
        )
    order = DistributedSampler(task.dataset, num_replicas=processes, rank=rank, seed=options.seed)
    return BatchSampler(order, options.batch_size // processes, drop_last=False)


def set_epoch(batches: Sampler[list[int]], epoch: int) -> None:
    getattr(batches, "sampler", batches).set_epoch(epoch)


def make_loader(task: Task, batches: Iterable[list[int]]) -> DataLoader:
    """Its generator is its own, since it takes a number from one, and from the common one dropout's numbers come."""
    return DataLoader(
        task.dataset, batch_sampler=batches, collate_fn=task.collate, generator=torch.Generator().manual_seed(0)
    )


def count_steps(batches: Sampler[list[int]], epochs: int) -> int:
    total = 0
    for epoch in range(epochs):  # with a token budget, epochs may differ by a batch
        set_epoch(batches, epoch)
        total += len(batches)
    set_epoch(batches, 0)
    return total


def make_optimizer(model: torch.nn.Module, lr: float, steps: int) -> tuple[torch.optim.Optimizer, LRScheduler]:
    """AdamW, whose rate rises for a tenth of the steps and falls for the others."""
    optimizer = torch.optim.AdamW(model.parameters(), lr, weight_decay=0.01, fused=True)
    return optimizer, get_linear_schedule_with_warmup(optimizer, math.ceil(steps / 10), steps)


def train(task: Task) -> Run:
    """Trains ``task.model``, and keeps a checkpoint in ``task.folder``."""
    options, model = task.options, task.model
    device, (processes, rank) = next(model.parameters()).device, parallel.world()
    batches = batch_sampler(task)
    try:
        steps = count_steps(batches, options.epochs)
    except ValueError as error:  # fewer batches than processes
        raise TrainingError(str(error)) from error
    task.folder.mkdir(parents=True, exist_ok=True)  # now, and not when a step is to be saved
    optimizer, schedule = make_optimizer(model, options.lr, steps)
    parts = (model, optimizer, schedule)
    path = task.folder / "checkpoint.pt"
    torch.manual_seed(options.seed + rank)
    run = resume(task, path, parts) if options.resume else Run()

    def stopped() -> bool:
        return parallel.sums(stop.received is not None, device=device)[0] > 0

    model.train()
    with StopSignals() as stop, LossProgress(task.console, task.folder.name, steps) as progress:
        while run.epoch < options.epochs:
            set_epoch(batches, run.epoch)
            for batch in make_loader(task, list(batches)[run.batch :]):
                indices = batch.pop("index").tolist()
                began = time.perf_counter()
                tokens = int(batch["attention_mask"].sum())
                batch = {name: value.to(device) for name, value in batch.items()}
                with torch.autocast(device.type, torch.bfloat16, enabled=options.dtype == "bfloat16"):
                    loss = model(**batch).loss
                loss.backward()
                norm = parallel.whole(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0))
                loss, tokens = parallel.sums(loss.item() / processes, tokens, device=device)
                check_finite(task, len(run.losses) + 1, indices, loss=loss, gradient_norm=norm.item())
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
                run.seconds += time.perf_counter() - began
                run.tokens += int(tokens)
                run.losses.append(loss)
                run.batch += 1
                progress.step(run.losses, run.tokens / run.seconds)
                stops = stopped()
                if stops or len(run.losses) % options.save_every == 0:
                    save(options, path, parts, run)
                if stops:
                    raise Stopped(stop.received or signal.SIGTERM, len(run.losses))
            run.epoch, run.batch = run.epoch + 1, 0
            save(options, path, parts, run)
        if stopped():  # after the last step
            raise Stopped(stop.received or signal.SIGTERM, len(run.losses))
    return run


def check_finite(task: Task, step: int, indices: Sequence[int], **values: float) -> None:
    """Raises TrainingError before a step that would spoil the weights."""
    for name, value in values.items():
        if not math.isfinite(value):
            texts = ", ".join(task.names[index] for part in parallel.gathered(indices) for index in part)
            raise TrainingError(f"the {name.replace('_', ' ')} is {value} at step {step}, on the texts {texts}")


Parts = tuple[torch.nn.Module, torch.optim.Optimizer, LRScheduler]


def save(options: argparse.Namespace, path: Path, parts: Parts, run: Run) -> None:
    """All that goes on: the same whatever the number of processes, but for their random numbers."""
    model, optimizer, schedule = parts
    run.peak_mib = max(run.peak_mib, memory.peak_memory() / 2**20)
    state = {
        **parallel.state(model, optimizer),
        "schedule": schedule.state_dict(),
        "settings": settings(options),
        "run": asdict(run),
        "random": parallel.gathered(parallel.random_state()),
    }
    if parallel.world()[1] == 0:
        checkpoint.save(path, state)


def resume(task: Task, path: Path, parts: Parts) -> Run:
    """Puts everything back as a checkpoint has it: the file that was named, of any variant, or ``path`` if it is there.

    Raises CheckpointError where it is damaged, or of a training with other settings.
    """
    options, (model, optimizer, schedule) = task.options, parts
    if options.resume is True and not path.exists():
        task.console.print(f"There is no {path} to go on from: this is the start.", highlight=False, soft_wrap=True)
        return Run()
    path = path if options.resume is True else options.resume
    state = checkpoint.load(path)
    try:
        saved, now = state["settings"], settings(options)
        differences = [
            f"--{key.replace('_', '-')} {saved.get(key)}, not {now[key]}" for key in now if saved.get(key) != now[key]
        ]
        if differences:
            raise CheckpointError(f"{path} is of a training with {', '.join(differences)}")
        parallel.load_state(model, optimizer, state)
        schedule.load_state_dict(state["schedule"])
        parallel.set_random_state(state["random"])
        run = Run(**state["run"])
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} does not fit this model: {error}") from error
    task.console.print(f"Going on from {path}, after step {len(run.losses)}.", highlight=False, soft_wrap=True)
    return run


def settings(options: argparse.Namespace) -> dict[str, Any]:
    values = {name: value for name, value in vars(options).items() if name not in NOT_SETTINGS}
    return {name: str(value) if isinstance(value, Path) else value for name, value in values.items()}
