# SPDX-License-Identifier: BSD-3-Clause
"""Text encoders that run packed on a GPU, in training and inference, with the CPU in its place: PyTorch's kernels for
packed attention are emulated (tests/attention/emulation.py), all else is what runs on a GPU too."""

from __future__ import annotations

import sys
from collections.abc import Callable

import pytest
import torch
from attention.emulation import emulated
from torch import Tensor, nn

from resnorm_ext.engine.prepared import PREPARED
from resnorm_ext.integrations import stack

from .families import taken
from .packed_cases import (
    COMPUTED,
    FAMILIES,
    PACKED,
    assert_same_step,
    assert_trains_alike,
    batch_of,
    build,
    heads_of,
    labelled,
    loss_of,
    pair_of,
    sequence_loss,
    step,
)

LAYERS = 2


@pytest.fixture(params=FAMILIES)
def family(request) -> str:
    return request.param


def embedded(model: nn.Module) -> dict[str, Tensor]:
    """A batch by its tokens' embeddings, which on a CPU too no single C++ call takes."""
    batch = batch_of()
    embeddings = model.get_input_embeddings()(batch["input_ids"]).detach()
    return {"inputs_embeds": embeddings, "attention_mask": batch["attention_mask"]}


def narrow(loss: Callable[[nn.Module], Tensor]) -> Callable[[nn.Module], Tensor]:
    def autocast_loss(model: nn.Module) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return loss(model)

    return autocast_loss


@pytest.mark.parametrize(("family", "head"), [(family, head) for family in FAMILIES for head in heads_of(family)])
def test_heads_train(family, head):
    pair = pair_of(build(family, head))
    with emulated() as calls:
        assert_trains_alike(pair, loss_of(labelled(family, head, batch_of())))
    assert calls == {"_efficient_attention_forward": LAYERS, "_efficient_attention_backward": LAYERS}


@pytest.mark.parametrize("lengths", [(9, 4, 1, 8), None], ids=["padding", "no padding"])
def test_half_precision_trains_by_autocast(family, lengths):
    model, accelerated = pair_of(build(family))
    loss = sequence_loss(lengths=lengths)

    with emulated() as calls:
        value, gradients = step(accelerated, narrow(loss))
    assert taken(accelerated) == PACKED
    assert calls == {"_flash_attention_forward": LAYERS, "_flash_attention_backward": LAYERS}
    exact_value, exact = step(model, loss)
    torch.testing.assert_close(value.float(), exact_value, rtol=5e-2, atol=5e-2)
    largest = max(float(each.norm()) for each in exact.values() if each is not None)
    for name, gradient in exact.items():
        if gradient is not None:
            assert float((gradients[name] - gradient).norm()) <= 0.1 * max(float(gradient.norm()), largest), name


def test_padding_is_computed_in_training_unless_it_may_be_skipped():
    model, accelerated = pair_of(build(), padding="auto")
    with emulated() as calls:
        assert_trains_alike((model, accelerated), sequence_loss(), COMPUTED)
        assert_trains_alike((model, accelerated), sequence_loss(lengths=None), None)
    assert calls["_efficient_attention_forward"] == LAYERS


@pytest.mark.parametrize("padding", ["auto", "skip"])
def test_inference(family, padding):
    """Nothing is prepared, which would be for a CPU; padded positions are zeros."""
    model, accelerated = pair_of(build(family, "Model").eval(), padding)
    batch = embedded(accelerated)
    with emulated() as calls, torch.no_grad():
        actual, expected = accelerated(**batch)[0], model(**batch)[0]
    assert taken(accelerated) == PACKED
    assert calls == {"_efficient_attention_forward": LAYERS}
    real = batch["attention_mask"].bool()
    torch.testing.assert_close(actual[real], expected[real], rtol=1e-5, atol=1e-5)
    assert not actual[~real].any()
    assert not any(PREPARED in module.__dict__ for module in accelerated.modules())


