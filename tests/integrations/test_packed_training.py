# SPDX-License-Identifier: BSD-3-Clause
"""Text encoders that train on packed batches: losses and gradients are the original's, whatever the head, the mask, the
arguments and the parameters that train."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
import transformers

from resnorm_ext.integrations import accelerate

from .families import taken
from .packed_cases import (
    FAMILIES,
    HIDDEN_FIRST,
    PACKED,
    assert_same_step,
    assert_trains_alike,
    batch_of,
    build,
    contrastive_loss,
    encoder_model,
    heads_of,
    labelled,
    loss_of,
    pair_of,
    sequence_loss,
    step,
)

close = torch.testing.assert_close


@pytest.fixture(params=FAMILIES)
def family(request) -> str:
    return request.param


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize(("family", "head"), [(family, head) for family in FAMILIES for head in heads_of(family)])
def test_heads(family, head, dtype):
    pair = pair_of(build(family, head).to(dtype))
    assert_trains_alike(pair, loss_of(labelled(family, head, batch_of())))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_sentence_embeddings(family, dtype):
    loss = contrastive_loss(batch_of(), batch_of(lengths=(2, 9, 7, 3)))
    assert_trains_alike(pair_of(build(family, "Model").to(dtype)), loss)


@pytest.mark.parametrize(
    ("changes", "labels"),
    [
        ({"num_labels": 1}, torch.randn(4)),
        ({"num_labels": 3, "problem_type": "multi_label_classification"}, torch.ones(4, 3)),
    ],
    ids=["regression", "several labels"],
)
def test_other_losses_of_sequences(family, changes, labels):
    assert_trains_alike(pair_of(build(family, **changes)), loss_of(batch_of(), labels=labels))


SPANS = {"start_positions": torch.tensor([2, 1, 0, 3]), "end_positions": torch.tensor([3, 2, 0, 5])}


class TestQuestionAnswering:
    """Its softmax is over all positions, padded ones too."""

    def test_auto_is_the_original(self, family):
        pair = pair_of(build(family, "ForQuestionAnswering"), "auto")
        assert_trains_alike(pair, loss_of(batch_of() | SPANS), {("original", "the loss reads padded positions")})

    def test_auto_packs_where_there_is_no_padding(self, family):
        pair = pair_of(build(family, "ForQuestionAnswering"), "auto")
        assert_trains_alike(pair, loss_of(batch_of(lengths=None) | SPANS))

    def test_skip_has_zeros_in_the_padding(self, family):
        """The original's head on its own encoder's output, with zeros there."""
        model, accelerated = pair_of(build(family, "ForQuestionAnswering"))
        batch = batch_of()

        def expected(model):
            hidden = encoder_model(model)(**batch)[0] * batch["attention_mask"].unsqueeze(-1)
            start, end = model.qa_outputs(hidden).unbind(-1)
            return sum(
                F.cross_entropy(logits, positions) / 2
                for logits, positions in zip((start, end), SPANS.values(), strict=True)
            )

        actual = step(accelerated, loss_of(batch | SPANS))
        assert taken(accelerated) == PACKED
        assert_same_step(actual, step(model, expected))


_MASK = batch_of()["attention_mask"]
_HOLES = torch.tensor([[1] * 9, [1, 0, 1, 0, 1, 1, 0, 0, 1], [1, 0, 0, 0, 0, 0, 0, 0, 1], [1] * 9])
MASKS = {
    "bool": _MASK.bool(),
    "float": _MASK.float(),
    "int32": _MASK.int(),
    "four dimensions": _MASK.bool()[:, None, None],
    "holes": _HOLES,
    "one token each": torch.eye(9, dtype=torch.long)[:1].expand(4, 9),
    "none": None,
}


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("mask", MASKS)
def test_masks(mask, implementation):
    if (mask, implementation) == ("four dimensions", "eager"):
        pytest.skip("it adds its mask to the scores")
    pair = pair_of(build(attn_implementation=implementation))
    batch = batch_of(lengths=None) | {"attention_mask": MASKS[mask]}
    assert_trains_alike(pair, loss_of(batch, labels=torch.tensor([0, 1, 0, 1])))


def test_padding_on_the_left(family):
    batch = {name: tensor.flip(1) for name, tensor in batch_of().items()}
    assert_trains_alike(pair_of(build(family)), loss_of(batch, labels=torch.tensor([0, 1, 0, 1])), HIDDEN_FIRST)


@pytest.mark.parametrize(("padding", "ways"), [("skip", PACKED), ("auto", HIDDEN_FIRST)])
def test_a_sequence_that_is_nothing_but_padding(family, padding, ways):
    """Nothing is asked of it."""
    batch, labels = batch_of(lengths=(9, 4, 0, 8)), torch.tensor([0, 1, -100, 1])
    assert_trains_alike(pair_of(build(family), padding), loss_of(batch, labels=labels), ways)


def test_nothing_but_padding():
    """Zeros, with no gradient but of what reads them."""
    accelerated, batch = accelerate(build(), padding="skip"), batch_of(lengths=(0, 0, 0, 0))
    _, gradients = step(accelerated, loss_of(batch, labels=torch.tensor([0, 1, 1, 1])))
    assert taken(accelerated) == PACKED and gradients["classifier.bias"].any()
    assert all(not gradients[name].any() for name in gradients if "encoder" in name or "embeddings" in name)


ARGUMENTS = {
    "position_ids": {"position_ids": torch.arange(9).flip(0).unsqueeze(0) + 2},
    "token_type_ids": {"token_type_ids": torch.arange(9).expand(4, 9) % 2},
    "return_dict": {"return_dict": False},
    "position_ids of each sequence": {"position_ids": torch.randint(0, 30, (4, 9))},
}


@pytest.mark.parametrize("arguments", ARGUMENTS)
def test_arguments(family, arguments):
    arguments = ARGUMENTS[arguments]
    if family == "DistilBERT" and "token_type_ids" in arguments:
        pytest.skip("it has no types")
    batch = batch_of() | {"labels": torch.tensor([0, 1, 0, 1])}
    pair = pair_of(build(family, type_vocab_size=2))
    assert_trains_alike(pair, lambda model: model(**batch, **arguments)[0])


def test_ernies_tasks():
    batch = batch_of() | {"task_type_ids": torch.randint(0, 3, (4, 9)), "labels": torch.tensor([0, 1, 0, 1])}
    assert_trains_alike(pair_of(build("ERNIE")), loss_of(batch))


CONFIGURATIONS = [{"hidden_act": "relu"}, {"hidden_act": "gelu_new"}, {"chunk_size_feed_forward": 3}]


@pytest.mark.parametrize("changes", CONFIGURATIONS, ids=str)
def test_configurations(changes):
    assert_trains_alike(pair_of(build(**changes)), sequence_loss())


TRAINED = {
    "all but the embeddings": lambda name: "embeddings" not in name,
    "the embeddings": lambda name: "embeddings" in name,
    "the first layer": lambda name: "layer.0." in name,
    "the last layer": lambda name: "layer.1." in name,
    "biases": lambda name: name.endswith("bias"),
    "norms": lambda name: "norm" in name.lower(),
    "feed-forward": lambda name: "ffn" in name or "intermediate" in name,
    "one value projection": lambda name: "layer.1." in name and ("value" in name or "v_lin" in name),
    "the head": lambda name: "classifier" in name,
}


@pytest.mark.parametrize("trained", TRAINED)
def test_some_parameters_train(family, trained):
    model = build(family)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(TRAINED[trained](name))
    assert_trains_alike(pair_of(model), sequence_loss())  # which asks for the same gradients to be None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("frozen", [False, True])
def test_gradients_of_embeddings_that_are_given(family, frozen, dtype):
    model, accelerated = pair_of(build(family).requires_grad_(not frozen))
    width = encoder_model(model).embeddings.word_embeddings.embedding_dim
    mask, values = batch_of()["attention_mask"], torch.randn(4, 9, width, dtype=dtype)
    gradients = []
    for each in (accelerated, model):
        embeds = values.clone().requires_grad_()
        batch = {"inputs_embeds": embeds, "attention_mask": mask, "labels": torch.tensor([0, 1, 0, 1])}
        each(**batch).loss.backward()
        gradients.append(embeds.grad)
    assert taken(accelerated) == PACKED
    assert gradients[1][mask.bool()].any(-1).all() and not gradients[0][mask == 0].any()
    tolerance = 1e-2 if dtype == torch.bfloat16 else 1e-4
    close(*gradients, rtol=tolerance, atol=tolerance * float(gradients[1].abs().max()))


def test_copies_train_apart():
    model, accelerated = pair_of(build())
    twin, loss = copy.deepcopy(accelerated), sequence_loss()
    first = step(accelerated, loss)
    with torch.no_grad():
        for parameter in accelerated.parameters():
            parameter.zero_()
    second = step(twin, loss)
    assert taken(twin) == PACKED
    for each in (first[0], second[0]):
        close(each, step(model, loss)[0], rtol=2e-6, atol=2e-6)


def test_transformers_trainer(tmp_path):
    rows = [
        {"input_ids": ids, "attention_mask": mask, "labels": label}
        for ids, mask, label in zip(*batch_of().values(), [0, 1, 0, 1], strict=True)
    ] * 3
    curves = []
    for model in pair_of(build()):
        arguments = transformers.TrainingArguments(
            str(tmp_path),
            use_cpu=True,
            per_device_train_batch_size=4,
            num_train_epochs=2,
            logging_steps=1,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
            learning_rate=1e-3,
        )
        trainer = transformers.Trainer(model, arguments, train_dataset=rows)
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train()
        curves.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert taken(model) == PACKED
    close(curves[1], curves[0], rtol=1e-4, atol=1e-5)
    assert len(curves[0]) == 6 and curves[0][0] > curves[0][-1]
