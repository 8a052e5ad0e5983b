# SPDX-License-Identifier: BSD-3-Clause
"""Trains a small GPT-2 on the bytes of Python's documentation, or of a file, and has it write on from a prompt.

What it has learned is told in bits per byte of text that it has not trained on, beside what xz and bzip2 need for that.
The model, a checkpoint, the result and a plot of the loss go to a folder.
"""

from __future__ import annotations

import argparse
import bz2
import json
import lzma
import math
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

try:
    import byte_data
    import checkpoint
    import metrics
    import torch
    import training
    from byte_data import IGNORED, START, VOCABULARY, Windows
    from command_line import exit_code, number, training_parser
    from errors import CheckpointError
    from gpt import GPT
    from rich.console import Console
    from rich.table import Table
    from training import Task
except ModuleNotFoundError as error:
    sys.exit(f"This example needs {error.name}: pip install 'resnorm_ext[examples]'")

from torch.utils.data import DataLoader

from resnorm_ext.data import TokenBudgetSampler

OUTPUT = Path("build/language_model")
SIZES = ("context", "layers", "heads", "width", "dropout", "rms")  # options that make the model
WRITING = ("generate", "model", "prompt", "temperature")  # options that no training depends on
FEWEST_WINDOWS = 10  # of a text
COMPRESSORS = {
    "xz -9e": partial(lzma.compress, preset=9 | lzma.PRESET_EXTREME),
    "bzip2 -9": partial(bz2.compress, compresslevel=9),
}


def main(arguments: Sequence[str]) -> int:
    parser = make_parser()
    options = parser.parse_args(arguments)
    if options.width % options.heads:
        parser.error(f"expected --width to be a multiple of --heads, but got {options.width} and {options.heads}")

    def program() -> int:
        console = Console()
        model = train_and_test(options, console) if options.model is None else load(options.model)
        text = write(model, os.fsencode(options.prompt), options.generate, options.temperature, options.seed)
        console.print(text.decode(errors="replace"), markup=False, highlight=False, soft_wrap=True)
        return 0

    return exit_code("language_model", program)


def make_parser() -> argparse.ArgumentParser:
    parser = training_parser(__doc__, OUTPUT, epochs=4, batch_size=8, lr=3e-3, dropout=0.0)
    add, count = parser.add_argument, number(int, 1)
    add("--text", type=Path, metavar="FILE", help="to train on, as bytes (default: Python's documentation)")
    add("--context", type=number(int, 2), default=128, help="bytes of a window, an example (default: %(default)s)")
    add("--layers", type=count, default=4, help="default: %(default)s")
    add("--heads", type=count, default=4, help="default: %(default)s")
    add("--width", type=count, default=192, help="default: %(default)s")
    add("--rms", action="store_true", help="RMSNorm in the place of LayerNorm")
    add("--generate", type=number(int, 0), default=400, metavar="N", help="bytes to write (default: %(default)s)")
    add("--prompt", default="The ", metavar="TEXT", help="to go on from (default: '%(default)s')")
    add("--temperature", type=number(float, 0), default=0.7, help="0 for the likeliest byte (default: %(default)s)")
    add("--model", type=Path, metavar="FILE", help="write with a model that is trained already, and train none")
    return parser


def train_and_test(options: argparse.Namespace, console: Console) -> GPT:
    """The trained model, in eval mode; what it has learned and took is shown and kept."""
    task, test = make_task(options, console)
    parameters = sum(parameter.numel() for parameter in task.model.parameters())
    learned, held_out = task.dataset.labelled(), test.labelled()
    console.print(
        f"{parameters:,} parameters, {len(learned):,} bytes to train on, {len(held_out):,} to test on", highlight=False
    )
    run = training.train(task)
    checkpoint.save(task.folder / "model.pt", {"sizes": sizes(options), "model": task.model.state_dict()})
    metrics.plot_losses({"GPT": run.losses}, task.folder / "loss.png")
    result = {"options": {name: str(value) for name, value in vars(options).items()}, **asdict(run)}
    result["bits_per_byte"] = bits_per_byte(task.model.eval(), test, options.dtype)
    result["compressed"] = {
        name: byte_data.compressed_bits_per_byte(held_out, learned, compress) for name, compress in COMPRESSORS.items()
    }
    (task.folder / "result.json").write_text(json.dumps(result))
    console.print(results(result), f"All of it is in {task.folder}.\n", highlight=False)
    return task.model


