# SPDX-License-Identifier: BSD-3-Clause
"""Hugging Face's RoBERTa: BERT, but for how positions are numbered."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers.models.roberta import modeling_roberta

from .bert_family import BertFamily, PackedBertEmbeddings, PackedBertEncoder
from .bert_layers import Classes, FusedOutput

CLASSES = Classes.of(modeling_roberta, "Roberta")


class PositionsFromTokens(PackedBertEmbeddings):
    """Numbers the tokens that are not padding, from the one after the padding's own number on."""

    def first_position(self) -> int:
        return self.padding_idx + 1

    def positions(self, input_ids: Tensor | None, length: int) -> Tensor:
        if input_ids is None:
            device = self.word_embeddings.weight.device
            return torch.arange(self.first_position(), self.first_position() + length, device=device).unsqueeze(0)
        real = input_ids.ne(self.padding_idx).int()
        return (real.cumsum(1, dtype=torch.int32) * real).long() + self.padding_idx


class RobertaEmbeddings(PositionsFromTokens, modeling_roberta.RobertaEmbeddings):
    pass


class RobertaEncoder(PackedBertEncoder, modeling_roberta.RobertaEncoder):
    classes = CLASSES


class RobertaSelfOutput(FusedOutput, modeling_roberta.RobertaSelfOutput):
    pass


class RobertaOutput(FusedOutput, modeling_roberta.RobertaOutput):
    pass


INTEGRATION = BertFamily(CLASSES, (RobertaEmbeddings, RobertaEncoder, RobertaSelfOutput, RobertaOutput))
