# SPDX-License-Identifier: BSD-3-Clause
"""Hugging Face's XLM-RoBERTa: BERT, but for how positions are numbered."""

from transformers.models.xlm_roberta import modeling_xlm_roberta

from ..bert_like import PositionsFromTokens, bert_like

INTEGRATION = bert_like(__name__, modeling_xlm_roberta, "XLMRoberta", embeddings=PositionsFromTokens)
