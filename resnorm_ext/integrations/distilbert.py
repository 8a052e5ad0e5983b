# SPDX-License-Identifier: BSD-3-Clause
"""Hugging Face's DistilBERT. In inference it runs on packed batches; else residual adds and norms are fused."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn
from torch.jit import is_scripting
from transformers import PreTrainedConfig
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.distilbert import modeling_distilbert

from ..engine.linear import LinearShape
from ..modules.tracing import for_torchscript
from .fused_norm import NORMS, add_norm
from .layer_kind import LayerKind, linear_shapes
from .packed_layers import encoder_obstacle
from .packed_model import ModelKind, PackedEmbeddings, PackedEncoder, embeddings_as_built, packing_hooks
from .replace import Finding, Replacement, original_class, original_forward


class DistilBertBlock(Replacement, modeling_distilbert.TransformerBlock):
    """Residual add and layer norm in one pass."""

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
        forward = original_forward(self, DistilBertBlock)
        if forward is not None:
            return forward(hidden_states, attention_mask, **kwargs)
        update, _ = self.attention(hidden_states, attention_mask=attention_mask, **kwargs)
        hidden_states = add_norm(update, hidden_states, self.sa_layer_norm)
        return add_norm(self.ffn(hidden_states), hidden_states, self.output_layer_norm)


class DistilBertEmbeddings(PackedEmbeddings, modeling_distilbert.Embeddings):
    _torch_forward = for_torchscript(modeling_distilbert.Embeddings.forward)

    # input_ids may be None all the same: TorchScript compares types with the library's, and this is its.
    def forward(
        self, input_ids: Tensor, inputs_embeds: Tensor | None = None, position_ids: Tensor | None = None
    ) -> Tensor:
        if is_scripting():
            return self._torch_forward(input_ids, inputs_embeds, position_ids)
        forward = original_forward(self, DistilBertEmbeddings)
        if forward is not None:
            return forward(input_ids, inputs_embeds, position_ids)
        packed = self.embed(input_ids, inputs_embeds, position_ids)
        return super().forward(input_ids, inputs_embeds, position_ids) if packed is None else packed


class DistilBertTransformer(PackedEncoder, modeling_distilbert.Transformer):
    def model_kind(self) -> ModelKind:
        return _MODEL

    def attention_config(self) -> PreTrainedConfig | None:
        return _attention_config(self)

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> BaseModelOutput:
        forward = original_forward(self, DistilBertTransformer)
        if forward is not None:
            return forward(hidden_states, attention_mask, **kwargs)
        output = self.encode(hidden_states, attention_mask, kwargs)
        if output is None:
            return super().forward(hidden_states, attention_mask, **kwargs)
        return BaseModelOutput(last_hidden_state=output)


_REPLACEMENTS = {
    modeling_distilbert.Embeddings: DistilBertEmbeddings,
    modeling_distilbert.Transformer: DistilBertTransformer,
    modeling_distilbert.TransformerBlock: DistilBertBlock,
}
_LINEARS = ("attention.q_lin", "attention.k_lin", "attention.v_lin", "attention.out_lin", "ffn.lin1", "ffn.lin2")
_KIND = LayerKind(
    types=(modeling_distilbert.TransformerBlock, DistilBertBlock),
    parts={
        "attention": (modeling_distilbert.DistilBertSelfAttention,),
        "attention.dropout": (nn.Dropout,),
        "sa_layer_norm": NORMS,
        "ffn": (modeling_distilbert.FFN,),
        "ffn.dropout": (nn.Dropout,),
        "output_layer_norm": NORMS,
    }
    | dict.fromkeys(_LINEARS, (nn.Linear,)),
    attention="attention",
    head_dim="attention_head_size",
    projections=_LINEARS[:3],
    attention_dropout=("attention.dropout", "p"),
    attention_output="attention.out_lin",
    attention_norm="sa_layer_norm",
    intermediate="ffn.lin1",
    activation=("ffn", "activation"),
    output="ffn.lin2",
    feed_forward_norm="output_layer_norm",
    dropouts=("ffn.dropout",),
    chunked=("ffn", "ff_chunk"),
    eager_attention=modeling_distilbert.eager_attention_forward,
)
_MODEL = ModelKind(
    model=modeling_distilbert.DistilBertModel,
    arguments=("input_ids", "attention_mask", "inputs_embeds", "position_ids"),
    embeddings=(modeling_distilbert.Embeddings, DistilBertEmbeddings),
    encoder=DistilBertTransformer,
    encoder_name="transformer",
    layer=_KIND,
)


class DistilBert:
    """The integration."""

    originals = _MODEL.model_originals  # now, before anybody replaces one for a while

    def find(self, model: nn.Module) -> Iterator[Finding]:
        for name, module in model.named_modules():
            replacement = _REPLACEMENTS.get(original_class(module))
            if replacement is not None:
                yield Finding(name, module, replacement, _lasting_obstacle(module))
            elif isinstance(module, tuple(_REPLACEMENTS)):
                yield Finding(name, module, None, "a subclass, which may compute something else")

    def hooks(self, model: nn.Module) -> Iterator[tuple[nn.Module, Callable]]:
        return packing_hooks(model, modeling_distilbert.DistilBertModel)

    def linear_shapes(self, model: nn.Module) -> Iterator[LinearShape]:
        return linear_shapes(model, _KIND)


def _attention_config(encoder: modeling_distilbert.Transformer) -> PreTrainedConfig | None:
    """Its first layer's, because it has none itself."""
    layer = next(iter(encoder.layer), None)
    return getattr(getattr(layer, "attention", None), "config", None)


def _lasting_obstacle(module: nn.Module) -> str | None:
    """What keeps ``module`` from the packed path at every call, as it is now."""
    if isinstance(module, modeling_distilbert.Embeddings) and not embeddings_as_built(module, _MODEL):
        return "embeddings have hooks or are not as they were built"
    if not isinstance(module, modeling_distilbert.Transformer):
        return None
    return encoder_obstacle(module, [], _KIND)


INTEGRATION = DistilBert()
