# SPDX-License-Identifier: BSD-3-Clause
"""A plain training loop that can be stopped at any step and goes on from there to the same curve."""

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
import torch
from checkpoint import CheckpointError, StopSignals
from progress import LossProgress
from rich.console import Console
from sentiment_data import Example
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, Sampler
from transformers import PreTrainedTokenizerBase, get_linear_schedule_with_warmup

from resnorm_ext.data import TokenBudgetSampler

MAX_TOKENS = 128  # of a text; what is longer is cut
# What a curve depends on besides the data: a run goes on only with the same.
SETTINGS = ("model", "epochs", "batch_size", "token_budget", "lr", "dropout", "dtype", "seed", "limit")


class TrainingError(Exception):
    """A training cannot go on."""


class Stopped(Exception):
    """A signal ended a training, after its last step was saved."""

    def __init__(self, number: int, steps: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name} after step {steps}; --resume goes on from there")
        self.number = number


@dataclass
class Task:
    """What is trained on what; ``options`` are the command line's."""

    model: torch.nn.Module
    examples: Sequence[Example]
    dataset: Sequence[dict[str, Any]]  # the examples' tokens
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
    losses: list[float] = field(default_factory=list)


def encode(examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase) -> list[dict[str, Any]]:
    """Each text's tokens, not yet padded, its class, and its index, by which an error can name it."""
    tokens = tokenizer([example.text for example in examples], truncation=True, max_length=MAX_TOKENS).input_ids
    return [
        {"input_ids": ids, "label": example.label, "index": index}
        for index, (ids, example) in enumerate(zip(tokens, examples, strict=True))
    ]


def batch_sampler(task: Task) -> Sampler[list[int]]:
    """Shuffled batches that follow from the seed and the epoch alone: the same ones for every variant, and again."""
    options = task.options
    if options.token_budget is not None:
        lengths = [len(item["input_ids"]) for item in task.dataset]
        return TokenBudgetSampler(lengths, options.token_budget, seed=options.seed)
    order = DistributedSampler(task.dataset, num_replicas=1, rank=0, seed=options.seed)
    return BatchSampler(order, options.batch_size, drop_last=False)


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


def fine_tune(task: Task) -> Run:
    """Trains ``task.model``, and keeps a checkpoint in ``task.folder``."""
    options, model = task.options, task.model
    batches = batch_sampler(task)
    steps = count_steps(batches, options.epochs)
    optimizer, schedule = make_optimizer(model, options.lr, steps)
    parts = {"model": model, "optimizer": optimizer, "schedule": schedule}
    path = task.folder / "checkpoint.pt"
    torch.manual_seed(options.seed)
    run = resume(options, path, parts, task.console) if options.resume else Run()

    model.train()
    with StopSignals() as stop, LossProgress(task.console, options.only, steps) as progress:
        while run.epoch < options.epochs:
            set_epoch(batches, run.epoch)
            for batch in make_loader(task, list(batches)[run.batch :]):
                indices = batch.pop("index").tolist()
                began = time.perf_counter()
                with torch.autocast("cpu", torch.bfloat16, enabled=options.dtype == "bfloat16"):
                    loss = model(**batch).loss
                loss.backward()
                norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                check_finite(task, len(run.losses) + 1, indices, loss=loss, gradient_norm=norm)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
                run.seconds += time.perf_counter() - began
                run.tokens += int(batch["attention_mask"].sum())
                run.losses.append(loss.item())
                run.batch += 1
                progress.step(run.losses, run.tokens / run.seconds)
                if stop.received is not None or len(run.losses) % options.save_every == 0:
                    save(options, path, parts, run)
                if stop.received is not None:
                    raise Stopped(stop.received, len(run.losses))
            run.epoch, run.batch = run.epoch + 1, 0
        save(options, path, parts, run)
    return run


def check_finite(task: Task, step: int, indices: Sequence[int], **values: torch.Tensor) -> None:
    """Raises TrainingError before a step that would spoil the weights."""
    for name, value in values.items():
        if not torch.isfinite(value):
            texts = ", ".join(task.examples[index].name for index in indices)
            raise TrainingError(f"the {name.replace('_', ' ')} is {value.item()} at step {step}, on the texts {texts}")


def save(options: argparse.Namespace, path: Path, parts: dict[str, Any], run: Run) -> None:
    state = {name: part.state_dict() for name, part in parts.items()}
    checkpoint.save(path, {**state, "settings": settings(options), "run": asdict(run), "random": torch.get_rng_state()})


def resume(options: argparse.Namespace, path: Path, parts: dict[str, Any], console: Console) -> Run:
    """Puts everything back as a checkpoint has it: the file that was named, of any variant, or ``path`` if it is there.

    Raises CheckpointError where it is damaged, or of a training with other settings.
    """
    if options.resume is True and not path.exists():
        console.print(f"There is no {path} to go on from: this is the start.", highlight=False, soft_wrap=True)
        return Run()
    path = path if options.resume is True else options.resume
    state = checkpoint.load(path)
    try:
        saved, now = state["settings"], settings(options)
        differences = [
            f"--{key.replace('_', '-')} {saved[key]}, not {now[key]}" for key in now if saved[key] != now[key]
        ]
        if differences:
            raise CheckpointError(f"{path} is of a training with {', '.join(differences)}")
        for name, part in parts.items():
            part.load_state_dict(state[name])
        torch.set_rng_state(state["random"])
        run = Run(**state["run"])
    except (KeyError, RuntimeError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} does not fit this model: {error}") from error
    console.print(f"Going on from {path}, after step {len(run.losses)}.", highlight=False, soft_wrap=True)
    return run


def settings(options: argparse.Namespace) -> dict[str, Any]:
    values = {name: getattr(options, name) for name in SETTINGS}
    return {name: str(value) if isinstance(value, Path) else value for name, value in values.items()}
