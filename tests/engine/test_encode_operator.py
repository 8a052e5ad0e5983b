# SPDX-License-Identifier: BSD-3-Clause
"""torch.ops.resnorm.encode: a padded batch through a stack of layers in one call, against torch.nn's in float64."""

from __future__ import annotations

import copy
import ctypes
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import nn

import resnorm_ext
from resnorm_ext.build.extension import extension

from .encode_cases import (
    DIM,
    HEADS,
    HIDDEN,
    MASKS,
    PADDINGS,
    assert_close,
    case,
    computes_padding,
    encode,
    mask_of,
    parameters_of,
    reference,
    torch_layers,
)

pytestmark = pytest.mark.usefixtures("fresh")


VARIANTS = {
    "post-norm": {},
    "pre-norm": {"norm_first": True},
    "causal": {"causal": True},
    "pre-norm, causal": {"norm_first": True, "causal": True},
    "separate": {"separate": True},
    "no biases": {"bias": False},
    "no biases, separate": {"bias": False, "separate": True},
    "relu": {"activation": "relu"},
    "gelu_tanh": {"activation": "gelu_tanh", "norm_first": True},
    "float64": {"dtype": torch.float64},
    "float64, pre-norm, separate": {"dtype": torch.float64, "norm_first": True, "separate": True},
    "bfloat16": {"dtype": torch.bfloat16},
    "float16": {"dtype": torch.float16, "norm_first": True},
    "bfloat16, float32 norms": {"dtype": torch.bfloat16, "norm_first": True, "norms": torch.float32},
    "float16, float32 norms": {"dtype": torch.float16, "norms": torch.float32, "separate": True},
    "non-contiguous": {"transposed": True},
}


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("name", VARIANTS)
def test_encode(name, mask, grad):
    """With grad, of the formula that is recorded."""
    variant, mask = dict(VARIANTS[name]), mask_of(mask)
    dtype, norms = variant.pop("dtype", torch.float32), variant.pop("norms", None)
    separate, causal, transposed = (variant.pop(name, False) for name in ("separate", "causal", "transposed"))
    layers = torch_layers(**variant).to(dtype)
    for layer in layers if norms else ():
        layer.norm1.to(norms), layer.norm2.to(norms)
    x = torch.randn(5, 3, DIM).to(dtype).transpose(0, 1) if transposed else torch.randn(3, 5, DIM).to(dtype)
    variant = {each: variant[each] for each in variant if each != "bias"} | {"causal": causal}
    before = x.clone()
    for padding in PADDINGS:
        with torch.set_grad_enabled(grad):
            output = encode(x, mask, parameters_of(layers, separate=separate), padding=padding, **variant)
        expected = reference(x, mask, layers, causal=causal, padding=padding)
        assert output.dtype == dtype and output.is_contiguous() and output.requires_grad == grad
        assert_close(output, expected, dtype)
        if mask is not None and not computes_padding(mask.tolist(), padding):
            assert not output[~mask].any()
    assert torch.equal(x, before)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (0, 0)])
@pytest.mark.parametrize("padding", PADDINGS)
def test_empty(padding, shape, grad):
    _, parameters, _ = case()
    x = torch.randn(*shape, DIM, requires_grad=grad)
    for mask in (None, torch.ones(shape, dtype=torch.bool)):
        assert encode(x, mask, parameters, padding=padding).shape == x.shape


def test_all_of_a_batch_hidden():
    layers, parameters, x = case()
    mask = torch.zeros(3, 5, dtype=torch.bool)
    for padding in PADDINGS:
        assert_close(encode(x, mask, parameters, padding=padding), reference(x, mask, layers, padding=padding))


