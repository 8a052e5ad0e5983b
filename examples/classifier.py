# SPDX-License-Identifier: BSD-3-Clause
"""A text classifier of a folder: from texts to tokens, and from batches of those to predictions."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import pretrained
import torch
from errors import CheckpointError
from pydantic import BaseModel, Field
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForSequenceClassification

import resnorm_ext


class Encoded(NamedTuple):
    """A text's tokens, and whether there are more than the model takes."""

    ids: list[int]
    truncated: bool


class Prediction(BaseModel):
    label: str
    probabilities: dict[str, float]
    truncated: bool = Field(description="whether the text was longer than the model takes, and its end not read")


class Classifier:
    """The model and tokenizer of a folder. Each method is to be called from one thread at a time.

    Raises CheckpointError where the folder has none, or they cannot classify a text.
    """

    def __init__(self, folder: Path, stock: bool, dtype: str) -> None:
        self._autocast = dtype == "bfloat16"
        model, self._tokenizer = pretrained.load(AutoModelForSequenceClassification, folder)
        if model.config.num_labels < 2 or model.config.problem_type not in (None, "single_label_classification"):
            raise CheckpointError(f"{folder} is no classifier: its labels are not classes of which a text has one")
        self._model = (model if stock else resnorm_ext.accelerate(model)).eval()
        self._labels = [model.config.id2label[index] for index in range(model.config.num_labels)]
        self._max_tokens = min(self._tokenizer.model_max_length, model.config.max_position_embeddings)
        try:
            self.classify(self.encode(["a " * self._max_tokens, "a"]))  # so that the first request finds all prepared
        except (IndexError, RuntimeError, ValueError) as error:
            raise CheckpointError(f"{folder} is no classifier: {error}") from error

    def encode(self, texts: Sequence[str]) -> list[Encoded]:
        encodings = self._tokenizer(texts, truncation=True, max_length=self._max_tokens).encodings
        return [Encoded(each.ids, bool(each.overflowing)) for each in encodings]

    @torch.inference_mode()
    def classify(self, batch: Sequence[Encoded]) -> list[Prediction]:
        rows = [torch.tensor(each.ids) for each in batch]
        mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
        ids = pad_sequence(rows, batch_first=True, padding_value=self._tokenizer.pad_token_id)
        with torch.autocast("cpu", torch.bfloat16, enabled=self._autocast):
            probabilities = self._model(input_ids=ids, attention_mask=mask).logits.float().softmax(-1)
        if not probabilities.isfinite().all():
            raise ValueError("its probabilities are not finite")
        return [
            Prediction(
                label=self._labels[label],
                probabilities=dict(zip(self._labels, row, strict=True)),
                truncated=each.truncated,
            )
            for each, label, row in zip(batch, probabilities.argmax(-1).tolist(), probabilities.tolist(), strict=True)
        ]