def make_task(options: argparse.Namespace, console: Console) -> tuple[Task, Windows]:
    """The training that ``options`` ask for, and the windows that the model is to be tested on: each shares half of its
    bytes with the one before, so that every byte has as many before it, but where a document begins."""
    context = options.context
    if options.text is None:
        train, test = byte_data.split(byte_data.python_documentation())
    else:
        train, test = byte_data.split_file(options.text, FEWEST_WINDOWS * context)
    fewer = None if options.limit is None else max(options.limit // 4, 1)
    torch.manual_seed(options.seed)
    dataset = Windows(train, context, limit=options.limit)
    task = Task(
        GPT(VOCABULARY, **sizes(options)),
        dataset,
        dataset.names,
        byte_data.collate,
        argparse.Namespace(**{name: value for name, value in vars(options).items() if name not in WRITING}),
        options.output,
        console,
    )
    return task, Windows(test, context, overlap=context // 2, limit=fewer)


def sizes(options: argparse.Namespace) -> dict[str, Any]:
    return {name: getattr(options, name) for name in SIZES}


def load(path: Path) -> GPT:
    """The model of a file that train_and_test() kept, in eval mode."""
    state = checkpoint.load(path)
    try:
        model = GPT(VOCABULARY, **state["sizes"])
        model.load_state_dict(state["model"])
    except (KeyError, RuntimeError, TypeError) as error:
        raise CheckpointError(f"{path} is not a model of this example: {error}") from error
    return model.eval()


@torch.inference_mode()
def bits_per_byte(model: GPT, windows: Windows, dtype: str) -> float:
    """The mean over all labels of minus the logarithm, to base 2, of the probability that ``model`` gives them."""
    batches = TokenBudgetSampler([len(item["input_ids"]) for item in windows], 4096, shuffle=False)
    nats, count = 0.0, 0
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
        for batch in DataLoader(windows, batch_sampler=batches, collate_fn=byte_data.collate):
            batch.pop("index")
            labelled = int((batch["labels"] != IGNORED).sum())
            nats += model(**batch).loss.item() * labelled
            count += labelled
    return nats / count / math.log(2)


@torch.inference_mode()
def write(model: GPT, prompt: bytes, count: int, temperature: float, seed: int) -> bytes:
    """``prompt`` as the beginning of a document, and ``count`` bytes more, each of what the context shows of them."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.tensor([START, *prompt])
    for _ in range(count):
        window = ids[-model.context :]
        logits = model(window, torch.tensor([0, len(window)], dtype=torch.int32)).logits[-1]
        if temperature == 0:
            following = logits.argmax(keepdim=True)
        else:
            scores = (logits - logits.max()).double() / temperature  # finite or -inf, however low it is
            following = torch.multinomial(torch.softmax(scores, -1), 1, generator=generator)
        ids = torch.cat([ids, following])
    return bytes(ids[1:].tolist())


def results(result: dict[str, Any]) -> Table:
    table = Table("", "on text held out")
    bits = result["bits_per_byte"]
    table.add_row("bits per byte", f"{bits:.3f}")
    table.add_row("perplexity per byte", f"{2**bits:.3f}")
    for name, compressed in result["compressed"].items():
        table.add_row(f"{name}, after the text trained on, bits per byte", f"{compressed:.3f}")
    table.add_section()
    table.add_row("seconds of training", f"{result['seconds']:.1f}")
    table.add_row("bytes a second", f"{result['tokens'] / (result['seconds'] or 1):,.0f}")
    table.add_row("peak memory, MiB", f"{result['peak_mib']:,.0f}")
    return table


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
