# SPDX-License-Identifier: BSD-3-Clause
"""Encoding batches with two models, batch by batch in turn, so that both meet the machine in the same state."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

MAX_TOKENS = 256


@dataclass
class Comparison:
    """What one pass over the texts showed."""

    texts: int = 0
    real_tokens: int = 0
    padded_tokens: int = 0
    seconds: tuple[float, float] = (0.0, 0.0)  # the original's, the accelerated model's
    hidden_difference: float = 0.0  # largest absolute one of last_hidden_state, at unmasked positions
    embedding_difference: float = 0.0
    embeddings: list[Tensor] = field(default_factory=list)  # the accelerated model's

    @property
    def speedup(self) -> float:
        return self.seconds[0] / self.seconds[1]


def tokenize(tokenizer: Callable, texts: Sequence[str]):
    return tokenizer(list(texts), padding=True, truncation=True, max_length=MAX_TOKENS, return_tensors="pt")


def embed(last_hidden_state: Tensor, attention_mask: Tensor) -> Tensor:
    """Mean over the unmasked positions, normalised: (texts, hidden) from (texts, tokens, hidden)."""
    mask = attention_mask.unsqueeze(-1).to(last_hidden_state.dtype)
    mean = (last_hidden_state * mask).sum(1) / mask.sum(1)
    return nn.functional.normalize(mean.float(), dim=-1)


@torch.inference_mode()
def compare(
    original: nn.Module,
    accelerated: nn.Module,
    tokenizer: Callable,
    texts: Sequence[str],
    batch_size: int,
    advance: Callable[[int], None],
) -> Comparison:
    """Encodes ``texts`` in batches, each batch once with either model; ``advance`` is told of every text done."""
    result = Comparison()
    for start in range(0, len(texts), batch_size):
        batch = tokenize(tokenizer, texts[start : start + batch_size])
        mask = batch["attention_mask"]
        # Whoever goes second finds the batch in the cache: take turns.
        order = (original, accelerated) if (start // batch_size) % 2 == 0 else (accelerated, original)
        outputs, seconds = {}, {}
        for model in order:
            began = time.perf_counter()
            outputs[model] = model(**batch).last_hidden_state
            seconds[model] = time.perf_counter() - began
        expected, got = outputs[original], outputs[accelerated]
        embeddings = embed(got, mask)

        result.texts += len(mask)
        result.real_tokens += int(mask.sum())
        result.padded_tokens += mask.numel()
        result.seconds = (result.seconds[0] + seconds[original], result.seconds[1] + seconds[accelerated])
        difference = (got - expected)[mask.bool()].abs().max().item()
        result.hidden_difference = max(result.hidden_difference, difference)
        difference = (embeddings - embed(expected, mask)).abs().max().item()
        result.embedding_difference = max(result.embedding_difference, difference)
        result.embeddings.append(embeddings)
        advance(len(mask))
    return result
