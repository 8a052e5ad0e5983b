# SPDX-License-Identifier: BSD-3-Clause
"""In train mode each dropout of an encoder layer acts at its own rate, in the same place as torch.nn's."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import resnorm_ext.modules as rn

LENGTH, DIM, HEADS, DRAWS = 4, 8, 2, 20000
RATES = {
    "attention": lambda layer, p: setattr(layer.self_attn, "dropout", p),
    "activation": lambda layer, p: setattr(layer.dropout, "p", p),
    "after attention": lambda layer, p: setattr(layer.dropout1, "p", p),
    "after feed-forward": lambda layer, p: setattr(layer.dropout2, "p", p),
}


@pytest.mark.parametrize(
    ("path", "stacked"),
    [("grad", False), ("grad", True), ("no grad", False), ("packed", True), ("packed input", False)],
)
@pytest.mark.parametrize("norm_first", [False, True], ids=["post-norm", "pre-norm"])
@pytest.mark.parametrize("place", RATES)
def test_mean_and_variance_are_those_of_torch_nn(place, norm_first, path, stacked):
    """A batch of copies of one sequence is as many draws."""
    options = {"dropout": 0.0, "batch_first": True, "norm_first": norm_first}
    reference, ours = (module.TransformerEncoderLayer(DIM, HEADS, 12, **options) for module in (nn, rn))
    for layer in (reference, ours):
        RATES[place](layer, 0.3)
    if stacked:
        reference = nn.TransformerEncoder(reference, 2, nn.LayerNorm(DIM), enable_nested_tensor=False)
        ours = rn.TransformerEncoder(ours, 2, rn.LayerNorm(DIM))
    for parameter in reference.parameters():
        nn.init.normal_(parameter, std=0.5)
    ours.load_state_dict(reference.state_dict())
    src = torch.randn(1, LENGTH, DIM).repeat(DRAWS, 1, 1)
    expected = reference(src)

    with torch.set_grad_enabled(path != "packed" and path != "no grad"):
        if path == "packed input":
            bounds = torch.arange(0, DRAWS * LENGTH + 1, LENGTH, dtype=torch.int32)
            output = ours(src.flatten(0, 1), cu_seqlens=bounds).view_as(src)
        elif path == "packed":
            padded = torch.cat([torch.randn(DRAWS, 1, DIM), src], 1)
            hidden = torch.zeros(DRAWS, LENGTH + 1, dtype=torch.bool)
            hidden[:, 0] = True
            output = ours(padded, src_key_padding_mask=hidden)[:, 1:]
        else:
            output = ours(src)

    # Five standard errors of a difference of two samples: over n draws the error of a mean is sqrt(1 / n) deviations,
    # that of a deviation sqrt((kurtosis - 1) / 4n) of itself.
    mean, deviation = expected.mean(0), expected.std(0)
    kurtosis = ((expected - mean) / deviation).pow(4).mean(0)
    assert deviation.max() > 0.01
    assert ((output.mean(0) - mean).abs() <= 5 * (2 / DRAWS) ** 0.5 * deviation).all()
    assert ((output.std(0) - deviation).abs() <= 5 * ((kurtosis - 1) / 2 / DRAWS) ** 0.5 * deviation).all()


@torch.no_grad()
def test_each_part_has_its_own_training_flag():
    layer = rn.TransformerEncoderLayer(DIM, HEADS, 12, 0.5, batch_first=True)
    src = torch.randn(2, LENGTH, DIM)
    expected = layer.eval()(src)
    layer.train()
    assert not torch.allclose(layer(src), expected)
    for part in (layer.self_attn, layer.dropout, layer.dropout1, layer.dropout2):
        part.eval()
    assert torch.equal(layer(src), expected)
