# SPDX-License-Identifier: BSD-3-Clause
"""Which way a text encoder's calls go in training: packed or not by the choice about padding, and as the original does
where something is asked for, or has been changed, that packed batches do not have."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from resnorm_ext.integrations import accelerate, report

from .conftest import ids_embedded
from .families import taken
from .packed_cases import (
    COMPUTED,
    FAMILIES,
    LENGTHS,
    PACKED,
    TOKENS,
    assert_trains_alike,
    batch_of,
    build,
    encoder_model,
    labelled,
    layers_of,
    loss_of,
    pair_of,
    sequence_loss,
    step,
)

close = torch.testing.assert_close


@pytest.fixture(params=FAMILIES)
def family(request) -> str:
    return request.param


class TestChoices:
    @pytest.mark.parametrize("padding", ["auto", "compute"])
    def test_padding_is_computed(self, family, padding):
        """Everywhere as the original does, for a loss that reads all of it."""
        model, accelerated = pair_of(build(family, "Model"), padding)
        batch, outputs = batch_of(), []

        def loss(model):
            outputs.append(model(**batch)[0])
            return outputs[-1].cos().sum()

        ways = COMPUTED if padding == "auto" else {("original", "padding is to be computed")}
        assert_trains_alike((model, accelerated), loss, ways)
        close(*outputs, rtol=2e-5, atol=2e-5)

    @pytest.mark.parametrize("masked", [False, True])
    @pytest.mark.parametrize("padding", ["auto", "skip", "compute"])
    def test_without_padding_it_is_packed(self, family, padding, masked):
        pair = pair_of(build(family, "Model"), padding)
        batch, outputs = batch_of(lengths=None, masked=masked), []

        def loss(model):
            outputs.append(model(**batch)[0])
            return outputs[-1].cos().sum()

        assert_trains_alike(pair, loss)
        close(*outputs, rtol=2e-5, atol=2e-5)

    def test_outputs_of_skip(self, family):
        """Zeros in the padding, from which no gradient comes."""
        model, accelerated = pair_of(build(family, "Model"))
        batch = batch_of()
        real = batch["attention_mask"].bool()
        expected, actual = model(**batch)[0], accelerated(**batch)[0]
        close(actual[real], expected[real], rtol=2e-5, atol=2e-5)
        assert not actual[~real].any() and actual.requires_grad
        assert_trains_alike((model, accelerated), lambda model: (model(**batch)[0] * real.unsqueeze(-1)).cos().sum())

    @pytest.mark.parametrize(("padding", "embedded"), [("skip", TOKENS), ("auto", 36)])
    def test_padding_is_skipped_from_the_embeddings_on(self, family, padding, embedded):
        model, loss = accelerate(build(family), padding=padding), sequence_loss()
        counts = ids_embedded(lambda: loss(model))
        assert counts[0] == embedded  # of words; positions may be looked up once for all sequences

    def test_the_choice_may_change(self):
        pair, loss = pair_of(build(), "auto"), sequence_loss()
        for padding, ways in (("auto", COMPUTED), ("skip", PACKED), ("auto", COMPUTED)):
            encoder_model(pair[1]).encoder.padding = padding
            assert_trains_alike(pair, loss, ways)


@pytest.mark.parametrize("padding", ["auto", "skip"])
def test_in_eval_mode_report_says_what_is_lost(family, padding):
    pair = pair_of(build(family).eval(), padding)
    model = pair[1]
    name = next(name for name, _ in layers_of(model).named_parameters())
    reason = f"grad mode is on and layer.{name} requires grad: use torch.no_grad()"
    assert_trains_alike(pair, sequence_loss(lengths=None), {("packed", reason)})
    assert reason in str(report(model))


OTHER_PATHS = {
    "a layer with a hook": (
        lambda model: layers_of(model)[1].register_forward_hook(lambda *_: None),
        "layer.1 has hooks, a forward or tensors of its own",
    ),
    "a layer with a hook for the backward pass": (
        lambda model: layers_of(model)[0].register_full_backward_hook(lambda *_: None),
        "layer.0 has hooks, a forward or tensors of its own",
    ),
    "a forward of an instance": (
        lambda model: setattr(layers_of(model)[0], "forward", layers_of(model)[0].forward),
        "layer.0 has hooks, a forward or tensors of its own",
    ),
    "another norm": (
        lambda model: setattr(layers_of(model)[1].output, "LayerNorm", nn.RMSNorm(32)),
        "layer.1.output.LayerNorm is a torch.nn.modules.normalization.RMSNorm, not a LayerNorm",
    ),
    "another dropout": (
        lambda model: setattr(layers_of(model)[0].output, "dropout", nn.AlphaDropout(0.0)),
        "layer.0.output.dropout is a torch.nn.modules.dropout.AlphaDropout, not a Dropout",
    ),
    "another activation": (
        lambda model: setattr(layers_of(model)[0].intermediate, "intermediate_act_fn", nn.SiLU()),
        "layer.0.intermediate.intermediate_act_fn is neither ReLU nor GELU, or has hooks",
    ),
    "no layers": (lambda model: setattr(encoder_model(model).encoder, "layer", nn.ModuleList()), "there is no layer"),
}


@pytest.mark.parametrize("change", OTHER_PATHS)
def test_what_is_changed_in_a_layer_runs(change):
    pair = pair_of(build())
    alter, reason = OTHER_PATHS[change]
    for each in pair:
        alter(each)
    assert_trains_alike(pair, sequence_loss(), {("original", reason)})
    assert reason in str(report(pair[1]))


def test_a_hook_for_all_modules():
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        assert_trains_alike(pair_of(build()), sequence_loss(), {("original", "hooks for all modules are registered")})
    finally:
        handle.remove()


@pytest.mark.parametrize("asked", ["output_hidden_states", "output_attentions"])
def test_what_layers_give_is_asked_for(family, asked):
    """A loss on the first layer's output, or on its attention."""
    pair, batch = pair_of(build(family, "Model", attn_implementation="eager")), batch_of()
    real = batch["attention_mask"].bool()

    def loss(model):
        output = model(**batch, **{asked: True})
        by_position = output.hidden_states[1] if asked == "output_hidden_states" else output.attentions[0].mT[:, 0]
        return by_position[real].cos().sum()

    assert_trains_alike(pair, loss, {("original", "hidden states or attention weights are asked for")})
    assert_trains_alike(pair, lambda model: model(**batch)[0][real].cos().sum())  # and nothing of it is left


