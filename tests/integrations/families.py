# SPDX-License-Identifier: BSD-3-Clause
"""A small model of every family that is accelerated, its parts by their roles, and how its output is compared."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
import transformers
from torch import nn
from transformers.models.bart import modeling_bart
from transformers.models.bert import modeling_bert
from transformers.models.camembert import modeling_camembert
from transformers.models.distilbert import modeling_distilbert
from transformers.models.electra import modeling_electra
from transformers.models.ernie import modeling_ernie
from transformers.models.gpt2 import modeling_gpt2
from transformers.models.roberta import modeling_roberta
from transformers.models.vit import modeling_vit
from transformers.models.xlm_roberta import modeling_xlm_roberta

from resnorm_ext.integrations import report

_SIZES = {
    "vocab_size": 100,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 40,
    "initializer_range": 0.3,  # large enough that every part of the model matters to its output
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "pad_token_id": 0,
}
_NN = {"batch_first": True, "dropout": 0.0}
MASK = torch.tensor([[1] * 9, [1] * 4 + [0] * 5, [1] * 2 + [0] * 7])


@dataclass(frozen=True)
class Family:
    """
    Attributes:
        model: makes one.
        layers: the list of layers in it, by name; empty where the model is a layer.
        classes: those whose forwards the layers' inference stands for, in the library.
        first_linear: a linear layer in the model, by name.
        layer_arguments: what a layer has to be given after the hidden states.
        clamps_float16: whether its layers keep float16 outputs finite.
    """

    model: Callable[[], nn.Module]
    layers: str
    classes: tuple[type[nn.Module], ...]
    first_linear: str
    layer_arguments: tuple = ()
    clamps_float16: bool = False

    def build(self) -> nn.Module:
        return self.model().eval()

    def layer(self, model: nn.Module, index: int = 0) -> nn.Module:
        return model.get_submodule(self.layers)[index] if self.layers else model

    def batch(self, model: nn.Module) -> tuple[tuple, dict]:
        """Arguments of a call, with padding where the family has masks."""
        if isinstance(model, nn.TransformerEncoder | nn.TransformerEncoderLayer):
            return (torch.randn(3, 9, 32),), {"src_key_padding_mask": MASK == 0}
        if isinstance(model, transformers.ViTModel):
            return (torch.randn(3, 3, 24, 24),), {}
        return (torch.randint(3, 100, (3, 9)),), {"attention_mask": MASK}


def _bert_like(prefix: str, library, **changes) -> Family:
    config = getattr(transformers, f"{prefix}Config")(**(_SIZES | changes))
    roles = "SelfAttention SelfOutput Attention Intermediate Output Layer Encoder Embeddings Model".split()
    return Family(
        model=lambda: getattr(transformers, f"{prefix}Model")(config),
        layers="encoder.layer",
        classes=tuple(getattr(library, prefix + role) for role in roles),
        first_linear="encoder.layer.0.attention.self.query",
    )


def _bart() -> Family:
    sizes = {"d_model": 32, "encoder_layers": 2, "encoder_attention_heads": 4, "encoder_ffn_dim": 64, "dropout": 0.0}
    config = transformers.BartConfig(vocab_size=100, max_position_embeddings=40, init_std=0.3, **sizes)
    return Family(
        model=lambda: modeling_bart.BartEncoder(config),
        layers="layers",
        classes=(modeling_bart.BartAttention, modeling_bart.BartEncoderLayer, modeling_bart.BartEncoder),
        first_linear="layers.0.self_attn.q_proj",
        layer_arguments=(None,),  # the mask
        clamps_float16=True,
    )


def _distilbert() -> Family:
    library = modeling_distilbert
    sizes = {"dim": 32, "hidden_dim": 64, "n_heads": 4, "n_layers": 2, "dropout": 0.0, "attention_dropout": 0.0}
    config = transformers.DistilBertConfig(vocab_size=100, initializer_range=0.3, **sizes)
    return Family(
        model=lambda: transformers.DistilBertModel(config),
        layers="transformer.layer",
        classes=(
            library.DistilBertSelfAttention,
            library.FFN,
            library.TransformerBlock,
            library.Transformer,
            library.Embeddings,
            library.DistilBertModel,
        ),
        first_linear="transformer.layer.0.attention.q_lin",
    )


def _vit() -> Family:
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "initializer_range")
    sizes = {name: _SIZES[name] for name in (*names, "hidden_dropout_prob", "attention_probs_dropout_prob")}
    config = transformers.ViTConfig(**sizes, image_size=24, patch_size=8)
    return Family(
        model=lambda: transformers.ViTModel(config),
        layers="layers",
        classes=(modeling_vit.ViTAttention, modeling_vit.ViTMLP, modeling_vit.ViTLayer),
        first_linear="layers.0.attention.q_proj",
    )


def _gpt2() -> Family:
    sizes = {"n_embd": 32, "n_head": 4, "n_layer": 2, "n_positions": 40, "resid_pdrop": 0.0, "embd_pdrop": 0.0}
    config = transformers.GPT2Config(vocab_size=100, initializer_range=0.3, attn_pdrop=0.0, **sizes)
    return Family(
        model=lambda: transformers.GPT2Model(config),
        layers="h",
        classes=(modeling_gpt2.GPT2Attention, modeling_gpt2.GPT2MLP, modeling_gpt2.GPT2Block),
        first_linear="h.0.attn.c_attn",
    )


def _nn(norm_first: bool) -> Family:
    return Family(
        model=lambda: nn.TransformerEncoder(
            nn.TransformerEncoderLayer(32, 4, 64, norm_first=norm_first, **_NN), 2, enable_nested_tensor=False
        ),
        layers="layers",
        classes=(nn.MultiheadAttention, nn.TransformerEncoderLayer, nn.TransformerEncoder),
        first_linear="layers.0.linear1",
    )


FAMILIES = {
    "BERT": _bert_like("Bert", modeling_bert),
    "RoBERTa": _bert_like("Roberta", modeling_roberta),
    "XLM-RoBERTa": _bert_like("XLMRoberta", modeling_xlm_roberta),
    "CamemBERT": _bert_like("Camembert", modeling_camembert),
    "ELECTRA": _bert_like("Electra", modeling_electra, embedding_size=24),
    "ERNIE": _bert_like("Ernie", modeling_ernie, use_task_id=True),
    "BART": _bart(),
    "DistilBERT": _distilbert(),
    "ViT": _vit(),
    "GPT-2": _gpt2(),
    "nn.TransformerEncoder": _nn(norm_first=False),
    "nn.TransformerEncoder, pre-norm": _nn(norm_first=True),
    "nn.TransformerEncoderLayer": Family(
        model=lambda: nn.TransformerEncoderLayer(32, 4, 64, **_NN),
        layers="",
        classes=(nn.MultiheadAttention, nn.TransformerEncoderLayer),
        first_linear="linear1",
    ),
}


def output_of(model: nn.Module, batch: tuple[tuple, dict]) -> torch.Tensor:
    args, kwargs = copy.deepcopy(batch)
    output = model(*args, **kwargs)
    return output if isinstance(output, torch.Tensor) else output[0]


def assert_same(actual: torch.Tensor, expected: torch.Tensor, tolerance: float = 2e-4) -> None:
    """At every position that is not padded, or all where there is no padding."""
    assert actual.shape == expected.shape and actual.dtype == expected.dtype
    real = MASK.bool() if actual.shape[:2] == MASK.shape else torch.ones(actual.shape[:2], dtype=torch.bool)
    torch.testing.assert_close(actual[real], expected[real], rtol=tolerance, atol=tolerance)


def taken(model: nn.Module) -> set[tuple[str, str | None]]:
    """The paths that the last call of an accelerated model took, and why not the fastest."""
    items = [item for item in report(model).replaced if item.last is not None]
    names = {item.name for item in items}
    parents = {item.name: {item.name[:i] for i, c in enumerate(item.name) if c == "."} | {""} for item in items}
    return {item.last for item in items if not names & (parents[item.name] - {item.name})}
