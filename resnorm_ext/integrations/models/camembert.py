# SPDX-License-Identifier: BSD-3-Clause
"""Hugging Face's CamemBERT: BERT, but for how positions are numbered."""

from transformers.models.camembert import modeling_camembert

from ..bert_like import PositionsFromTokens, bert_like

INTEGRATION = bert_like(__name__, modeling_camembert, "Camembert", embeddings=PositionsFromTokens)
