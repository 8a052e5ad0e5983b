# SPDX-License-Identifier: BSD-3-Clause
"""TransformerEncoder and its layer compute what torch.nn's do: every combination of options, forward and gradients."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import resnorm_ext.modules as rn

BATCH, LENGTH, DIM, HEADS = 3, 5, 8, 2
# Two orders of summation of float64 sums of a few dozen terms near 1.
TOLERANCE = {"rtol": 1e-9, "atol": 1e-11}

ACTIVATIONS = {"relu": "relu", "gelu": "gelu", "callable": F.silu}
PADDINGS = {
    "no padding": None,
    "left-aligned": [[0, 0, 0, 1, 1], [0, 0, 0, 0, 0], [0, 1, 1, 1, 1]],
    "not aligned": [[1, 0, 0, 0, 1], [0, 0, 1, 0, 0], [1, 1, 1, 1, 0]],
}
MASKS = ["no mask", "causal bool", "causal float", "bool", "float"]


def make_pair(norm_first, activation, batch_first, dropout=0.0, num_layers=2, dtype=torch.float64, norm=True):
    """torch.nn's encoder with random norms and biases, and ours with the same parameters."""
    options = {"batch_first": batch_first, "norm_first": norm_first, "dtype": dtype}
    layer = nn.TransformerEncoderLayer(DIM, HEADS, 12, dropout, activation, **options)
    final = nn.LayerNorm(DIM, dtype=dtype) if norm else None
    reference = nn.TransformerEncoder(layer, num_layers, final, enable_nested_tensor=False)
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    ours_layer = rn.TransformerEncoderLayer(DIM, HEADS, 12, dropout, activation, **options)
    ours = rn.TransformerEncoder(ours_layer, num_layers, rn.LayerNorm(DIM, dtype=dtype) if norm else None)
    ours.load_state_dict(reference.state_dict(), strict=True)
    return reference, ours


def make_mask(kind, length=LENGTH):
    later = torch.ones(length, length, dtype=torch.bool).triu(1)
    some = (torch.rand(length, length) < 0.4) & ~torch.eye(length, dtype=torch.bool)
    return {
        "no mask": None,
        "causal bool": later,
        "causal float": torch.zeros(length, length, dtype=torch.float64).masked_fill(later, -torch.inf),
        "bool": some,
        "float": torch.randn(length, length, dtype=torch.float64).masked_fill(some, -torch.inf),
    }[kind]


def make_padding(kind, like):
    """Of ``like``'s kind, bool or float: torch.nn warns where they differ."""
    if PADDINGS[kind] is None:
        return None
    padding = torch.tensor(PADDINGS[kind], dtype=torch.bool)
    if like is not None and like.is_floating_point():
        return torch.zeros(padding.shape, dtype=like.dtype).masked_fill(padding, -torch.inf)
    return padding


@pytest.mark.parametrize("padding_kind", PADDINGS)
@pytest.mark.parametrize("mask_kind", MASKS)
@pytest.mark.parametrize("batch_first", [True, False], ids=["batch first", "length first"])
@pytest.mark.parametrize("activation", ACTIVATIONS.values(), ids=ACTIVATIONS.keys())
@pytest.mark.parametrize("norm_first", [False, True], ids=["post-norm", "pre-norm"])
class TestParity:
    @pytest.fixture
    def case(self, norm_first, activation, batch_first, mask_kind, padding_kind):
        reference, ours = make_pair(norm_first, activation, batch_first)
        mask = make_mask(mask_kind)
        padding = make_padding(padding_kind, mask)
        shape = (BATCH, LENGTH, DIM) if batch_first else (LENGTH, BATCH, DIM)
        return reference, ours, torch.randn(shape, dtype=torch.float64), mask, padding

    def test_train(self, case):
        reference, ours, src, mask, padding = case
        grad_output = torch.randn_like(src)
        results = []
        for encoder in (reference.train(), ours.train()):
            x = src.clone().requires_grad_()
            output = encoder(x, mask, padding)
            output.backward(grad_output)
            results.append((output, x.grad, {name: p.grad for name, p in encoder.named_parameters()}))
        torch.testing.assert_close(results[1], results[0], **TOLERANCE)

    def test_inference(self, case):
        reference, ours, src, mask, padding = case
        given = [t if t is None else t.clone() for t in (src, mask, padding)]
        with torch.no_grad():
            expected, output = reference.eval()(src, mask, padding), ours.eval()(*given)
        torch.testing.assert_close(output, expected, **TOLERANCE)
        assert output.is_contiguous()
        for before, after in zip((src, mask, padding), given, strict=True):
            assert before is None or torch.equal(before, after), "an argument was written"


