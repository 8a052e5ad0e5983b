# SPDX-License-Identifier: BSD-3-Clause
"""One engine in a process of its own, started by bench_text.py: encodes all texts once and prints what it measured.

A process of its own, because threads that one engine keeps would slow the next; and a fresh one each time, because in
service every batch is new: engines that prepare something for each shape pay for it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import resource
import statistics
import sys
import time
from pathlib import Path

import torch
from text_engines import ENGINES, ORIGINAL, Encode
from torch import Tensor
from transformers import AutoTokenizer

from resnorm_ext.demo.command import bundled_model
from resnorm_ext.demo.encode import tokenize
from resnorm_ext.demo.texts import standard_library_texts

BATCH_SIZE = 32
SENTENCE_TOKENS = (16, 128)
SENTENCE_SAMPLES = 100


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("engine", choices=ENGINES)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--reference", type=Path, required=True, help="what the original gives in float32")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            answer = measure(options)
    except Exception as error:  # whatever an engine does, the others are measured
        answer = {"failed": f"{type(error).__name__}: {error}".splitlines()[0]}
    print(json.dumps(answer))


def measure(options: argparse.Namespace) -> dict[str, object]:
    load, _ = ENGINES[options.engine]
    path = bundled_model()
    tokenizer = AutoTokenizer.from_pretrained(path)
    texts = standard_library_texts()
    arrival, by_length = (_batches(tokenizer, each) for each in (texts, sorted(texts, key=len)))
    encode = torch.inference_mode()(load(path, getattr(torch, options.dtype), options.threads))
    warm_up = dict(
        tokenizer(texts[: BATCH_SIZE - 1], padding="max_length", truncation=True, max_length=200, return_tensors="pt")
    )  # of a batch size that is not timed
    for _ in range(2):
        encode(warm_up)
    seconds = {"arrival": _pass(encode, arrival), "sorted": _pass(encode, by_length)}
    peak_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # of the process so far
    for tokens in SENTENCE_TOKENS:
        seconds[f"{tokens} tokens"] = _sentence(encode, tokenizer, texts, tokens)
    return {"seconds": seconds, "peak_mib": peak_mib, "error": _error(encode, arrival, options)}


def _batches(tokenizer, texts: list[str]) -> list[dict[str, Tensor]]:
    return [dict(tokenize(tokenizer, texts[i : i + BATCH_SIZE])) for i in range(0, len(texts), BATCH_SIZE)]


def _pass(encode: Encode, batches: list[dict[str, Tensor]]) -> float:
    began = time.perf_counter()
    for batch in batches:
        encode(batch)
    return time.perf_counter() - began


def _sentence(encode: Encode, tokenizer, texts: list[str], tokens: int) -> float:
    """Median seconds of one text at a time, each cut to ``tokens``."""
    tokenized = [dict(tokenizer(text, truncation=True, max_length=tokens, return_tensors="pt")) for text in texts]
    sentences = [batch for batch in tokenized if batch["input_ids"].size(1) == tokens]
    for sentence in sentences[:10]:
        encode(sentence)
    return statistics.median(_pass(encode, [sentences[i % len(sentences)]]) for i in range(SENTENCE_SAMPLES))


def _error(encode: Encode, batches: list[dict[str, Tensor]], options: argparse.Namespace) -> dict[str, float]:
    """Largest and root mean square difference from the reference, which the original in float32 writes."""
    output = torch.cat([encode(batch).float()[batch["attention_mask"].bool()] for batch in batches])
    if options.engine == ORIGINAL and options.dtype == "float32":
        torch.save(output, options.reference)
    difference = (output - torch.load(options.reference)).double()
    return {"largest": difference.abs().max().item(), "rms": difference.pow(2).mean().sqrt().item()}


if __name__ == "__main__":
    main()
