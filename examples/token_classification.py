# SPDX-License-Identifier: BSD-3-Clause
"""Fine-tunes MiniLM to find what Wikipedia's editors link or set in italics: as it comes, and accelerated.

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
    import tagging_data
    import torch
    import training
    import variants
    from command_line import exit_code, training_parser
    from rich.console import Console
    from seqeval.metrics import classification_report, f1_score
    from seqeval.scheme import IOB2
    from tagging_data import TAGS, Sentence
    from training import Task
    from transformers import (
        AutoModelForTokenClassification,
        DataCollatorForTokenClassification,
        PreTrainedTokenizerBase,
    )
except ModuleNotFoundError as error:
    sys.exit(f"This example needs {error.name}: pip install 'resnorm_ext[examples]'")

MAX_TOKENS = 128  # of a sentence; what is longer is cut
IGNORED = -100  # the label of what is neither learnt nor tested: special tokens, padding, all but a word's first token
OUTPUT = Path("build/token_classification")
STRICT = {"mode": "strict", "scheme": IOB2, "zero_division": 0}  # a mark counts where it begins and ends exactly


def main(arguments: Sequence[str]) -> int:
    parser = training_parser(__doc__, OUTPUT, lr=3e-4)
    variants.add_options(parser)
    options = parser.parse_args(arguments)

    def f1(result: dict[str, Any]) -> float:
        return f1_score(result["tags"], result["predicted"], **STRICT)

    def program() -> int:
        if options.only is None:
            return variants.run_each(__file__, arguments, options.output, ("F1 of all marks", f1))
        return train_and_test(options)

    return exit_code("token_classification", program)


def train_and_test(options: argparse.Namespace) -> int:
    """Trains ``options.only``, saves it, shows how good it is, and keeps that and what its training took."""
    console = Console()
    task, test = make_task(options, console)
    model = task.model = variants.prepare(task.model, options)
    console.print(f"[bold]{options.only}[/bold]: {len(task.dataset):,} sentences to train on, {len(test):,} to test on")
    run = training.train(task)
    model.save_pretrained(task.folder / "model")
    task.collate.tokenizer.save_pretrained(task.folder / "model")
    result = variants.keep_result(options, run, lambda: predict(model.eval(), test, task.collate))
    report = classification_report(result["tags"], result["predicted"], digits=3, **STRICT)
    console.print(f"\nOn articles that it has not trained on:\n\n{report}", highlight=False)
    return 0


def make_task(options: argparse.Namespace, console: Console) -> tuple[Task, list[dict[str, Any]]]:
    """The training that ``options`` ask for, of the stock model, and what it is to be tested on."""
    train, test = variants.read(tagging_data, options)
    model, tokenizer = variants.load(AutoModelForTokenClassification, TAGS, options)
    return Task(
        model,
        encode(train, tokenizer),
        [sentence.name for sentence in train],
        DataCollatorForTokenClassification(tokenizer, label_pad_token_id=IGNORED),
        options,
        options.output / options.only,
        console,
    ), encode(test, tokenizer)


def encode(sentences: Sequence[Sentence], tokenizer: PreTrainedTokenizerBase) -> list[dict[str, Any]]:
    """Each sentence's tokens, not yet padded, their labels, and its index."""
    encoding = tokenizer(
        [sentence.words for sentence in sentences], is_split_into_words=True, truncation=True, max_length=MAX_TOKENS
    )
    dataset = []
    for index, (ids, sentence) in enumerate(zip(encoding.input_ids, sentences, strict=True)):
        words = encoding.word_ids(index)
        labels = [
            IGNORED if word is None or word == before else TAGS.index(sentence.tags[word])
            for before, word in zip([None, *words], words, strict=False)
        ]
        dataset.append({"input_ids": ids, "labels": labels, "index": index})
    return dataset


def predict(
    model: torch.nn.Module, dataset: Sequence[dict[str, Any]], collate: DataCollatorForTokenClassification
) -> dict[str, list[list[str]]]:
    """The words' tags and those that ``model`` gives them, in two lists of sentences."""
    rows = metrics.predict(model, dataset, collate)
    pairs = [
        [(label, predicted) for label, predicted in zip(item["labels"], row, strict=False) if label != IGNORED]
        for item, row in zip(dataset, rows, strict=True)  # rows are as long as their batch
    ]
    return {
        "tags": [[TAGS[label] for label, _ in sentence] for sentence in pairs],
        "predicted": [[TAGS[predicted] for _, predicted in sentence] for sentence in pairs],
    }


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