@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no grad"])
@pytest.mark.parametrize("mask_kind", MASKS)
@pytest.mark.parametrize("norm_first", [False, True], ids=["post-norm", "pre-norm"])
def test_lone_layer(norm_first, mask_kind, grad):
    reference, ours = (encoder.layers[0] for encoder in make_pair(norm_first, "gelu", batch_first=True))
    src, mask = torch.randn(BATCH, LENGTH, DIM, dtype=torch.float64), make_mask(mask_kind)
    padding = make_padding("not aligned", mask)
    with torch.set_grad_enabled(grad):
        expected = reference(src, mask, padding)
        output = ours(src, mask, padding)
    torch.testing.assert_close(output, expected, **TOLERANCE)


@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no grad"])
@pytest.mark.parametrize("padded", [False, True], ids=["no padding", "padding"])
@pytest.mark.parametrize("batch_first", [True, False], ids=["batch first", "length first"])
@pytest.mark.parametrize("per_head", [False, True], ids=["one mask", "a mask per head"])
def test_unbatched(batch_first, padded, per_head, grad):
    reference, ours = make_pair(False, "relu", batch_first)
    src = torch.randn(LENGTH, DIM, dtype=torch.float64)
    padding = torch.tensor([0, 0, 1, 0, 1], dtype=torch.bool) if padded else None
    mask = torch.stack([make_mask("bool") for _ in range(HEADS)]) if per_head else None
    with torch.set_grad_enabled(grad):
        expected, output = reference(src, mask, padding), ours(src, mask, padding)
    torch.testing.assert_close(output, expected, **TOLERANCE)


@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no grad"])
@pytest.mark.parametrize("dtype", [torch.bool, torch.float64], ids=str)
def test_mask_per_head(dtype, grad):
    reference, ours = make_pair(False, "gelu", batch_first=True)
    src = torch.randn(BATCH, LENGTH, DIM, dtype=torch.float64)
    kind = "bool" if dtype == torch.bool else "float"
    mask = torch.stack([make_mask(kind) for _ in range(BATCH * HEADS)])
    padding = make_padding("left-aligned", mask)
    with torch.set_grad_enabled(grad):
        expected, output = reference(src, mask, padding), ours(src, mask, padding)
    real = ~torch.tensor(PADDINGS["left-aligned"], dtype=torch.bool)
    torch.testing.assert_close(output[real], expected[real], **TOLERANCE)


@pytest.mark.parametrize(
    "options", [{"bias": False}, {"layer_norm_eps": 0.3}, {"activation": nn.GELU("tanh")}], ids=str
)
@pytest.mark.parametrize("norm_first", [False, True], ids=["post-norm", "pre-norm"])
def test_options_of_the_layer(norm_first, options):
    torch.manual_seed(1)
    reference = nn.TransformerEncoderLayer(DIM, HEADS, 12, 0.0, norm_first=norm_first, dtype=torch.float64, **options)
    torch.manual_seed(1)
    ours = rn.TransformerEncoderLayer(DIM, HEADS, 12, 0.0, norm_first=norm_first, dtype=torch.float64, **options)
    torch.testing.assert_close(ours.state_dict(), reference.state_dict(), rtol=0, atol=0)  # the same initialisation
    src = torch.randn(LENGTH, BATCH, DIM, dtype=torch.float64)
    torch.testing.assert_close(ours(src), reference(src), **TOLERANCE)
    with torch.no_grad():
        torch.testing.assert_close(ours(src), reference(src), **TOLERANCE)


