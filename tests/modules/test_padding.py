# SPDX-License-Identifier: BSD-3-Clause
"""What is left at padded positions: what torch.nn leaves there, unless somebody has chosen otherwise."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

import resnorm_ext.modules as rn
from resnorm_ext.integrations import accelerate, restore

BATCH, LENGTH, DIM, HEADS = 3, 9, 32, 4
LEFT_ALIGNED = torch.tensor([[0] * 9, [0] * 4 + [1] * 5, [0] * 2 + [1] * 7], dtype=torch.bool)
NOT_ALIGNED = torch.tensor([[0] * 9, [1] * 5 + [0] * 4, [0, 1, 0, 1, 1, 0, 0, 0, 1]], dtype=torch.bool)


def build(norm_first=False, num_heads=HEADS, activation="gelu", bias=True, norm=False, batch_first=True, **encoder):
    layer = nn.TransformerEncoderLayer(
        DIM, num_heads, 64, 0.1, activation, batch_first=batch_first, norm_first=norm_first, bias=bias
    )
    final = nn.LayerNorm(DIM) if norm else None
    model = nn.TransformerEncoder(layer, 2, final, **encoder).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return model


def call(model, src, padding, grad=False, **masks):
    with torch.set_grad_enabled(grad):
        return model(src, src_key_padding_mask=padding, **masks).detach()


@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True")
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
class TestAsTorch:
    """With torch.nn's fast path on, its nested tensors decide."""

    @pytest.fixture(autouse=True)
    def fast_path(self, torch_nn_without_its_fast_path):
        torch.backends.mha.set_fastpath_enabled(True)

    @pytest.mark.parametrize("grad", ["no grad", "grad", "grad, nothing requires it"])
    @pytest.mark.parametrize("padding", [LEFT_ALIGNED, NOT_ALIGNED], ids=["left-aligned", "not aligned"])
    @pytest.mark.parametrize(
        "options",
        [
            {},
            {"norm": True},
            {"activation": "relu"},
            {"norm_first": True},
            {"num_heads": 1},
            {"activation": nn.SiLU()},
            {"bias": False},
            {"batch_first": False},
            {"enable_nested_tensor": False},
        ],
        ids=str,
    )
    def test_every_position(self, options, padding, grad):
        model = build(**options)
        accelerated = accelerate(copy.deepcopy(model))
        if grad == "grad, nothing requires it":
            for each in (model, accelerated):
                each.requires_grad_(False)
        src = torch.randn((BATCH, LENGTH, DIM) if options.get("batch_first", True) else (LENGTH, BATCH, DIM))
        expected = call(model, src, padding, grad != "no grad")
        torch.testing.assert_close(call(accelerated, src, padding, grad != "no grad"), expected, rtol=2e-4, atol=2e-4)

    def test_the_package_s_own_encoder_is_no_different(self):
        model = build(norm=True)
        layer = rn.TransformerEncoderLayer(DIM, HEADS, 64, activation="gelu", batch_first=True)
        own = rn.TransformerEncoder(layer, 2, rn.LayerNorm(DIM)).eval()
        own.load_state_dict(model.state_dict())
        src = torch.randn(BATCH, LENGTH, DIM)
        for padding in (LEFT_ALIGNED, NOT_ALIGNED):
            expected = call(model, src, padding)
            torch.testing.assert_close(call(own, src, padding), expected, rtol=2e-4, atol=2e-4)

    @pytest.mark.parametrize("change", ["a mask besides", "fast path off", "training"])
    def test_what_keeps_torch_from_it(self, change):
        model = build()
        accelerated, src, masks = accelerate(copy.deepcopy(model)), torch.randn(BATCH, LENGTH, DIM), {}
        if change == "a mask besides":
            masks["mask"] = torch.rand(LENGTH, LENGTH) < 0.3
            masks["mask"].fill_diagonal_(False)
        elif change == "fast path off":
            torch.backends.mha.set_fastpath_enabled(False)
        else:
            for each in (model, accelerated):
                each.layers[0].training = True
        expected, actual = call(model, src, LEFT_ALIGNED, **masks), call(accelerated, src, LEFT_ALIGNED, **masks)
        torch.testing.assert_close(actual, expected, rtol=2e-4, atol=2e-4)
        assert actual[LEFT_ALIGNED].abs().max() > 0.1

    def test_hooks_do_not_change_what_is_left_there(self):
        """Where a part has a hook the parts are called one by one."""
        model = build(norm=True)
        accelerated, src = accelerate(copy.deepcopy(model)), torch.randn(BATCH, LENGTH, DIM)
        accelerated.layers[0].register_forward_hook(lambda *_: None)
        actual = call(accelerated, src, LEFT_ALIGNED)
        torch.testing.assert_close(actual, call(model, src, LEFT_ALIGNED), rtol=2e-4, atol=2e-4)

    def test_a_lone_layer(self):
        layer = build().layers[0]
        accelerated, src = accelerate(copy.deepcopy(layer)), torch.randn(BATCH, LENGTH, DIM)
        torch.testing.assert_close(
            call(accelerated, src, LEFT_ALIGNED), call(layer, src, LEFT_ALIGNED), rtol=2e-4, atol=2e-4
        )


class Between(nn.Module):
    """A convolution between layers, which reads what stands at padded positions."""

    def __init__(self, norm_first):
        super().__init__()
        options = {"batch_first": True, "dropout": 0.0, "norm_first": norm_first}
        self.first, self.last = (nn.TransformerEncoderLayer(DIM, HEADS, 64, **options) for _ in range(2))
        self.conv = nn.Conv1d(DIM, DIM, 3, padding=1)

    def forward(self, x, padding):
        x = self.first(x, src_key_padding_mask=padding)
        x = x + self.conv(x.transpose(1, 2)).transpose(1, 2)
        return self.last(x, src_key_padding_mask=padding)[~padding]


