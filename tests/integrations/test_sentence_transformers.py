# SPDX-License-Identifier: BSD-3-Clause
"""A sentence-transformers model as a whole: tokens, BERT, pooling and normalization in one module."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch

from resnorm_ext.demo.texts import standard_library_texts
from resnorm_ext.integrations import accelerate, report, restore

sentence_transformers = pytest.importorskip("sentence_transformers")


@pytest.fixture
def model(minilm_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return sentence_transformers.SentenceTransformer(minilm_path, device="cpu")


def test_encode(model, path_of):
    accelerated = accelerate(copy.deepcopy(model))
    texts = standard_library_texts(24)
    expected = model.encode(texts, convert_to_tensor=True)
    assert path_of(accelerated.encode, texts) == "packed"
    actual = accelerated.encode(texts, convert_to_tensor=True)
    assert actual.shape == expected.shape == (24, 384)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-6)
    query = texts[7].split(".")[0]
    scores = [each.similarity(each.encode(query), each.encode(texts)) for each in (model, accelerated)]
    torch.testing.assert_close(*scores, rtol=0, atol=1e-6)


def test_training_gives_the_same_gradients(model):
    accelerated = accelerate(copy.deepcopy(model))
    for each in (model, accelerated):
        features = each.preprocess(["a first text", "another one, which is longer"])
        each.eval()(features)["sentence_embedding"].pow(3).sum().backward()
    gradients = zip(model.named_parameters(), accelerated.parameters(), strict=True)
    for (name, expected), actual in ((named, other) for named, other in gradients if named[1].grad is not None):
        torch.testing.assert_close(actual.grad, expected.grad, rtol=1e-3, atol=1e-5, msg=name)


def test_it_is_put_back(model):
    kinds = [type(module) for module in model.modules()]
    assert report(accelerate(model)).replaced
    assert [type(module) for module in restore(model).modules()] == kinds