def test_decoders():
    model, accelerated = pair_of(build("BERT", "LMHeadModel", is_decoder=True))
    batch = batch_of()
    assert_trains_alike((model, accelerated), loss_of(labelled("BERT", "LMHeadModel", batch)), None)
    assert taken(accelerated) != PACKED


def test_hooks_around_the_layers_see_what_the_originals_would():
    pair, loss = pair_of(build()), sequence_loss()
    seen = []
    for each in pair:
        values, encoder = {}, encoder_model(each)
        for name in ("embeddings", "encoder", "pooler"):
            module = encoder.get_submodule(name)
            module.register_forward_hook(lambda *args, values=values, name=name: values.update({name: args[2]}))
            module.register_full_backward_hook(
                lambda *args, values=values, name=name: values.update({f"grad of {name}": args[2][0]})
            )
        step(each, loss)
        values["encoder"] = values["encoder"][0]
        seen.append(values)
    real = torch.arange(9) < torch.tensor(LENGTHS).unsqueeze(1)
    for name, theirs in seen[0].items():
        ours = seen[1][name]
        assert ours.shape == theirs.shape, name
        if theirs.dim() == 3:
            ours, theirs = ours[real], theirs[real]
        close(ours, theirs, rtol=1e-4, atol=1e-5, msg=name)
