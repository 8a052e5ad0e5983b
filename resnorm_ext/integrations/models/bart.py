# SPDX-License-Identifier: BSD-3-Clause
"""The encoder of Hugging Face's BART."""

from transformers.models.bart import modeling_bart

from ...engine.spec import Dropouts
from ...modules.padding import PaddingChoice
from ..family import Family
from ..looped import StackLayer
from ..spec import TransformersLayer


class BartEncoderLayer(StackLayer, PaddingChoice, modeling_bart.BartEncoderLayer):
    clamps_float16 = True


BartEncoderLayer.spec = TransformersLayer(
    types=(modeling_bart.BartEncoderLayer, BartEncoderLayer),
    parts={"self_attn": (modeling_bart.BartAttention,)},
    attention="self_attn",
    projections=("self_attn.q_proj.", "self_attn.k_proj.", "self_attn.v_proj."),
    attention_output="self_attn.out_proj.",
    attention_norm="self_attn_layer_norm",
    intermediate="fc1.",
    activation=("", "activation_fn"),
    output="fc2.",
    feed_forward_norm="final_layer_norm",
    dropouts=Dropouts(("self_attn", "dropout"), ("", "dropout"), ("", "activation_dropout"), ("", "dropout")),
)

INTEGRATION = Family(BartEncoderLayer.spec, [BartEncoderLayer], looped=modeling_bart.BartEncoder)
