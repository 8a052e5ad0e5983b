# SPDX-License-Identifier: BSD-3-Clause
"""A text classifier of a folder: from texts to tokens, and from batches of those to predictions."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from errors import CheckpointError
from pydantic import BaseModel, Field
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from transformers.utils import logging as transformers_logging

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
        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()
        try:
            self._tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
            model, found = AutoModelForSequenceClassification.from_pretrained(
                folder, local_files_only=True, output_loading_info=True
            )
            if found["missing_keys"]:
                raise ValueError(f"it has no {', '.join(sorted(found['missing_keys']))}")
            if model.config.num_labels < 2 or model.config.problem_type not in (None, "single_label_classification"):
                raise ValueError("its labels are not classes of which a text has one")
            self._model = (model if stock else resnorm_ext.accelerate(model)).eval()
            if len(self._tokenizer) > model.config.vocab_size:
                raise ValueError(
                    f"its tokenizer has {len(self._tokenizer)} tokens, the model {model.config.vocab_size}"
                )
            self._labels = [model.config.id2label[index] for index in range(model.config.num_labels)]
            self._max_tokens = min(self._tokenizer.model_max_length, model.config.max_position_embeddings)
            longest, shortest = self.encode(["a " * self._max_tokens, "a"])
            if not set(shortest.ids) - set(self._tokenizer.all_special_ids):
                raise ValueError("its tokenizer has no words")  # transformers makes one up where there is none
            self.classify([longest, shortest])  # so that the first request finds all prepared
        except ImportError:
            raise
        except Exception as error:  # transformers and tokenizers have no common class of what damaged files raise
            reason = str(error).partition("\n")[0]
            raise CheckpointError(f"{folder} is no text classifier: {reason}") from error

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
        return [
            Prediction(
                label=self._labels[label],
                probabilities=dict(zip(self._labels, row, strict=True)),
                truncated=each.truncated,
            )
            for each, label, row in zip(batch, probabilities.argmax(-1).tolist(), probabilities.tolist(), strict=True)
        ]
