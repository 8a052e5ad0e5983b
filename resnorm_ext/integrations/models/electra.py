# SPDX-License-Identifier: BSD-3-Clause
"""Hugging Face's ELECTRA: BERT, with a projection where its embeddings are narrower than its layers."""

from transformers.models.electra import modeling_electra

from ..bert_like import bert_like

INTEGRATION = bert_like(__name__, modeling_electra, "Electra", between=("embeddings_project",))
