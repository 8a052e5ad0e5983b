# SPDX-License-Identifier: BSD-3-Clause
from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import resnorm_ext
from resnorm_ext.build.extension import extension
from resnorm_ext.engine import encode as engine
from resnorm_ext.functional import add_layer_norm, packed_attention


def normalize(cols: int, rows: int = 4) -> torch.Tensor:
    x = torch.ones(rows, cols)
    return add_layer_norm(x, x, (cols,))  # whose sum is stored nowhere but in a buffer


def attend(tokens: int) -> torch.Tensor:
    return packed_attention(torch.ones(tokens, 3, 2, 64), torch.tensor([0, tokens], dtype=torch.int32))


def layers_of(count: int, dim: int = 32) -> list:
    """Post-norm layers whose products are this package's."""
    sizes = [(3 * dim, dim), (dim, dim), (4 * dim, dim), (dim, 4 * dim)]
    for out_features, in_features in sizes:
        extension.set_linear_backend(torch.float32, in_features, out_features, "resnorm")
    qkv, attention_output, intermediate, output = ((torch.full(size, 0.01), None) for size in sizes)
    parameters = [*qkv, *attention_output, None, None, *intermediate, *output, None, None]
    options = {"products": torch.float32, "stream": torch.float32}
    return [extension.prepare_layer(parameters, dim // 2, 1.0, 1e-5, 1e-5, "gelu", **options)] * count


def encode(tokens: int, layers: int = 2) -> torch.Tensor:
    return engine.encode(torch.ones(tokens, 32), torch.tensor([0, tokens], dtype=torch.int32), layers_of(layers))


@pytest.mark.parametrize("call", [normalize, attend, encode])
def test_what_is_kept_does_not_grow_with_calls_and_is_freed(call):
    resnorm_ext.free_workspaces()
    expected = call(40_000 if call is normalize else 600).clone()
    kept = resnorm_ext.free_workspaces()
    assert kept > 0
    assert resnorm_ext.free_workspaces() == 0
    for _ in range(3):
        assert torch.equal(call(40_000 if call is normalize else 600), expected)
    assert resnorm_ext.free_workspaces() == kept


def test_attention_keeps_no_more_for_longer_sequences():
    kept = []
    for tokens in (2048, 4096):
        attend(tokens)
        kept.append(resnorm_ext.free_workspaces())
    assert 0 < kept[1] == kept[0]


def test_layers_keep_no_more_for_longer_sequences():
    kept = []
    for tokens in (extension.MAX_ROWS, 3 * extension.MAX_ROWS):
        resnorm_ext.free_workspaces()
        encode(extension.MAX_ROWS)
        encode(tokens)
        kept.append(resnorm_ext.free_workspaces())
    assert 0 < kept[1] == kept[0]


def test_layers_allocate_nothing():
    counts = []
    for layers in (1, 6):
        with torch.profiler.profile() as profile:
            encode(70, layers)
        counts.append(sum("empty" in event.name for event in profile.events()))
    assert counts[0] == counts[1] > 0


def test_usual_rows_need_none():
    resnorm_ext.free_workspaces()
    normalize(768, rows=64)
    assert resnorm_ext.free_workspaces() == 0


def test_other_threads_are_left_alone():
    with ThreadPoolExecutor(1) as other:
        other.submit(normalize, 40_000).result()
        resnorm_ext.free_workspaces()
        assert other.submit(resnorm_ext.free_workspaces).result() > 0