def test_layers_may_differ():
    """Pre-norm after post-norm and the other way round, other widths, no final norm."""
    layers = [
        nn.TransformerEncoderLayer(DIM, 2, 12, 0.0, "relu", 1e-5, True, norm_first=True, dtype=torch.float64),
        nn.TransformerEncoderLayer(DIM, 4, 20, 0.0, "gelu", 1e-3, True, norm_first=False, dtype=torch.float64),
        nn.TransformerEncoderLayer(DIM, 1, 16, 0.0, "gelu", 1e-5, True, norm_first=True, dtype=torch.float64),
        nn.TransformerEncoderLayer(DIM, 2, 16, 0.0, "gelu", 1e-4, True, norm_first=True, dtype=torch.float64),
    ]
    reference = nn.TransformerEncoder(layers[0], len(layers), enable_nested_tensor=False)
    reference.layers = nn.ModuleList(layers)
    ours = rn.TransformerEncoder(layers[0], len(layers))
    ours.layers = copy.deepcopy(reference.layers)
    src = torch.randn(BATCH, LENGTH, DIM, dtype=torch.float64)
    torch.testing.assert_close(ours(src), reference(src), **TOLERANCE)
    with torch.no_grad():
        torch.testing.assert_close(ours(src), reference(src), **TOLERANCE)


@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no grad"])
@pytest.mark.parametrize("norm_first", [False, True], ids=["post-norm", "pre-norm"])
def test_bfloat16_is_as_accurate_as_torch_nn(norm_first, grad):
    """Root-mean-square error against float64: bfloat16 rounds at other places in ours, not more often."""
    reference, ours = make_pair(norm_first, "gelu", batch_first=True)
    src = torch.randn(BATCH, LENGTH, DIM, dtype=torch.float64)
    padding = make_padding("left-aligned", None)
    exact = reference.bfloat16().double()(src.bfloat16().double(), src_key_padding_mask=padding)
    reference, ours = reference.bfloat16(), ours.bfloat16()
    with torch.set_grad_enabled(grad):
        outputs = [encoder(src.bfloat16(), src_key_padding_mask=padding) for encoder in (reference, ours)]
    assert outputs[1].dtype == torch.bfloat16
    errors = [(output - exact)[~padding].square().mean().sqrt() for output in outputs]
    assert errors[1] <= 1.5 * errors[0]


@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no grad"])
@pytest.mark.parametrize("norm_first", [False, True], ids=["post-norm", "pre-norm"])
def test_autocast_gives_the_dtype_and_the_accuracy_of_torch_nn(norm_first, grad):
    reference, ours = make_pair(norm_first, "gelu", batch_first=True, dtype=torch.float32)
    src, padding = torch.randn(BATCH, LENGTH, DIM), make_padding("left-aligned", None)
    exact = reference(src, src_key_padding_mask=padding)
    with torch.set_grad_enabled(grad), torch.autocast("cpu", torch.bfloat16):
        outputs = [encoder(src, src_key_padding_mask=padding) for encoder in (reference, ours)]
    assert outputs[1].dtype == outputs[0].dtype
    errors = [(output - exact)[~padding].square().mean().sqrt() for output in outputs]
    assert errors[1] <= 1.5 * errors[0]


@pytest.mark.parametrize("norm_first", [False, True], ids=["post-norm", "pre-norm"])
def test_state_dict_goes_both_ways(norm_first):
    reference, ours = make_pair(norm_first, "relu", batch_first=True)
    assert list(ours.state_dict()) == list(reference.state_dict())
    back = nn.TransformerEncoder(reference.layers[0], 2, nn.LayerNorm(DIM, dtype=torch.float64), False)
    back.load_state_dict(ours.state_dict(), strict=True)
    src = torch.randn(BATCH, LENGTH, DIM, dtype=torch.float64)
    torch.testing.assert_close(back(src), reference(src), rtol=0, atol=0)


