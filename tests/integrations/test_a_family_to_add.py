# SPDX-License-Identifier: BSD-3-Clause
"""The example in CONTRIBUTING.md: with that one file a family is accelerated."""

from __future__ import annotations

import copy
import importlib
import re
import sys
from pathlib import Path

import pytest
import torch
import transformers
from transformers.models.data2vec import modeling_data2vec_text

from resnorm_ext.integrations import accelerate, models, report, restore

from .conftest import assert_same_at_real_positions, inputs, tiny_config

module = sys.modules["resnorm_ext.integrations.accelerate"]
CONTRIBUTING = Path(__file__).parents[2] / "CONTRIBUTING.md"


@pytest.fixture
def family(tmp_path, monkeypatch):
    section = CONTRIBUTING.read_text().partition("## To add a model family")[2].partition("\n## ")[0]
    (example,) = re.findall("```python\n(.*?)```", section, re.DOTALL)
    (tmp_path / "data2vec_text.py").write_text(example)
    monkeypatch.setattr(models, "__path__", [*models.__path__, str(tmp_path)])
    monkeypatch.setattr(module, "FAMILIES", [*module.FAMILIES, "data2vec_text"])
    importlib.invalidate_caches()
    yield
    sys.modules.pop(f"{models.__name__}.data2vec_text", None)


@torch.no_grad()
def test_the_example(family, path_of):
    settings = {**tiny_config().to_dict(), "model_type": "data2vec-text", "pad_token_id": 1}
    model = transformers.Data2VecTextModel(transformers.Data2VecTextConfig(**settings)).eval()
    accelerated = accelerate(copy.deepcopy(model))
    batch = inputs("right")
    del batch["token_type_ids"]
    assert path_of(accelerated, **batch) == "packed"
    output, expected = (each(**batch).last_hidden_state for each in (accelerated, model))
    assert_same_at_real_positions(output, expected, batch)
    assert not report(accelerated).left_alone
    assert type(restore(accelerated).encoder) is modeling_data2vec_text.Data2VecTextEncoder
