# SPDX-License-Identifier: BSD-3-Clause
"""Hugging Face's BERT."""

from __future__ import annotations

from transformers.models.bert import modeling_bert

from .bert_family import BertFamily, PackedBertEmbeddings, PackedBertEncoder
from .bert_layers import Classes, FusedOutput

CLASSES = Classes.of(modeling_bert, "Bert")


class BertEmbeddings(PackedBertEmbeddings, modeling_bert.BertEmbeddings):
    pass


class BertEncoder(PackedBertEncoder, modeling_bert.BertEncoder):
    classes = CLASSES


class BertSelfOutput(FusedOutput, modeling_bert.BertSelfOutput):
    pass


class BertOutput(FusedOutput, modeling_bert.BertOutput):
    pass


INTEGRATION = BertFamily(CLASSES, (BertEmbeddings, BertEncoder, BertSelfOutput, BertOutput))
