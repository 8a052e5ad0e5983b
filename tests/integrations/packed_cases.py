# SPDX-License-Identifier: BSD-3-Clause
"""Small text encoders of every family that trains on packed batches, their heads, and what a training step gives."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

from resnorm_ext.integrations import accelerate, report

from .families import taken

FAMILIES = {
    "BERT": "Bert",
    "RoBERTa": "Roberta",
    "XLM-RoBERTa": "XLMRoberta",
    "CamemBERT": "Camembert",
    "ELECTRA": "Electra",
    "ERNIE": "Ernie",
    "DistilBERT": "DistilBert",
}
_CHANGES = {"ELECTRA": {"embedding_size": 24, "summary_last_dropout": 0.0}, "ERNIE": {"use_task_id": True}}
_SIZES = {
    "vocab_size": 100,
    "max_position_embeddings": 40,
    "initializer_range": 0.3,  # large enough that every part of the model matters to its loss
    "pad_token_id": 1,
}
_BERT_SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
_DISTILBERT_SIZES = {
    "dim": 32,
    "n_layers": 2,
    "n_heads": 4,
    "hidden_dim": 64,
    "dropout": 0.0,
    "attention_dropout": 0.0,
    "qa_dropout": 0.0,
    "seq_classif_dropout": 0.0,
}
LENGTHS = (9, 4, 1, 8)
TOKENS = sum(LENGTHS)
PACKED = {("packed", None)}
COMPUTED = {("original", "padding is computed in training, unless padding is 'skip'")}
HIDDEN_FIRST = {("original", "position 0 is hidden, as by padding on the left, and may be read")}

Batch = dict[str, Tensor]
Step = tuple[Tensor, dict[str, Tensor | None]]  # a loss, and the gradients of the parameters by name


def build(family: str = "BERT", head: str = "ForSequenceClassification", **changes) -> nn.Module:
    """In training mode, without dropout."""
    prefix = FAMILIES[family]
    sizes = _SIZES | (_DISTILBERT_SIZES if family == "DistilBERT" else _BERT_SIZES) | _CHANGES.get(family, {})
    config = getattr(transformers, f"{prefix}Config")(**(sizes | changes))
    return getattr(transformers, prefix + head)(config).train()


def pair_of(model: nn.Module, padding: str = "skip") -> tuple[nn.Module, nn.Module]:
    """``model`` and its accelerated copy."""
    return model, accelerate(copy.deepcopy(model), padding=padding)


def encoder_model(model: nn.Module) -> nn.Module:
    """The text encoder under the head, or ``model`` itself."""
    return model.base_model


def layers_of(model: nn.Module) -> nn.ModuleList:
    encoder = encoder_model(model)
    return (encoder.transformer if hasattr(encoder, "transformer") else encoder.encoder).layer


def batch_of(lengths: Iterable[int] | None = LENGTHS, masked: bool = True) -> Batch:
    """Four sequences padded to nine tokens; where ``lengths`` is None without padding."""
    ids, mask = torch.randint(3, 100, (4, 9)), torch.ones(4, 9, dtype=torch.long)
    if lengths is not None:
        mask = (torch.arange(9) < torch.tensor(lengths).unsqueeze(1)).long()
    batch = {"input_ids": ids.masked_fill(mask == 0, 1)}
    return batch | {"attention_mask": mask} if masked else batch


def _of_tokens(batch: Batch, high: int = 100) -> Tensor:
    """A label for each real token, and none for padding."""
    labels = torch.randint(0, high, batch["input_ids"].shape)
    return labels if "attention_mask" not in batch else labels.masked_fill(batch["attention_mask"] == 0, -100)


def _of_sequences(batch: Batch) -> Batch:
    return {"labels": torch.arange(len(batch["input_ids"])) % 2}


def _choices(batch: Batch) -> Batch:
    return {name: tensor.view(2, 2, 9) for name, tensor in batch.items()} | {"labels": torch.tensor([0, 1])}


def _pre_training(batch: Batch) -> Batch:
    return {"labels": _of_tokens(batch), "next_sentence_label": torch.tensor([0, 1, 0, 1])}


# What a head is given, beside the batch, for a loss that reads real positions alone.
LABELS: dict[str, Callable[[Batch], Batch]] = {
    "ForSequenceClassification": _of_sequences,
    "ForNextSentencePrediction": _of_sequences,
    "ForTokenClassification": lambda batch: {"labels": _of_tokens(batch, 2)},
    "ForMaskedLM": lambda batch: {"labels": _of_tokens(batch)},
    "ForCausalLM": lambda batch: {"labels": _of_tokens(batch)},  # shifted; which a model that is no decoder can learn
    "LMHeadModel": lambda batch: {"labels": _of_tokens(batch)},
    "ForMultipleChoice": _choices,
    "ForPreTraining": _pre_training,
}


def heads_of(family: str) -> list[str]:
    """Every head of transformers' for this family, but for question answering, whose loss reads padding."""
    prefix = FAMILIES[family]
    names = [name for name in dir(transformers) if name.startswith((f"{prefix}For", f"{prefix}LM"))]
    return [name.removeprefix(prefix) for name in names if not name.endswith("ForQuestionAnswering")]