class Pooled(nn.Module):
    """A mean and a maximum over all positions, padded ones too."""

    def __init__(self, norm_first):
        super().__init__()
        self.encoder = build(norm_first, enable_nested_tensor=False)

    def forward(self, x, padding):
        x = self.encoder(x, src_key_padding_mask=padding)
        return torch.cat([x.mean(1), x.amax(1)], 1)


class Memory(nn.Module):
    """A decoder that attends to all of the encoder's output."""

    def __init__(self, norm_first):
        super().__init__()
        self.encoder = build(norm_first, enable_nested_tensor=False)
        self.decoder = nn.TransformerDecoderLayer(DIM, HEADS, 64, 0.0, batch_first=True)

    def forward(self, x, padding):
        return self.decoder(x[:, :2], self.encoder(x, src_key_padding_mask=padding))


class Hooked(nn.Module):
    """A hook on a layer that mixes neighbours."""

    def __init__(self, norm_first):
        super().__init__()
        self.encoder = build(norm_first, enable_nested_tensor=False)
        self.encoder.layers[0].register_forward_hook(lambda module, args, output: output + output.roll(1, 1))

    def forward(self, x, padding):
        return self.encoder(x, src_key_padding_mask=padding)[~padding]


@pytest.mark.parametrize("grad", [False, True], ids=["no grad", "grad"])
@pytest.mark.parametrize("padding", [LEFT_ALIGNED, NOT_ALIGNED], ids=["left-aligned", "not aligned"])
@pytest.mark.parametrize("norm_first", [False, True], ids=["post-norm", "pre-norm"])
@pytest.mark.parametrize("kind", [Between, Pooled, Memory, Hooked])
def test_what_reads_padded_positions(kind, norm_first, padding, grad):
    model = kind(norm_first).eval()
    accelerated, src = accelerate(copy.deepcopy(model)), torch.randn(BATCH, LENGTH, DIM)
    with torch.set_grad_enabled(grad):
        torch.testing.assert_close(accelerated(src, padding), model(src, padding), rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("grad", [False, True], ids=["no grad", "grad"])
@pytest.mark.parametrize("norm_first", [False, True], ids=["post-norm", "pre-norm"])
@pytest.mark.parametrize("part", ["encoder", "layer"])
class TestChoice:
    def modules(self, part, norm_first):
        model = build(norm_first, norm=True)
        return model if part == "encoder" else model.layers[0]

    def test_skip(self, part, norm_first, grad):
        model = self.modules(part, norm_first)
        accelerated, src = accelerate(copy.deepcopy(model), padding="skip"), torch.randn(BATCH, LENGTH, DIM)
        expected, actual = (call(each, src, NOT_ALIGNED, grad) for each in (model, accelerated))
        torch.testing.assert_close(actual[~NOT_ALIGNED], expected[~NOT_ALIGNED], rtol=2e-4, atol=2e-4)
        left = model.norm.bias if part == "encoder" else torch.zeros(DIM)
        assert torch.equal(actual[NOT_ALIGNED], left.expand(int(NOT_ALIGNED.sum()), -1))

    def test_compute(self, part, norm_first, grad):
        model = self.modules(part, norm_first)
        accelerated, src = accelerate(copy.deepcopy(model), padding="compute"), torch.randn(BATCH, LENGTH, DIM)
        expected, actual = (call(each, src, LEFT_ALIGNED, grad) for each in (model, accelerated))
        torch.testing.assert_close(actual, expected, rtol=2e-4, atol=2e-4)

    def test_skipped_training_has_the_same_gradients(self, part, norm_first, grad):
        """For a loss that reads real positions alone."""
        model = self.modules(part, norm_first)
        accelerated, src = accelerate(copy.deepcopy(model), padding="skip"), torch.randn(BATCH, LENGTH, DIM)
        grads = []
        for each in (model, accelerated):
            x = src.clone().requires_grad_()
            each(x, src_key_padding_mask=NOT_ALIGNED)[~NOT_ALIGNED].square().sum().backward()
            grads.append([x.grad, *(parameter.grad for parameter in each.parameters())])
        torch.testing.assert_close(grads[1], grads[0], rtol=2e-4, atol=2e-4)

    def test_it_stays_in_copies_and_goes_with_restore(self, part, norm_first, grad):
        accelerated = accelerate(self.modules(part, norm_first), padding="skip")
        for twin in (copy.deepcopy(accelerated), pickle.loads(pickle.dumps(accelerated))):
            assert twin.padding == "skip"
        assert accelerate(accelerated).padding == "auto"
        accelerate(accelerated, padding="compute")
        assert not any(key.startswith("_resnorm") for key in vars(restore(accelerated)))


@pytest.mark.parametrize("padding", ["none", "SKIP", None, True])
def test_what_is_no_choice_is_refused_before_anything_is_changed(padding):
    model = build()
    with pytest.raises(ValueError, match="expected padding to be one of 'auto', 'skip', 'compute', but got"):
        accelerate(model, padding=padding)
    assert type(model) is nn.TransformerEncoder
    layer = rn.TransformerEncoderLayer(DIM, HEADS, 64)
    with pytest.raises(ValueError, match="expected padding to be one of"):
        layer.padding = padding
    assert layer.padding == "auto"
