# SPDX-License-Identifier: BSD-3-Clause
"""Hugging Face's RoBERTa: BERT, but for how positions are numbered."""

from transformers.models.roberta import modeling_roberta

from ..bert_like import PositionsFromTokens, bert_like

INTEGRATION = bert_like(__name__, modeling_roberta, "Roberta", embeddings=PositionsFromTokens)
