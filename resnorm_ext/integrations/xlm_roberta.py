# SPDX-License-Identifier: BSD-3-Clause
"""Hugging Face's XLM-RoBERTa: BERT, but for how positions are numbered."""

from __future__ import annotations

from transformers.models.xlm_roberta import modeling_xlm_roberta

from .bert_family import BertFamily, PackedBertEncoder
from .bert_layers import Classes, FusedOutput
from .roberta import PositionsFromTokens

CLASSES = Classes.of(modeling_xlm_roberta, "XLMRoberta")


class XLMRobertaEmbeddings(PositionsFromTokens, modeling_xlm_roberta.XLMRobertaEmbeddings):
    pass


class XLMRobertaEncoder(PackedBertEncoder, modeling_xlm_roberta.XLMRobertaEncoder):
    classes = CLASSES


class XLMRobertaSelfOutput(FusedOutput, modeling_xlm_roberta.XLMRobertaSelfOutput):
    pass


class XLMRobertaOutput(FusedOutput, modeling_xlm_roberta.XLMRobertaOutput):
    pass


INTEGRATION = BertFamily(CLASSES, (XLMRobertaEmbeddings, XLMRobertaEncoder, XLMRobertaSelfOutput, XLMRobertaOutput))
