# SPDX-License-Identifier: BSD-3-Clause
"""Hugging Face's BERT."""

from transformers.models.bert import modeling_bert

from ..bert_like import bert_like

INTEGRATION = bert_like(__name__, modeling_bert, "Bert")