@pytest.mark.parametrize(
    "copy_of", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"]
)
def test_copies_compute_the_same_and_share_nothing(copy_of):
    _, ours = make_pair(False, "gelu", batch_first=True)
    src, padding = torch.randn(BATCH, LENGTH, DIM, dtype=torch.float64), make_padding("not aligned", None)
    with torch.no_grad():
        expected = ours(src, src_key_padding_mask=padding)
        duplicate = copy_of(ours)
        assert type(duplicate) is type(ours)
        assert torch.equal(duplicate(src, src_key_padding_mask=padding), expected)
        for parameter in duplicate.parameters():
            parameter.zero_()
        assert torch.equal(ours(src, src_key_padding_mask=padding), expected)


def test_a_layer_of_torch_nn_becomes_ours_in_the_encoder_only():
    layer = nn.TransformerEncoderLayer(DIM, HEADS, 12)
    encoder = rn.TransformerEncoder(layer, 2)
    assert [type(layer) for layer in encoder.layers] == [rn.TransformerEncoderLayer] * 2
    assert type(layer) is nn.TransformerEncoderLayer


def test_constructor_raises_as_torch_nn_does():
    for module in (nn, rn):
        with pytest.raises(AssertionError, match="divisible"):
            module.TransformerEncoderLayer(10, 3)
        with pytest.raises(ValueError, match="greater than 0"):
            module.TransformerEncoderLayer(10, 0)
        with pytest.raises(RuntimeError, match="tanh"):
            module.TransformerEncoderLayer(8, 2, activation="tanh")
        with pytest.raises(ValueError, match="between 0 and 1"):
            module.TransformerEncoderLayer(8, 2, dropout=1.5)


def bad_arguments():
    src = torch.randn(BATCH, LENGTH, DIM)
    return {
        "padding of wrong length": (src, None, torch.zeros(BATCH, LENGTH + 1, dtype=torch.bool)),
        "padding of wrong batch": (src, None, torch.zeros(BATCH + 1, LENGTH, dtype=torch.bool)),
        "padding of wrong rank": (src, None, torch.zeros(LENGTH, dtype=torch.bool)),
        "integer padding": (src, None, torch.zeros(BATCH, LENGTH, dtype=torch.int64)),
        "mask of wrong size": (src, torch.zeros(LENGTH, LENGTH + 1, dtype=torch.bool), None),
        "mask of wrong heads": (src, torch.zeros(BATCH, LENGTH, LENGTH, dtype=torch.bool), None),
        "mask of wrong rank": (src, torch.zeros(LENGTH, dtype=torch.bool), None),
        "integer mask": (src, torch.zeros(LENGTH, LENGTH, dtype=torch.int64), None),
        "unbatched mask of wrong heads": (src[0], torch.zeros(HEADS + 1, LENGTH, LENGTH, dtype=torch.bool), None),
        "unbatched padding of wrong rank": (src[0], None, torch.zeros(1, LENGTH, dtype=torch.bool)),
        "input of wrong rank": (src.unsqueeze(0), None, None),
        "input of wrong dimension": (src[..., :-1], None, None),
    }


@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no grad"])
@pytest.mark.parametrize("kind", bad_arguments())
def test_bad_arguments_raise_as_in_torch_nn(kind, grad):
    arguments = bad_arguments()[kind]
    reference, ours = make_pair(False, "relu", batch_first=True, dtype=torch.float32)
    with torch.set_grad_enabled(grad):
        with pytest.raises(Exception) as expected:
            reference(*arguments)
        with pytest.raises(expected.type, match=r"expected.*got"):
            ours(*arguments)
        with pytest.raises(expected.type):
            ours.layers[0](*arguments)


@pytest.mark.parametrize("shape", [(0, LENGTH, DIM), (BATCH, 0, DIM)], ids=str)
def test_empty_batches(shape):
    _, ours = make_pair(False, "relu", batch_first=True)
    src = torch.randn(shape, dtype=torch.float64)
    with torch.no_grad():
        assert ours(src).shape == shape
        assert ours(src, src_key_padding_mask=torch.ones(shape[:2], dtype=torch.bool)).shape == shape