def test_heads_pruned_in_one_layer():
    """What is left of it gives what all heads give where the output's weights of the pruned one are zero."""
    layers, parameters, x = case()
    kept = slice(DIM // HEADS, DIM)
    pruned = list(parameters)
    pruned[0], pruned[1] = (each.unflatten(0, (3, DIM))[:, kept].flatten(0, 1) for each in parameters[:2])
    pruned[2] = parameters[2][:, kept]
    layers[0].self_attn.out_proj.weight.data[:, : DIM // HEADS] = 0
    mask = mask_of("right")
    assert_close(encode(x, mask, pruned), reference(x, mask, layers, padding="skip"))


def change_in_place(weight, change, layer):
    weight.copy_(change(weight))


def change_data(weight, change, layer):
    weight.data[1, 1:] = change(weight)[1, 1:]


def change_parameter(weight, change, layer):
    layer.linear1.weight = nn.Parameter(change(weight))


def change_state(weight, change, layer):
    layer.load_state_dict({name: change(each) for name, each in layer.state_dict().items()})


def change_behind_torch(weight, change, layer):
    weight.numpy(force=True)[1, 1] += 2  # not one of the values that are looked at
    resnorm_ext.refresh(layer)


@pytest.mark.parametrize("backend", ["aten", "resnorm"])
@pytest.mark.parametrize("separate", [False, True])
@pytest.mark.parametrize("write", [change_in_place, change_data, change_parameter, change_state, change_behind_torch])
@torch.no_grad()
def test_changed_weights_take_effect(write, separate, backend):
    layers, _, x = case()
    mask = mask_of("right")
    encode(x, mask, parameters_of(layers))  # which measures, or it would choose another backend
    for shape in ((DIM, 3 * DIM), (DIM, DIM), (DIM, HIDDEN), (HIDDEN, DIM)):
        extension.set_linear_backend(torch.float32, *shape, backend)
    extension.clear_layer_cache()
    before = encode(x, mask, parameters_of(layers, separate=separate))
    for _ in range(2):
        write(layers[1].linear1.weight, lambda each: each * 1.5, layers[1])
        for _ in range(2):
            after = encode(x, mask, parameters_of(layers, separate=separate))
            assert_close(after, reference(x, mask, layers, padding="skip"))
        assert not torch.allclose(after, before, rtol=1e-3, atol=1e-3)
        before = after


def test_the_same_parameters_in_other_places():
    """A bias of the attention's output, of its norm, or that norm's weight."""
    layers, parameters, x = case(count=1, bias=False)
    mask, vector, outputs = mask_of("right"), torch.randn(DIM), []
    for place, module, name in ((3, "self_attn.out_proj", "bias"), (4, "norm1", "weight"), (5, "norm1", "bias")):
        changed, layer = list(parameters), copy.deepcopy(layers)
        changed[4] = None
        changed[place] = vector
        nn.init.ones_(layer[0].norm1.weight)
        layer[0].get_submodule(module).register_parameter(name, nn.Parameter(vector))
        outputs.append((encode(x, mask, changed, 1), reference(x, mask, layer, padding="skip")))
    for output, expected in outputs:
        assert_close(output, expected)


@pytest.mark.parametrize("norm_first", [False, True])
def test_two_models_in_turns_and_in_two_threads(norm_first):
    models = [case(norm_first=norm_first) for _ in range(2)]
    masks = [mask_of(name) for name in ("right", "holes", "none")]
    expected = [[reference(x, mask, layers, padding="skip") for mask in masks] for layers, _, x in models]

    def run(first: int) -> None:
        for i in range(200):
            _, parameters, x = models[(first + i) % 2]
            mask = i % len(masks)
            output = encode(x, masks[mask], parameters, norm_first=norm_first)
            assert_close(output, expected[(first + i) % 2][mask])
            if first and i % 20 == 10:
                extension.clear_layer_cache()

    run(0)
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(run, (0, 1)))


def resident_memory() -> int:
    """In bytes, without what is freed: the allocator would hand that out again, and nothing would seem to grow."""
    ctypes.CDLL(None).malloc_trim(0)
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


@pytest.mark.parametrize("other_is_kept", [False, True])
def test_copies_go_with_the_parameters(other_is_kept):
    """At the next call with others, whether these are kept already or not."""
    options = {"head_dim": 64, "scale": 0.125}
    x, (_, others, _) = torch.randn(1, 2, 1024), case()

    def big() -> list:
        return parameters_of(torch_layers(1, dim=1024, hidden=8192, dtype=torch.float32).requires_grad_(False))

    encode(x, None, big(), 1, **options)  # which measures
    for shape in ((1024, 3072), (1024, 1024), (1024, 8192), (8192, 1024)):
        extension.set_linear_backend(torch.float32, *shape, "resnorm")
    extension.clear_layer_cache()
    if other_is_kept:
        encode(torch.randn(1, 2, DIM), None, others)
    before, parameters = resident_memory(), big()
    size = sum(each.nbytes for each in parameters)
    encode(x, None, parameters, 1, **options)
    assert resident_memory() - before > 1.5 * size
    parameters = None
    assert resident_memory() - before > 0.6 * size
    encode(torch.randn(1, 2, DIM), None, others)
    assert resident_memory() - before < 0.4 * size
