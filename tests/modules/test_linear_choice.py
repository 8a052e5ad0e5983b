# SPDX-License-Identifier: BSD-3-Clause
"""A module used by itself measures, once for a shape, which library multiplies faster."""

from __future__ import annotations

import pytest
import torch

import resnorm_ext.modules as rn
from resnorm_ext.engine.linear import LinearShape
from resnorm_ext.modules import linear


@pytest.fixture
def measured(monkeypatch):
    shapes = []
    monkeypatch.setattr(linear, "choose_backends", shapes.extend)
    linear._choose_backend.cache_clear()
    yield shapes
    linear._choose_backend.cache_clear()


def test_each_shape_is_measured_once(measured):
    encoder = rn.TransformerEncoder(rn.TransformerEncoderLayer(8, 2, 12, batch_first=True), 2)
    for length in (3, 4):
        encoder(torch.randn(2, length, 8))
    assert measured == [LinearShape(torch.float32, *sizes) for sizes in ((8, 24), (8, 8), (8, 12), (12, 8))]


def test_nothing_is_measured_where_results_must_repeat(measured):
    torch.use_deterministic_algorithms(True)
    try:
        rn.FeedForward(8, 12)(torch.randn(2, 8))
    finally:
        torch.use_deterministic_algorithms(False)
    assert measured == []
    rn.FeedForward(8, 12)(torch.randn(2, 8))
    assert len(measured) == 2


def test_measuring_takes_no_random_numbers_of_the_caller():
    linear._choose_backend.cache_clear()
    module, x = rn.FeedForward(20, 28, 0.0), torch.randn(2, 20)
    torch.manual_seed(3)
    expected = torch.randn(4)
    torch.manual_seed(3)
    module(x)
    assert torch.equal(torch.randn(4), expected)
