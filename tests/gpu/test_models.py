# SPDX-License-Identifier: BSD-3-Clause
"""Accelerated models against the originals, both on the GPU."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from resnorm_ext.integrations import accelerate

from .device import DEVICE

pytestmark = pytest.mark.cuda

BATCH, LENGTH = 8, 64
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def torch_nn_without_its_fast_path():
    """What torch.nn computes on its fast path is not a reference: masks and padding come out wrong there."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    yield
    torch.backends.mha.set_fastpath_enabled(enabled)


@pytest.fixture(scope="module")
def bert() -> nn.Module:
    """Of MiniLM's sizes, without its weights."""
    transformers = pytest.importorskip("transformers", minversion="5.2")
    torch.manual_seed(0)
    sizes = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536}
    return transformers.BertModel(transformers.BertConfig(**sizes, vocab_size=1000, initializer_range=0.1)).to(DEVICE)


@pytest.fixture(scope="module", params=[False, True], ids=["post-norm", "pre-norm"])
def encoder(request) -> nn.Module:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(256, 8, 1024, batch_first=True, norm_first=request.param, activation="gelu")
    return nn.TransformerEncoder(layer, 3, nn.LayerNorm(256), enable_nested_tensor=False).to(DEVICE)


def real_positions() -> torch.Tensor:
    lengths = torch.randint(1, LENGTH, (BATCH, 1), generator=torch.Generator().manual_seed(1))
    lengths[0] = LENGTH
    return (torch.arange(LENGTH) < lengths).to(DEVICE)


def without_dropout(model: nn.Module) -> nn.Module:
    """A copy; also the rates that attentions hold as numbers."""
    model = copy.deepcopy(model)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        elif isinstance(module, nn.MultiheadAttention):
            module.dropout = 0.0
        elif isinstance(module, nn.TransformerEncoderLayer):
            module.dropout.p = module.dropout1.p = module.dropout2.p = 0.0
    return model


def check(model: nn.Module, call, dtype: torch.dtype) -> None:
    """In inference and training; in half precision, no farther from float32's results than the original is."""
    real = real_positions()
    model = without_dropout(model)
    outcomes = {}
    for name, each in {
        "exact": copy.deepcopy(model),
        "original": copy.deepcopy(model).to(dtype),
        "accelerated": accelerate(copy.deepcopy(model).to(dtype)),
    }.items():
        with torch.no_grad():
            inference = call(each.eval(), real)[real]
        training = call(each.train(), real)[real]
        training.float().square().mean().backward()
        gradients = {n: p.grad.float() for n, p in each.named_parameters() if p.grad is not None}
        outcomes[name] = {"inference": inference.float(), "training": training.detach().float()} | gradients
    assert outcomes["accelerated"].keys() == outcomes["original"].keys()
    for name, exact in outcomes["exact"].items():
        assert exact.abs().max() > 0 or "key" in name, name
        ours, theirs = ((outcomes[side][name] - exact).norm() for side in ("accelerated", "original"))
        assert ours <= 1.5 * theirs + 1e-4 * max(exact.norm().item(), 1.0), f"{name}: {ours} against {theirs}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bert(bert, dtype):
    ids = torch.randint(1, 1000, (BATCH, LENGTH), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    check(bert, lambda model, real: model(ids, attention_mask=real.long()).last_hidden_state, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_torch_encoder(encoder, dtype):
    x = torch.randn(BATCH, LENGTH, 256, generator=torch.Generator().manual_seed(0)).to(DEVICE)

    def call(model: nn.Module, real: torch.Tensor) -> torch.Tensor:
        return model(x.to(next(model.parameters()).dtype), src_key_padding_mask=~real)

    check(encoder, call, dtype)


@pytest.mark.parametrize("masked", [False, True])
def test_bert_in_a_graph(bert, masked):
    """Of a fixed shape: without a mask packed, with one as transformers records it."""
    model = accelerate(copy.deepcopy(bert).to(torch.bfloat16)).eval()
    batches = [torch.randint(1, 1000, (BATCH, LENGTH), device=DEVICE) for _ in range(2)]
    options = {"attention_mask": real_positions().long()} if masked else {}
    with torch.no_grad():
        expected = [model(ids, **options).last_hidden_state for ids in batches]
        graph, given = torch.cuda.CUDAGraph(), batches[0].clone()
        with torch.cuda.graph(graph):
            output = model(given, **options).last_hidden_state
        for ids, reference in zip(batches, expected, strict=True):
            given.copy_(ids)
            graph.replay()
            real = real_positions() if masked else slice(None)
            torch.testing.assert_close(output[real], reference[real], rtol=2e-2, atol=2e-2)


def test_dropout_of_an_accelerated_model_is_reproducible(bert):
    model = accelerate(copy.deepcopy(bert)).train()
    ids = torch.randint(1, 1000, (BATCH, LENGTH)).to(DEVICE)
    outputs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        outputs.append(model(ids).last_hidden_state)
    assert torch.equal(outputs[0], outputs[1]) and not torch.equal(outputs[0], outputs[2])