def labelled(family: str, head: str, batch: Batch) -> Batch:
    if (family, head) == ("ELECTRA", "ForPreTraining"):  # whose loss reads the mask, not -100
        return batch | {"labels": torch.randint(0, 2, (4, 9))}
    return batch | LABELS[head](batch)


def loss_of(batch: Batch, **arguments) -> Callable[[nn.Module], Tensor]:
    return lambda model: model(**batch, **arguments).loss


def sequence_loss(**kinds) -> Callable[[nn.Module], Tensor]:
    """The loss of a sequence classifier on ``batch_of(...)``."""
    batch = batch_of(**kinds)
    return loss_of(batch | _of_sequences(batch))


def mean_pooled(model: nn.Module, batch: Batch) -> Tensor:
    """As sentence-transformers pools."""
    hidden, mask = model(**batch)[0], batch["attention_mask"].unsqueeze(-1)
    return (hidden * mask).sum(1) / mask.sum(1)


def contrastive_loss(queries: Batch, texts: Batch) -> Callable[[nn.Module], Tensor]:
    """With the batch's other texts as negatives (Henderson et al. 2017)."""

    def loss(model: nn.Module) -> Tensor:
        a, b = (F.normalize(mean_pooled(model, batch), dim=-1) for batch in (queries, texts))
        return F.cross_entropy(20 * a @ b.T, torch.arange(len(a)))

    return loss


def step(model: nn.Module, loss: Callable[[nn.Module], Tensor]) -> Step:
    model.zero_grad()
    value = loss(model)
    value.backward()
    return value.detach(), {name: parameter.grad for name, parameter in model.named_parameters()}


def assert_same_step(actual: Step, expected: Step) -> None:
    """Within rounding, which is measured by the largest gradient where a parameter's own is nothing else: softmax does
    not see the biases of keys."""
    (our_loss, ours), (loss, theirs) = actual, expected
    exact = loss.dtype == torch.float64
    tolerance = 1e-12 if exact else 2e-6
    torch.testing.assert_close(our_loss, loss, rtol=tolerance, atol=tolerance)
    assert ours.keys() == theirs.keys() and any(gradient is not None for gradient in theirs.values())
    largest = max(float(gradient.abs().max()) for gradient in theirs.values() if gradient is not None)
    assert largest > 0.0
    for name, gradient in theirs.items():
        assert (ours[name] is None) == (gradient is None), name
        if gradient is not None:
            scale = max(float(gradient.abs().max()), 1e-2 * largest)
            error = float((ours[name] - gradient).abs().max())
            assert error <= (1e-10 if exact else 1e-4) * scale, f"{name}: {error} of {scale}"


def assert_trains_alike(
    pair: tuple[nn.Module, nn.Module], loss: Callable[[nn.Module], Tensor], ways: set | None = PACKED
) -> None:
    """Both models, the second accelerated, have the same loss and gradients, and the second goes these ways."""
    model, accelerated = pair
    actual = step(accelerated, loss)
    if ways is not None:
        assert taken(accelerated) == ways
    assert_same_step(actual, step(model, loss))


def calls(model: nn.Module) -> dict[tuple[str, str | None], int]:
    """How many calls of the encoder went which way."""
    (counts,) = [item.calls for item in report(model).replaced if item.calls]
    return counts
