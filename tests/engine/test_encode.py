# SPDX-License-Identifier: BSD-3-Clause
from __future__ import annotations

import threading
import time

import pytest
import torch
from torch import nn

from resnorm_ext.build.extension import ensure_loaded, extension
from resnorm_ext.engine import encode

from .linear_cases import BACKENDS

DIM, HEADS, HIDDEN = 16, 2, 24
LENGTHS = (3, 1, 0, 70, 5)


@pytest.fixture(autouse=True)
def inference():
    ensure_loaded()
    torch.manual_seed(0)
    with torch.no_grad():
        yield


def torch_layers(count: int, *, norm_first: bool = False) -> list[nn.TransformerEncoderLayer]:
    options = {"activation": "gelu", "batch_first": True, "norm_first": norm_first}
    layers = [nn.TransformerEncoderLayer(DIM, HEADS, HIDDEN, **options) for _ in range(count)]
    for parameter in (parameter for layer in layers for parameter in layer.parameters()):
        parameter.normal_()
    return layers


def parameters_of(layer: nn.TransformerEncoderLayer) -> list[torch.Tensor]:
    attention, parts = layer.self_attn, (layer.norm1, layer.linear1, layer.linear2, layer.norm2)
    parameters = [attention.in_proj_weight, attention.in_proj_bias, *attention.out_proj.parameters()]
    return parameters + [parameter for part in parts for parameter in part.parameters()]


