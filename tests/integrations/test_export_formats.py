# SPDX-License-Identifier: BSD-3-Clause
"""Accelerated models of transformers traced, exported to ONNX, scripted in parts and quantized: as the originals."""

from __future__ import annotations

import copy
import io

import pytest
import torch
import transformers
from torch import Tensor, nn

from resnorm_ext.integrations import accelerate

from . import gpt2_cases
from .conftest import tiny_config

pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning:(transformers|torch.nn.functional)"),
    pytest.mark.filterwarnings("error::torch.jit.TracerWarning:resnorm_ext"),  # the originals' are warnings enough
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]

TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}
QUIET = {"dropout": 0.0, "attention_dropout": 0.0, "initializer_range": 0.3}


def distilbert() -> nn.Module:
    sizes = {"vocab_size": 100, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64, "max_position_embeddings": 40}
    return transformers.DistilBertModel(transformers.DistilBertConfig(**(sizes | QUIET)))


def roberta() -> nn.Module:
    config = transformers.RobertaConfig(**{**tiny_config().to_dict(), "model_type": "roberta", "pad_token_id": 1})
    return transformers.RobertaModel(config)


def vit() -> nn.Module:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    return transformers.ViTModel(transformers.ViTConfig(**sizes, image_size=24, patch_size=8, initializer_range=0.3))


MODELS = {
    "bert": lambda: transformers.BertModel(tiny_config()),
    "distilbert": distilbert,
    "gpt2": lambda: gpt2_cases.build(use_cache=False),
    "roberta": roberta,
    "vit": vit,
}
every_model = pytest.mark.parametrize("name", MODELS)
every_implementation = pytest.mark.parametrize("implementation", ["sdpa", "eager"])


class Text(nn.Module):
    """Exporters pass arguments by position, and these are not all models' first two."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state


class Images(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.model(pixel_values=pixel_values).last_hidden_state


def batches(name: str) -> list[tuple[Tensor, ...]]:
    """Two of equal sizes and different masks."""
    if name == "vit":
        return [(torch.randn(3, 3, 24, 24),) for _ in range(2)]
    masks = torch.ones(2, 3, 9, dtype=torch.long)
    masks[0, 0, 5:] = masks[1, 1, 2:] = masks[1, 2, 8:] = 0
    return [(torch.randint(2, 100, (3, 9)), mask) for mask in masks]


def pair(name: str, implementation: str = "sdpa") -> tuple[nn.Module, nn.Module]:
    """A model, and its accelerated copy, which has run once as they do before they are exported."""
    model = MODELS[name]()
    model.set_attn_implementation(implementation)
    stock = (Images if name == "vit" else Text)(model).eval()
    accelerated = accelerate(copy.deepcopy(stock))
    accelerated(*batches(name)[0])
    return stock, accelerated


@every_implementation
@every_model
@torch.no_grad()
def test_trace(name, implementation):
    stock, accelerated = pair(name, implementation)
    first, second = batches(name)
    # Its own check would complain: padded positions are zeros where BERT's batch goes without padding.
    traced = torch.jit.trace(accelerated, first, check_trace=False)
    assert "resnorm::" not in str(traced.inlined_graph)
    file = io.BytesIO()
    torch.jit.save(traced, file)
    file.seek(0)
    loaded = torch.jit.load(file)
    for batch in (first, second):
        torch.testing.assert_close(loaded(*batch), stock(*batch), **TOLERANCE)


@torch.no_grad()
def test_trace_as_transformers_documents_it():
    model = transformers.BertModel(tiny_config(torchscript=True)).eval()
    first, second = batches("bert")
    traced = torch.jit.trace(accelerate(copy.deepcopy(model)), first, strict=False, check_trace=False)
    torch.testing.assert_close(tuple(traced(*second).values()), model(*second).to_tuple(), **TOLERANCE)


@pytest.mark.filterwarnings("ignore::FutureWarning:copyreg")
@pytest.mark.filterwarnings("ignore:Exporting aten..index operator of advanced indexing:UserWarning")
@pytest.mark.filterwarnings("ignore:You are using the legacy TorchScript-based ONNX export:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:The feature will be removed. Please remove usage:DeprecationWarning")
@pytest.mark.parametrize("exporter", ["by torch.export", "by torch.jit.trace"])
@pytest.mark.parametrize("name", [name for name in MODELS if name != "roberta"])
@torch.no_grad()
def test_onnx(name, exporter, tmp_path):
    pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    from onnx_export import export, run

    stock, accelerated = pair(name)
    first, second = batches(name)
    exported = export(accelerated, first, tmp_path, exporter)
    for batch in (first, second):
        torch.testing.assert_close(run(exported, batch), stock(*batch), **TOLERANCE)


BLOCKS = {  # those that torch.fx and TorchScript take for themselves of the originals
    "bert": ["model.encoder.layer.0.attention.output", "model.encoder.layer.0.output"],
    "distilbert": ["model.embeddings"],
}


@pytest.mark.parametrize("model, block", [(model, block) for model, blocks in BLOCKS.items() for block in blocks])
@torch.no_grad()
def test_blocks_scripted_and_by_fx(model, block):
    stock, accelerated = (each.get_submodule(block) for each in pair(model))
    if block.endswith("embeddings"):
        arguments, ways = (torch.randint(2, 100, (3, 9)),), [torch.jit.script]
    else:
        arguments = torch.randn(3, 9, stock.dense.in_features), torch.randn(3, 9, 32)
        ways = [torch.jit.script, torch.fx.symbolic_trace]
    for way in ways:
        torch.testing.assert_close(way(accelerated)(*arguments), stock(*arguments), **TOLERANCE)
    assert type(accelerated).__module__.startswith("resnorm_ext.")


@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor, torch.quantize_per_channel:UserWarning")
@every_model
@torch.no_grad()
def test_dynamic_quantization(name):
    quantization = pytest.importorskip("torch.ao.quantization")
    stock, accelerated = pair(name)
    quantized, ours = (quantization.quantize_dynamic(model, {nn.Linear}) for model in (stock, accelerated))
    for batch in batches(name):
        torch.testing.assert_close(ours(*batch), quantized(*batch), **TOLERANCE)
        assert name == "gpt2" or not torch.equal(quantized(*batch), stock(*batch))  # whose layers are no nn.Linear
