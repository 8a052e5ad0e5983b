# SPDX-License-Identifier: BSD-3-Clause
"""What Hugging Face's BERT and its like are made of, and their layers' blocks with residual add and norm fused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from types import ModuleType

from torch import Tensor, nn
from torch.jit import is_scripting

from .fused_norm import NORMS, add_norm
from .layer_kind import LayerKind
from .packed_model import ModelKind
from .replace import Replacement, original_forward

_PARTS = {  # either a role in Classes or the types
    "attention": "attention",
    "attention.self": "self_attention",
    "attention.self.query": (nn.Linear,),
    "attention.self.key": (nn.Linear,),
    "attention.self.value": (nn.Linear,),
    "attention.self.dropout": (nn.Dropout,),
    "attention.output": "self_output",
    "attention.output.dense": (nn.Linear,),
    "attention.output.dropout": (nn.Dropout,),
    "attention.output.LayerNorm": NORMS,
    "intermediate": "intermediate",
    "intermediate.dense": (nn.Linear,),
    "output": "output",
    "output.dense": (nn.Linear,),
    "output.dropout": (nn.Dropout,),
    "output.LayerNorm": NORMS,
}


@dataclass(frozen=True)
class Classes:
    """The classes of a model that is built like BERT, by their roles, and what takes the place of some."""

    model: type[nn.Module]
    embeddings: type[nn.Module]
    encoder: type[nn.Module]
    layer: type[nn.Module]
    attention: type[nn.Module]
    self_attention: type[nn.Module]
    cross_attention: type[nn.Module]
    self_output: type[nn.Module]
    intermediate: type[nn.Module]
    output: type[nn.Module]
    eager_attention: Callable
    replacements: dict[type[nn.Module], type[nn.Module]] = field(default_factory=dict)

    @classmethod
    def of(cls, library: ModuleType, prefix: str) -> Classes:
        """Those of a module of transformers, whose names begin with ``prefix``."""
        roles = [role for role in cls.__dataclass_fields__ if role not in ("eager_attention", "replacements")]
        named = {role: getattr(library, prefix + role.title().replace("_", "")) for role in roles}
        return cls(**named, eager_attention=library.eager_attention_forward)

    @cached_property
    def kind(self) -> LayerKind:
        return LayerKind(
            types=(self.layer,),
            parts={name: self._types(of) if isinstance(of, str) else of for name, of in _PARTS.items()},
            attention="attention.self",
            head_dim="attention_head_size",
            projections=("attention.self.query", "attention.self.key", "attention.self.value"),
            attention_dropout=("attention.self.dropout", "p"),
            attention_output="attention.output.dense",
            attention_norm="attention.output.LayerNorm",
            intermediate="intermediate.dense",
            activation=("intermediate", "intermediate_act_fn"),
            output="output.dense",
            feed_forward_norm="output.LayerNorm",
            dropouts=("attention.output.dropout", "output.dropout"),
            chunked=("", "feed_forward_chunk"),
            eager_attention=self.eager_attention,
        )

    @cached_property
    def model_kind(self) -> ModelKind:
        return ModelKind(
            model=self.model,
            arguments=("input_ids", "attention_mask", "token_type_ids", "position_ids", "inputs_embeds"),
            embeddings=self.either("embeddings"),
            encoder=self.replacement("encoder"),
            encoder_name="encoder",
            layer=self.kind,
        )

    def _types(self, role: str) -> tuple[type[nn.Module], ...]:
        original = getattr(self, role)
        return self.either(role) if original in self.replacements else (original,)

    def replacement(self, role: str) -> type[nn.Module]:
        return self.replacements[getattr(self, role)]

    def either(self, role: str) -> tuple[type[nn.Module], type[nn.Module]]:
        """The class itself and what takes its place."""
        return getattr(self, role), self.replacement(role)


class FusedOutput(Replacement, nn.Module):
    """Dropout, residual add and layer norm in one pass."""

    def forward(self, hidden_states: Tensor, input_tensor: Tensor) -> Tensor:
        if is_scripting():
            return self.LayerNorm(self.dropout(self.dense(hidden_states)) + input_tensor)
        forward = original_forward(self, FusedOutput)
        if forward is not None:
            return forward(hidden_states, input_tensor)
        return add_norm(self.dense(hidden_states), input_tensor, self.LayerNorm, self.dropout)
