# SPDX-License-Identifier: BSD-3-Clause
"""Fine-tuning an accelerated BERT: the original's gradients, dropout and checkpointing."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers

from resnorm_ext.integrations import accelerate

from .conftest import MASKS, inputs, tiny_config


def gradients(model, loss) -> dict[str, torch.Tensor | None]:
    model.zero_grad()
    loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def assert_same_gradients(ours, theirs) -> None:
    assert ours.keys() == theirs.keys()
    for name, gradient in theirs.items():
        if gradient is None:
            assert ours[name] is None, name
            continue
        scale = gradient.abs().max().clamp_min(1.0)
        assert (ours[name] - gradient).abs().max() <= 2e-5 * scale, name


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_every_parameter_gets_the_originals_gradient(implementation, mask):
    config = tiny_config(num_labels=3, attn_implementation=implementation)
    model = transformers.BertForTokenClassification(config).train()
    accelerated = accelerate(copy.deepcopy(model))
    batch = inputs(mask)
    real = batch.get("attention_mask", torch.ones(4, 9)).bool()
    labels = torch.where(real, torch.randint(0, 3, (4, 9)), -100)
    ours, theirs = (gradients(each, each(**batch, labels=labels).loss) for each in (accelerated, model))
    assert all(gradient is not None and gradient.any() for gradient in theirs.values())
    assert_same_gradients(ours, theirs)


def test_minilm(minilm_path):
    tokenizer = transformers.AutoTokenizer.from_pretrained(minilm_path)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        minilm_path, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
    )
    accelerated = accelerate(copy.deepcopy(model))
    texts = [
        "The residual stream of a Transformer.",
        "A short one.",
        "Training goes through the same modules as before.",
    ]
    batch = tokenizer(texts, padding=True, return_tensors="pt") | {"labels": torch.tensor([0, 1, 0])}
    ours, theirs = (gradients(each.train(), each(**batch).loss) for each in (accelerated, model))
    assert_same_gradients(ours, theirs)


def test_training_goes_as_the_originals():
    """Evaluating between the steps packs weights, which the next step changes."""
    model = transformers.BertForSequenceClassification(tiny_config()).train()
    accelerated = accelerate(copy.deepcopy(model))
    batches = [inputs("right") | {"labels": torch.randint(0, 2, (4,))} for _ in range(4)]
    evaluated = []
    for each in (model, accelerated):
        optimizer = torch.optim.SGD(each.parameters(), lr=0.05)
        evaluated.append([])
        for batch in batches:
            optimizer.zero_grad()
            each(**batch).loss.backward()
            optimizer.step()
            with torch.no_grad():
                evaluated[-1].append(each.eval()(**batches[0]).logits)
            each.train()
    torch.testing.assert_close(evaluated[1], evaluated[0], rtol=1e-3, atol=1e-4)
    assert not torch.allclose(evaluated[0][0], evaluated[0][-1], atol=1e-2)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_gradient_checkpointing(pair, dropout, use_reentrant):
    """The second computation of a layer drops what the first one dropped. In float64, because transformers puts a hook
    on the embeddings, which then go another way."""
    batch = inputs("none")
    accelerated = pair[1].train().double()
    for layer in accelerated.encoder.layer:
        layer.output.dropout.p = layer.attention.output.dropout.p = dropout
    plain, checkpointed = accelerated, copy.deepcopy(accelerated)
    checkpointed.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    calls = []
    checkpointed.encoder.layer[0].output.dense.register_forward_hook(lambda *_: calls.append(1))
    results = []
    for each in (plain, checkpointed):
        torch.manual_seed(3)
        results.append(gradients(each, each(**batch).last_hidden_state.square().sum()))
    assert len(calls) == 2
    assert_same_gradients(results[1], results[0])


SAMPLES = 6000
DROPOUTS = {
    "embeddings": ["embeddings.dropout"],
    "attention probabilities": [f"encoder.layer.{i}.attention.self.dropout" for i in range(2)],
    "attention output": [f"encoder.layer.{i}.attention.output.dropout" for i in range(2)],
    "output": [f"encoder.layer.{i}.output.dropout" for i in range(2)],
}


@pytest.mark.parametrize("which", DROPOUTS)
@pytest.mark.parametrize("p", [0.1, 0.4])
def test_each_dropout_acts_at_its_own_rate(pair, which, p):
    """One sentence many times over: mean and variance of the outputs are the original's."""
    sentence = torch.tensor([[2, 17, 40, 3]]).expand(SAMPLES, -1)
    moments = []
    for model in pair:
        for name in DROPOUTS[which]:
            model.get_submodule(name).p = p
        with torch.no_grad():
            output = model.train()(sentence).last_hidden_state.double()
        moments.append((output.mean(0), output.var(0), (output - output.mean(0)).pow(4).mean(0)))
    (our_mean, our_variance, _), (mean, variance, fourth) = moments
    assert variance.max() > 1e-4
    standard_error = (2 * variance / SAMPLES).sqrt()
    assert ((our_mean - mean).abs() <= 5 * standard_error).all()
    standard_error = (2 * (fourth - variance.square()) / SAMPLES).sqrt()
    assert ((our_variance - variance).abs() <= 5 * standard_error).all()


def test_dropout_follows_the_seed(pair):
    accelerated = pair[1].train()
    accelerated.embeddings.dropout.p = accelerated.encoder.layer[0].output.dropout.p = 0.5
    batch = inputs("full")
    outputs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        outputs.append(accelerated(**batch).last_hidden_state)
    assert torch.equal(outputs[0], outputs[1]) and not torch.equal(outputs[0], outputs[2])


def test_bfloat16_training(pair):
    batch = inputs("right")
    real = batch["attention_mask"].bool()
    model, accelerated = (each.bfloat16().train() for each in pair)
    exact = copy.deepcopy(model).double()
    losses = [each(**batch).last_hidden_state[real].double().square().mean() for each in (accelerated, model, exact)]
    ours, theirs, wanted = (
        torch.cat([g.double().flatten() for g in gradients(each, loss).values() if g is not None])
        for each, loss in zip((accelerated, model, exact), losses, strict=True)
    )
    assert (ours - wanted).norm() <= 1.2 * (theirs - wanted).norm()
