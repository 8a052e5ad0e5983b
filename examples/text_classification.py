# SPDX-License-Identifier: BSD-3-Clause
"""Fine-tunes MiniLM to tell negative, neutral and positive texts apart: as it comes, and accelerated.

Both start from the same weights and train on the same batches, one after the other, each in a process of its own.
Checkpoints, models, results and a plot go to a folder.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

try:
    import metrics
    import sentiment_data
    import torch
    import training
    import variants
    from command_line import exit_code, training_parser
    from rich.console import Console
    from sentiment_data import CLASSES, Example
    from sklearn.metrics import accuracy_score
    from training import Run, Task
    from transformers import AutoModelForSequenceClassification, DataCollatorWithPadding, PreTrainedTokenizerBase
except ModuleNotFoundError as error:
    sys.exit(f"This example needs {error.name}: pip install 'resnorm_ext[examples]'")

MAX_TOKENS = 128  # of a text; what is longer is cut
OUTPUT = Path("build/text_classification")


def main(arguments: Sequence[str]) -> int:
    parser = training_parser(__doc__, OUTPUT)
    variants.add_options(parser)
    parser.add_argument("--trainer", action="store_true", help="by Hugging Face's Trainer")
    options = parser.parse_args(arguments)

    def accuracy(result: dict[str, Any]) -> float:
        return accuracy_score(result["labels"], result["predicted"])

    def program() -> int:
        if options.only is None:
            return variants.run_each(__file__, arguments, options.output, ("accuracy", accuracy))
        return train_and_test(options)

    return exit_code("text_classification", program)


def train_and_test(options: argparse.Namespace) -> int:
    """Trains ``options.only``, and then as keep_and_test()."""
    console = Console()
    task, test = make_task(options, console)
    task.model = variants.prepare(task.model, options)
    console.print(f"[bold]{options.only}[/bold]: {len(task.dataset):,} texts to train on, {len(test):,} to test on")
    if options.trainer:
        from hf_trainer import train_with_trainer as train  # it alone needs the package accelerate
    else:
        train = training.train
    keep_and_test(task.model, task, train(task), test)
    return 0


def keep_and_test(model: torch.nn.Module, task: Task, run: Run, test: Sequence[Example]) -> None:
    """Saves the trained ``model``, shows how good it is, and keeps that and what its training took."""
    options, tokenizer = task.options, task.collate.tokenizer
    model.save_pretrained(task.folder / "model")
    tokenizer.save_pretrained(task.folder / "model")
    dataset, labels = encode(test, tokenizer), [example.label for example in test]
    result = variants.keep_result(
        options,
        run,
        lambda: {"labels": labels, "predicted": metrics.predict(model.eval(), dataset, task.collate)},
    )
    report = metrics.class_report(labels, result["predicted"], CLASSES)
    task.console.print(f"\nOn texts that it has not trained on:\n\n{report}", highlight=False)


def make_task(options: argparse.Namespace, console: Console) -> tuple[Task, list[Example]]:
    """The training that ``options`` ask for, of the stock model, and the texts that it is to be tested on."""
    train, test = variants.read(sentiment_data, options)
    model, tokenizer = variants.load(AutoModelForSequenceClassification, CLASSES, options)
    return Task(
        model,
        encode(train, tokenizer),
        [example.name for example in train],
        DataCollatorWithPadding(tokenizer),
        options,
        options.output / options.only,
        console,
    ), test


def encode(examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase) -> list[dict[str, Any]]:
    """Each text's tokens, not yet padded, its class, and its index."""
    tokens = tokenizer([example.text for example in examples], truncation=True, max_length=MAX_TOKENS).input_ids
    return [
        {"input_ids": ids, "label": example.label, "index": index}
        for index, (ids, example) in enumerate(zip(tokens, examples, strict=True))
    ]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
