# SPDX-License-Identifier: BSD-3-Clause
"""An accelerated BART against transformers. What its encoder shares with other families, test_more_families.py tests
there."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from transformers.models.bart.modeling_bart import BartEncoder

from resnorm_ext.integrations import accelerate

from .conftest import MASKS, assert_same_at_real_positions

PAD, END = 1, 2
close = torch.testing.assert_close


def bart_config(**changes) -> transformers.BartConfig:
    sizes = {"vocab_size": 100, "d_model": 32, "max_position_embeddings": 40, "init_std": 0.3, "dropout": 0.0}
    for part in ("encoder", "decoder"):
        sizes |= {f"{part}_layers": 3, f"{part}_attention_heads": 4, f"{part}_ffn_dim": 64}
    return transformers.BartConfig(**(sizes | changes))


def inputs(mask: str) -> dict[str, torch.Tensor]:
    """Four sequences of nine tokens, some of them padding, and one an end."""
    ids = torch.randint(3, 100, (4, 9))
    if MASKS[mask] is None:
        return {"input_ids": ids}
    attention_mask = torch.tensor(MASKS[mask])
    ids = ids.masked_fill(attention_mask == 0, PAD)
    ids[torch.arange(4), (attention_mask * torch.arange(9)).argmax(1)] = END  # where BART's classifier reads
    return {"input_ids": ids, "attention_mask": attention_mask}


@pytest.mark.parametrize("scale_embedding", [True, False])
@torch.no_grad()
def test_the_whole_model_and_generation(scale_embedding, ways_of):
    for head in ("Model", "ForConditionalGeneration"):
        model = getattr(transformers, f"Bart{head}")(bart_config(scale_embedding=scale_embedding)).eval()
        accelerated, batch = accelerate(copy.deepcopy(model)), inputs("right")
        assert ways_of(accelerated, **batch) == {"packed"}
        close(accelerated(**batch)[0], model(**batch)[0], rtol=2e-5, atol=2e-5)
    theirs, ours = (
        each.generate(**batch, do_sample=False, num_beams=1, max_new_tokens=8) for each in (model, accelerated)
    )
    assert torch.equal(ours, theirs)


class FirstLayer(BartEncoder):
    """Runs its first layer alone, and hands on to it all that it is given."""

    def forward(self, input_ids, attention_mask=None, **kwargs):
        mask = attention_mask if attention_mask.dim() == 4 else attention_mask[:, None, None].bool()
        return (self.layers[0](self.embed_tokens(input_ids), mask, **kwargs),)


@pytest.mark.parametrize("how", ["eager", "compiled"])
@torch.no_grad()
def test_a_loop_over_fewer_layers(how):
    model = FirstLayer(bart_config()).eval()
    accelerated, batch = accelerate(copy.deepcopy(model)), inputs("right")
    called = accelerated if how == "eager" else torch.compile(accelerated, backend="eager", fullgraph=True)
    assert_same_at_real_positions(called(**batch)[0], model(**batch)[0], batch)


@torch.no_grad()
def test_layers_that_are_dropped():
    """As LayerDrop does in training, also where no dropout acts."""
    model = BartEncoder(bart_config(encoder_layerdrop=0.5)).train()
    accelerated, batch = accelerate(copy.deepcopy(model)), inputs("right")
    for seed in range(8):
        outputs = []
        for each in (model, accelerated):
            torch.manual_seed(seed)
            outputs.append(each(**batch)[0])
        assert_same_at_real_positions(outputs[1], outputs[0], batch)


@torch.no_grad()
def test_one_layer_by_itself(ways_of):
    model = BartEncoder(bart_config()).eval()
    accelerated, x = accelerate(copy.deepcopy(model)), torch.randn(4, 9, 32)
    for ours, theirs in zip(accelerated.layers, model.layers, strict=True):
        assert ways_of(ours, x, None) == {"packed"}
        close(ours(x, None), theirs(x, None), rtol=2e-5, atol=2e-5)


@torch.no_grad()
def test_float16_outputs_stay_finite(ways_of):
    model = BartEncoder(bart_config()).eval().half()
    model.layers[0].final_layer_norm.weight.fill_(6e4)  # which makes most values too large
    accelerated, batch = accelerate(copy.deepcopy(model)), inputs("right")
    assert ways_of(accelerated, **batch) == {"float16 outputs are clamped"}
    hidden = [each(**batch, output_hidden_states=True).hidden_states[1] for each in (model, accelerated)]
    assert hidden[0].abs().max() == torch.finfo(torch.float16).max - 1000
    assert_same_at_real_positions(hidden[1], hidden[0], batch, 1e-2)