def test_dropout_is_the_kernels_and_repeats_with_the_seed():
    _, accelerated = pair_of(build(attention_probs_dropout_prob=0.4))
    loss = narrow(sequence_loss())
    with emulated() as calls:
        steps = []
        for seed in (1, 1, 2):
            torch.manual_seed(seed)
            steps.append(step(accelerated, loss))
    assert taken(accelerated) == PACKED
    assert calls["_flash_attention_backward"] == 3 * LAYERS
    torch.testing.assert_close(steps[1], steps[0])
    assert steps[2][0] != steps[0][0]


def test_checkpointed_layers_drop_the_same():
    model, _ = pair_of(build(attention_probs_dropout_prob=0.4))
    steps = []
    loss = narrow(sequence_loss())
    with emulated() as calls:
        for checkpointed in (False, True):
            _, accelerated = pair_of(model)
            if checkpointed:
                accelerated.gradient_checkpointing_enable()
            torch.manual_seed(1)
            steps.append(step(accelerated, loss))
            assert taken(accelerated) == PACKED
    assert calls["_flash_attention_forward"] == 3 * LAYERS
    torch.testing.assert_close(steps[1], steps[0])


@pytest.mark.parametrize(
    ("dtype", "changes", "reason"),
    [
        (torch.float64, {}, "packed torch.float64 of head_dim 8"),
        (torch.float32, {"attention_probs_dropout_prob": 0.4}, "packed torch.float32 of head_dim 8, with dropout"),
        (torch.float32, {"hidden_size": 36, "num_attention_heads": 6}, "packed torch.float32 of head_dim 6"),
    ],
)
def test_what_no_kernel_attends_to(dtype, changes, reason):
    model, accelerated = pair_of(build(**changes).to(dtype))
    loss = sequence_loss()
    with emulated() as calls:
        actual = step(accelerated, loss)
    assert not calls and taken(accelerated) == {("original", f"no kernel attends to {reason}")}
    if "attention_probs_dropout_prob" not in changes:
        assert_same_step(actual, step(model, loss))


@pytest.mark.parametrize("masked", [False, True])
def test_nothing_waits_for_the_gpu_while_a_graph_records_the_call(family, masked, monkeypatch: pytest.MonkeyPatch):
    """Nor is a mask read."""
    model, accelerated = pair_of(build(family, "Model").eval())
    batch = batch_of() if masked else {"input_ids": batch_of()["input_ids"]}
    with torch.no_grad():
        expected = model(**batch)[0]
        monkeypatch.setattr(stack, "is_recorded", lambda tensor: True)
        for name in ("tolist", "__bool__", "__int__", "item", "nonzero", "cpu", "equal"):
            monkeypatch.setattr(Tensor, name, allowed_to_transformers_and_emulation(getattr(Tensor, name)))
        monkeypatch.setattr(torch, "equal", allowed_to_transformers_and_emulation(torch.equal))
        with emulated():
            actual = accelerated(**batch)[0]
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    assert taken(accelerated) == ({("original", stack.UNREAD)} if masked else PACKED)


def allowed_to_transformers_and_emulation(read: Callable) -> Callable:
    def checked(tensor: Tensor, *arguments):
        frame = sys._getframe(1)
        while frame is not None:  # the first that is of this package, or of the emulation inside of it
            name = frame.f_globals.get("__name__", "")
            assert not name.startswith("resnorm_ext."), f"{name}, line {frame.f_lineno}, reads a tensor"
            if name.startswith(("transformers.", "attention.emulation", "torch.testing")):
                break
            frame = frame.f_back
        return read(tensor, *arguments)

    return checked


def test_model_goes_back_to_the_cpu():
    _, accelerated = pair_of(build(head="Model").eval())
    batch = embedded(accelerated)
    with torch.no_grad():
        with emulated() as calls:
            on_gpu = accelerated(**batch)[0]
        on_cpu = accelerated(**batch)[0]
    assert calls == {"_efficient_attention_forward": LAYERS} and taken(accelerated) == PACKED
    torch.testing.assert_close(on_gpu, on_cpu, rtol=1e-5, atol=1e-5)