def prepared(parameters: list[torch.Tensor]) -> extension.LayerWeights:
    options = {"products": torch.float32, "stream": torch.float32}
    return extension.prepare_layer(parameters, DIM // HEADS, (DIM / HEADS) ** -0.5, 1e-5, 1e-5, "gelu", **options)


def weights_of(layer: nn.TransformerEncoderLayer) -> extension.LayerWeights:
    return prepared(parameters_of(layer))


def reference(layers, tokens: torch.Tensor, lengths) -> torch.Tensor:
    """torch.nn's layers in float64, sequence by sequence."""
    outputs = []
    for x in tokens.double().split(list(lengths)):
        for layer in layers:
            x = layer.double().train(False)(x[None], src_mask=torch.zeros(len(x), len(x)).double())[0] if len(x) else x
        outputs.append(x)
    return torch.cat(outputs)


@pytest.mark.parametrize("max_rows", [8, 2048])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("lengths", [LENGTHS, (0, 0), (), (64,)])
@pytest.mark.parametrize("norm_first", [False, True])
def test_encode(monkeypatch, norm_first, lengths, backend, max_rows):
    if backend not in extension.linear_backends(torch.float32):
        pytest.skip("this PyTorch has no oneDNN linear")
    for shape in ((DIM, 3 * DIM), (DIM, DIM), (DIM, HIDDEN), (HIDDEN, DIM)):
        extension.set_linear_backend(torch.float32, *shape, backend)
    monkeypatch.setattr(extension, "MAX_ROWS", max_rows)
    layers = torch_layers(3, norm_first=norm_first)
    tokens = torch.randn(sum(lengths), DIM)
    before = tokens.clone()
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    output = encode.encode(tokens, cu_seqlens, [weights_of(layer) for layer in layers], norm_first=norm_first)
    assert torch.equal(tokens, before)
    expected = reference(layers, tokens, lengths) if lengths else tokens.double()
    torch.testing.assert_close(output.double(), expected, rtol=1e-4, atol=1e-4)


def test_other_threads_run_meanwhile():
    """The whole of a call is one stretch without the interpreter's lock."""
    layers = [weights_of(layer) for layer in torch_layers(1)] * 200
    tokens, cu_seqlens = torch.randn(512, DIM), torch.tensor([0, 512], dtype=torch.int32)
    times = []

    def run() -> None:
        with torch.no_grad():
            times.append(time.perf_counter())
            encode.encode(tokens, cu_seqlens, layers)
            times.append(time.perf_counter())

    thread, seen = threading.Thread(target=run), []
    thread.start()
    while thread.is_alive():
        seen.append(time.perf_counter())
    begin, end = times
    within = [moment for moment in seen if 0.2 < (moment - begin) / (end - begin) < 0.8]
    assert len(within) > 10


@pytest.mark.parametrize("norm_first", [False, True])
def test_a_negative_bit_is_resolved(norm_first):
    layers = [weights_of(layer) for layer in torch_layers(2)]
    tokens, cu_seqlens = torch.randn(5, DIM), torch.tensor([0, 2, 5], dtype=torch.int32)
    expected = encode.encode(-tokens, cu_seqlens, layers, norm_first=norm_first)
    assert torch.equal(encode.encode(torch._neg_view(tokens), cu_seqlens, layers, norm_first=norm_first), expected)


def attend(qkv: torch.Tensor) -> torch.Tensor:
    return qkv[:, 2].flatten(1)


def test_a_layer_whose_attention_is_the_callers():
    (layer,), x = (weights_of(each) for each in torch_layers(1)), torch.randn(5, DIM)
    expected = encode.pre_norm_layer(-x, layer, lambda qkv: -attend(qkv))
    assert torch.equal(
        encode.pre_norm_layer(torch._neg_view(x), layer, lambda qkv: torch._neg_view(attend(qkv))), expected
    )


def test_no_gradient_is_lost_in_silence():
    (layer,), x = (weights_of(each) for each in torch_layers(1)), torch.randn(5, DIM, requires_grad=True)
    cu_seqlens = torch.tensor([0, 5], dtype=torch.int32)
    encode.encode(x, cu_seqlens, [layer])
    with torch.enable_grad():
        for call in (
            lambda: encode.encode(x, cu_seqlens, [layer]),
            lambda: encode.pre_norm_layer(x, layer, attend),
            lambda: encode.pre_norm_layer(x.detach(), layer, lambda qkv: attend(qkv) * x.sum()),
        ):
            with pytest.raises(RuntimeError, match="that requires no grad"):
                call()


def test_products_keep_their_dtype_under_autocast():
    (layer,), x = (weights_of(each) for each in torch_layers(1)), torch.randn(5, DIM)
    expected = encode.pre_norm_layer(x, layer, attend)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(encode.pre_norm_layer(x, layer, attend), expected)


def test_what_does_not_fit_is_refused():
    (original,) = torch_layers(1)
    layer, parameters = weights_of(original), parameters_of(original)
    tokens, cu_seqlens = torch.randn(5, DIM), torch.tensor([0, 2, 5], dtype=torch.int32)
    wrong = prepared([*parameters[:2], torch.randn(DIM - 1, DIM), None, *parameters[4:]])
    for arguments, error, message in (
        ((tokens, cu_seqlens, [wrong]), RuntimeError, "Expected a linear layer of 16 output features, but got .* 15"),
        ((tokens, cu_seqlens, []), RuntimeError, "Expected layers"),
        ((tokens, cu_seqlens.long(), [layer]), RuntimeError, "cu_seqlens of dtype"),
        ((tokens, cu_seqlens[:0], [layer]), RuntimeError, "cu_seqlens of shape"),
        ((tokens, cu_seqlens[:2], [layer]), ValueError, "from 0 to the number of tokens, 5"),
    ):
        with pytest.raises(error, match=message):
            encode.encode(*arguments)


def test_parameters_that_make_no_layer_are_refused():
    (layer,) = torch_layers(1)
    parameters = parameters_of(layer)
    for wrong, message in (
        (parameters[:11], "Expected 12 or 16 parameters of a layer, but got 11"),
        ([None, *parameters[1:]], "Expected weights of all linear layers, but got None"),
        ([torch.randn(3 * DIM - 1, DIM), None, *parameters[2:]], "whole heads of 8 features, but got 47 features"),
    ):
        with pytest.raises(RuntimeError, match=message):
            prepared(wrong)
