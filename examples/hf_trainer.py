# SPDX-License-Identifier: BSD-3-Clause
"""The same training by Hugging Face's Trainer, which is given the accelerated model and nothing else that is new."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import checkpoint
import memory
import torch
from checkpoint import StopSignals
from errors import CheckpointError, Stopped
from progress import LossProgress
from safetensors import SafetensorError, safe_open
from torch.utils.data import DataLoader
from training import Run, Task, batch_sampler, check_finite, count_steps, make_loader, make_optimizer
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments


def train_with_trainer(task: Task) -> Run:
    """As train(), with the Trainer's checkpoints. After a resume, tokens, seconds and memory are counted from there."""
    options, folder = task.options, task.folder / "trainer"
    arguments = TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=options.epochs,
        seed=options.seed,
        bf16=options.dtype == "bfloat16",
        use_cpu=True,
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_steps=options.save_every,
        save_total_limit=1,
        disable_tqdm=True,
        report_to="none",
    )
    start = _checkpoint_to_resume(options.resume, folder) if options.resume else None
    if options.resume:
        found = "Nothing to go on from: this is the start." if start is None else f"Going on from {start}."
        task.console.print(found, highlight=False, soft_wrap=True)
    batches = batch_sampler(task)
    steps = count_steps(batches, options.epochs)
    with StopSignals() as stop, LossProgress(task.console, options.only, steps) as progress:
        watch = _Watch(stop, progress)
        trainer = _Trainer(
            task.model,
            arguments,
            task=task,
            run=watch.run,
            batches=batches,
            optimizers=make_optimizer(task.model, options.lr, steps),
            callbacks=[watch],
        )
        trainer.remove_callback(PrinterCallback)  # it prints every step
        trainer.train(resume_from_checkpoint=start)
    watch.run.peak_mib = memory.peak_memory() / 2**20
    if stop.received is not None:
        raise Stopped(stop.received, len(watch.run.losses))
    return watch.run


class _Trainer(Trainer):
    """Takes the example's batches, and names the one at which a loss is not finite."""

    def __init__(self, *arguments: Any, task: Task, run: Run, batches: Any, **options: Any) -> None:
        self._task, self._run, self._batches = task, run, batches
        super().__init__(*arguments, **options)

    def get_train_dataloader(self) -> DataLoader:
        return self.accelerator.prepare(make_loader(self._task, self._batches))

    def training_step(self, model: torch.nn.Module, inputs: dict[str, Any], *arguments: Any) -> torch.Tensor:
        indices = inputs.pop("index").tolist()
        self._run.tokens += int(inputs["attention_mask"].sum())
        loss = super().training_step(model, inputs, *arguments)
        check_finite(self._task, self.state.global_step + 1, indices, loss=loss.item())
        return loss


class _Watch(TrainerCallback):
    """Shows and keeps the losses, times the steps, and has the Trainer save and stop at a signal."""

    def __init__(self, stop: StopSignals, progress: LossProgress) -> None:
        self.run, self._stop, self._progress = Run(), stop, progress

    def on_train_begin(self, args, state, control, **kwargs):
        self.run.losses += [entry["loss"] for entry in state.log_history if "loss" in entry]

    def on_step_begin(self, args, state, control, **kwargs):
        self._began = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        self.run.seconds += time.perf_counter() - self._began

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in logs:
            self.run.losses.append(logs["loss"])
            self._progress.step(self.run.losses, self.run.tokens / self.run.seconds)
        if self._stop.received is not None:
            control.should_save = control.should_training_stop = True


def _checkpoint_to_resume(named: Path | bool, folder: Path) -> str | None:
    """The folder that was named, or the last whole one: the Trainer writes its state last.

    Raises CheckpointError where a file in it is damaged.
    """
    if named is True:
        whole = [state.parent for state in folder.glob("checkpoint-*/trainer_state.json")]
        named = max(whole, key=lambda each: int(each.name.partition("-")[2]), default=None)
    if named is None:
        return None
    try:
        json.loads((named / "trainer_state.json").read_text())
        with safe_open(named / "model.safetensors", "pt"):
            pass
    except (OSError, ValueError, SafetensorError) as error:
        raise CheckpointError(f"{named} is no checkpoint of the Trainer, or not a whole one: {error}") from error
    for file in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        checkpoint.verify(named / file)
    return str(named)
