# SPDX-License-Identifier: BSD-3-Clause
"""Hugging Face's ERNIE: BERT, with embeddings of the task too."""

from __future__ import annotations

from torch import Tensor
from transformers.models.ernie import modeling_ernie

from ..bert_like import BertLikeEmbeddings, bert_like
from ..varlen import packed_or_original


class TaskEmbeddings(BertLikeEmbeddings):
    tables = (*BertLikeEmbeddings.tables, "task_type")

    def forward(
        self,
        input_ids: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        task_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        past_key_values_length: int = 0,
    ) -> Tensor:
        arguments = (input_ids, token_type_ids, task_type_ids, position_ids, inputs_embeds, past_key_values_length)
        types = {"token_type": token_type_ids, "task_type": task_type_ids}
        return packed_or_original(self, arguments, input_ids, inputs_embeds, position_ids, types)


ARGUMENTS = ("input_ids", "attention_mask", "token_type_ids", "task_type_ids", "position_ids", "inputs_embeds")
INTEGRATION = bert_like(__name__, modeling_ernie, "Ernie", embeddings=TaskEmbeddings, arguments=ARGUMENTS)
