# SPDX-License-Identifier: BSD-3-Clause
"""Which path a call takes, decided anew each time, and that all of them compute the same."""

from __future__ import annotations

import logging
import threading

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

import resnorm_ext.modules as rn

BATCH, LENGTH, DIM, HEADS = 3, 6, 8, 2
TOLERANCE = {"rtol": 1e-9, "atol": 1e-11}  # float64 sums of a few dozen terms near 1, in two orders
PADDING = torch.tensor([[0, 0, 0, 0, 1, 1], [1, 0, 1, 0, 0, 0], [0, 1, 1, 1, 1, 1]], dtype=torch.bool)


@pytest.fixture(params=["post-norm", "pre-norm"])
def encoder(request):
    layer = rn.TransformerEncoderLayer(
        DIM, HEADS, 12, activation="gelu", batch_first=True, norm_first=request.param == "pre-norm", dtype=torch.float64
    )
    encoder = rn.TransformerEncoder(layer, 2, rn.LayerNorm(DIM, dtype=torch.float64)).eval()
    for parameter in encoder.parameters():
        nn.init.normal_(parameter, std=0.5)
    return encoder


@pytest.fixture
def src():
    return torch.randn(BATCH, LENGTH, DIM, dtype=torch.float64)


@pytest.fixture
def path(caplog):
    """``path(module, *arguments)``: what the call logs for itself but for a reason, and its output."""

    def call(module, *arguments, **keywords):
        caplog.clear()
        with caplog.at_level(logging.DEBUG, "resnorm_ext"):
            output = module(*arguments, **keywords)
        return caplog.messages[0].partition(": ")[2].partition(", because")[0], output

    return call


def reference_of(encoder):
    """torch.nn's encoder on the same parameters."""
    first = encoder.layers[0]
    layer = nn.TransformerEncoderLayer(
        DIM, HEADS, 12, 0.0, first.activation, first.norm1.eps, True, first.norm_first, dtype=torch.float64
    )
    reference = nn.TransformerEncoder(layer, 2, nn.LayerNorm(DIM, dtype=torch.float64), enable_nested_tensor=False)
    reference.load_state_dict(encoder.state_dict())
    return reference


def test_packed_only_where_something_is_hidden(encoder, src, path):
    later = torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1)
    assert path(encoder, src, None, PADDING)[0] == "padded"
    encoder.padding = encoder.layers[0].padding = "skip"
    assert path(encoder, src, None, PADDING)[0] == "packed"
    with torch.no_grad():
        assert path(encoder, src, None, PADDING)[0] == "packed"
        assert path(encoder, src, later, PADDING)[0] == "packed"
        assert path(encoder.layers[0], src, None, PADDING)[0] == "packed"
        assert path(encoder, src)[0] == "padded"
        assert path(encoder, src, None, torch.zeros_like(PADDING))[0] == "padded"
        assert path(encoder, src, later.t(), PADDING)[0] == "padded"
        assert path(encoder, src, None, torch.randn(BATCH, LENGTH, dtype=torch.float64))[0] == "padded"
        assert path(encoder, src, later.double().masked_fill(later, -torch.inf), PADDING.double() * -9)[0] == "padded"


class Scaled(nn.Module):
    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, x):
        return 2.0 * self.module(x)


def twice(module, arguments, output):
    return 2.0 * output


class Double(nn.Module):
    def forward(self, weight):
        return 2.0 * weight


CHANGES = {
    "forward hook on linear1": lambda e: e.layers[0].linear1.register_forward_hook(twice),
    "forward hook on dropout1": lambda e: e.layers[1].dropout1.register_forward_hook(twice),
    "forward pre-hook on norm2": lambda e: e.layers[0].norm2.register_forward_pre_hook(lambda m, x: (x[0].sin(),)),
    "forward hook on self_attn": lambda e: e.layers[0].self_attn.register_forward_hook(
        lambda m, a, o: (2 * o[0], o[1])
    ),
    "forward hook on a layer": lambda e: e.layers[0].register_forward_hook(twice),
    "forward hook on the norm": lambda e: e.norm.register_forward_hook(twice),
    "adapter around linear2": lambda e: setattr(e.layers[1], "linear2", Scaled(e.layers[1].linear2)),
    "another norm": lambda e: setattr(e.layers[0], "norm1", nn.RMSNorm(DIM, dtype=torch.float64)),
    "another final norm": lambda e: setattr(e, "norm", Scaled(e.norm)),
    "parametrized linear1": lambda e: parametrize.register_parametrization(e.layers[0].linear1, "weight", Double()),
    "parametrized in_proj": lambda e: parametrize.register_parametrization(
        e.layers[0].self_attn, "in_proj_weight", Double()
    ),
    "parametrized out_proj": lambda e: parametrize.register_parametrization(
        e.layers[0].self_attn.out_proj, "weight", Double()
    ),
    "forward of the instance": lambda e: setattr(
        e.layers[0].linear2, "forward", lambda x: x.repeat(1, 1, 2)[..., :DIM]
    ),
}


@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no grad"])
@pytest.mark.parametrize("kind", CHANGES)
def test_changed_part_takes_effect_at_the_next_call(encoder, src, path, kind, grad):
    """The same change to torch.nn's encoder gives the same result."""
    reference = reference_of(encoder)
    with torch.set_grad_enabled(grad):
        before = encoder(src, None, PADDING)
        CHANGES[kind](encoder)
        CHANGES[kind](reference)
        name, output = path(encoder, src, None, PADDING)
        expected = reference(src, None, PADDING)
    assert name == "by modules"
    torch.testing.assert_close(output, expected, **TOLERANCE)
    assert not torch.allclose(output[~PADDING], before[~PADDING])


def test_removed_hook_brings_the_fused_path_back(encoder, src, path):
    encoder.padding = "skip"
    with torch.no_grad():
        handle = encoder.layers[0].linear1.register_forward_hook(twice)
        assert path(encoder, src, None, PADDING)[0] == "by modules"
        handle.remove()
        assert path(encoder, src, None, PADDING)[0] == "packed"


def test_hooks_see_what_torch_nn_shows_them(encoder, src):
    shapes = []

    def record(module, arguments, output):
        shapes.append((tuple(arguments[0].shape), tuple(output.shape)))

    for model in (reference_of(encoder), encoder):
        model.layers[1].linear1.register_forward_hook(record)
        with torch.no_grad():
            model(src, None, PADDING)
    assert shapes[0] == shapes[1] == ((BATCH, LENGTH, DIM), (BATCH, LENGTH, 12))


def test_global_hook_sees_every_module(encoder, src):
    called = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: called.append(type(module)))
    try:
        with torch.no_grad():
            encoder(src, None, PADDING)
    finally:
        handle.remove()
    assert called.count(nn.Linear) == 4
    assert called.count(rn.TransformerEncoderLayer) == 2


def test_overridden_block_is_called(src):
    class Layer(rn.TransformerEncoderLayer):
        def _ff_block(self, x):
            return torch.zeros_like(x)

    layer = Layer(DIM, HEADS, 12, batch_first=True, dtype=torch.float64).eval()
    with torch.no_grad():
        x = layer.norm1(src + layer._sa_block(src, None, None))
        torch.testing.assert_close(layer(src), layer.norm2(x), **TOLERANCE)


def test_layers_of_torch_nn_run_fused_too(encoder, src, path):
    reference = reference_of(encoder)
    expected = reference(src, None, PADDING)
    encoder.layers, encoder.padding = reference.layers, "skip"
    with torch.no_grad():
        name, output = path(encoder, src, None, PADDING)
    assert name == "packed"
    torch.testing.assert_close(output[~PADDING], expected[~PADDING], **TOLERANCE)


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("change", [None, "adapter around linear2"], ids=["fused", "by modules"])
@pytest.mark.parametrize("batch_first", [True, False], ids=["batch first", "length first"])
def test_packed_input_forward_and_gradients(encoder, change, causal, batch_first):
    """``cu_seqlens`` gives each sequence what it gets alone, and the gradients of that."""
    if change:
        CHANGES[change](encoder)
    seqlens = [4, 1, 0, 6]
    tokens = torch.randn(sum(seqlens), DIM, dtype=torch.float64)
    grad_output = torch.randn_like(tokens)

    def gradients(x, output):
        return torch.autograd.grad(output, [x, *encoder.parameters()], grad_output)

    alone = tokens.clone().requires_grad_()
    expected = torch.cat([encoder(x, is_causal=causal) for x in alone.split(seqlens) if len(x)])
    expected_grads = gradients(alone, expected)

    for layer in encoder.layers:
        layer.self_attn.batch_first = batch_first
    cu_seqlens = torch.tensor([0, *seqlens]).cumsum(0, dtype=torch.int32)
    for max_seqlen in (None, 6):
        packed = tokens.clone().requires_grad_()
        output = encoder(packed, cu_seqlens=cu_seqlens, max_seqlen=max_seqlen, is_causal=causal)
        torch.testing.assert_close(output, expected, **TOLERANCE)
        torch.testing.assert_close(gradients(packed, output), expected_grads, **TOLERANCE)
    with torch.no_grad():
        torch.testing.assert_close(encoder(tokens, cu_seqlens=cu_seqlens, is_causal=causal), expected, **TOLERANCE)
        assert torch.equal(tokens, packed), "the input was written"


def test_packed_input_with_a_mask_is_an_error(encoder):
    tokens, cu_seqlens = torch.randn(4, DIM, dtype=torch.float64), torch.tensor([0, 4], dtype=torch.int32)
    with pytest.raises(ValueError, match="cu_seqlens or masks"):
        encoder(tokens, torch.zeros(4, 4, dtype=torch.bool), cu_seqlens=cu_seqlens)
    with pytest.raises(ValueError, match="cu_seqlens or masks"):
        encoder.layers[0](tokens, src_key_padding_mask=torch.zeros(4, dtype=torch.bool), cu_seqlens=cu_seqlens)


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # torch's, for attention under vmap
def test_vmap_takes_the_padded_path(encoder, src):
    """Under torch.func no value may be read; a batch of batches gives what a loop over them gives."""
    batches, paddings = torch.stack([src, src.flip(0)]), torch.stack([PADDING, PADDING.flip(1)])
    with torch.no_grad():
        expected = torch.stack([encoder(x, None, padding) for x, padding in zip(batches, paddings, strict=True)])
        output = torch.func.vmap(lambda x, padding: encoder(x, None, padding))(batches, paddings)
    torch.testing.assert_close(output, expected, **TOLERANCE)


def test_outputs_of_many_calls_stay_what_they_were(encoder):
    """Ten different calls from two threads at once: no output shares memory with a later one or with an input."""
    inputs = [torch.randn(BATCH, LENGTH, DIM, dtype=torch.float64) for _ in range(10)]
    paddings = [None if i % 3 == 0 else torch.rand(BATCH, LENGTH) < 0.1 * i for i in range(10)]
    with torch.no_grad():
        expected = [encoder(x, None, padding).clone() for x, padding in zip(inputs, paddings, strict=True)]
    copies = [x.clone() for x in inputs]
    outputs = {}

    def work(thread):
        with torch.no_grad():
            for i in range(10):
                i = i if thread == 0 else 9 - i
                outputs[thread, i] = encoder(inputs[i], None, paddings[i])

    threads = [threading.Thread(target=work, args=(thread,)) for thread in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(outputs) == 20
    for (_, i), output in outputs.items():
        assert torch.equal(output, expected[i])
    for x, before in zip(inputs, copies, strict=True):
        assert torch.equal(x, before)


def test_gradients_in_frozen_and_checkpointed_encoders(encoder, src):
    from torch.utils.checkpoint import checkpoint

    src.requires_grad_()
    expected = torch.autograd.grad(encoder(src, None, PADDING).sum(), [src])
    output = checkpoint(encoder, src, None, PADDING, use_reentrant=False)
    torch.testing.assert_close(torch.autograd.grad(output.sum(), [src]), expected, rtol=0, atol=0)
    encoder.requires_grad_(False)
    torch.testing.assert_close(torch.autograd.grad(encoder(src, None, PADDING).sum(), [src]), expected, rtol=0, atol=0)


class TestActivationsThatAreNotKnown:
    """They see the batch as torch.nn shows it to them."""

    @pytest.mark.parametrize(
        "activation", [nn.Softmax(dim=1), lambda x: torch.softmax(x, dim=2)], ids=["dim 1", "dim 2"]
    )
    def test_padding_is_computed(self, encoder, src, path, activation):
        for layer in encoder.layers:
            layer.activation = activation
        with torch.no_grad():
            taken, output = path(encoder, src, None, PADDING)
            expected = reference_of(encoder).eval()(src, None, PADDING)
        assert taken == "padded"
        torch.testing.assert_close(output[~PADDING], expected[~PADDING], **TOLERANCE)

    def test_hooks(self, encoder, src):
        shapes = []
        for layer in encoder.layers:
            layer.activation = nn.GELU()
        encoder.layers[0].activation.register_forward_hook(lambda module, args, output: shapes.append(output.shape))
        with torch.no_grad():
            encoder(src, None, PADDING)
        assert shapes == [(BATCH, LENGTH, 12)]


@pytest.mark.parametrize("block", ["_sa_block", "_ff_block"])
def test_overridden_blocks_are_called(encoder, src, block):
    for name in ("encoder", "reference"):
        module = encoder if name == "encoder" else reference_of(encoder).eval()
        for layer in module.layers:
            setattr(layer, block, lambda x, *args, **kwargs: 2 * x)
        output = module(src)
        if name == "encoder":
            ours = output
    torch.testing.assert_close(ours, output, **TOLERANCE)


@pytest.mark.parametrize(
    ("bounds", "max_seqlen", "error", "message"),
    [
        ([0, 4, 5], 3, ValueError, "no sequence longer than max_seqlen, 3"),
        ([0, 2, 9], None, ValueError, "number of tokens, 5"),
        ([1, 5], None, ValueError, "from 1 to 5"),
        ([0, -1, 5], None, ValueError, "ascend"),
        ([0, 4, 3, 5], None, ValueError, "ascend"),
        ([[0, 5]], None, RuntimeError, "of shape"),
        ([], None, RuntimeError, "of shape"),
    ],
)
@pytest.mark.parametrize("way", ["fused", "attention dropout", "by modules"])
def test_bounds_of_packed_sequences_are_checked(encoder, way, bounds, max_seqlen, error, message):
    if way == "attention dropout":
        encoder.train()
    if way == "by modules":
        encoder.layers[0].linear1.register_forward_hook(lambda *_: None)
    tokens = torch.randn(5, DIM, dtype=torch.float64)
    with pytest.raises(error, match=message):
        encoder(tokens, cu_seqlens=torch.tensor(bounds, dtype=torch.int32), max_seqlen=max_seqlen)
    with pytest.raises(RuntimeError, match="cu_seqlens of dtype"):
        encoder(tokens, cu_seqlens=torch.tensor([0, 5]))


def test_a_float_mask_of_another_dtype(encoder, src):
    mask = torch.zeros(BATCH, LENGTH, dtype=torch.float16).masked_fill_(PADDING, -torch.inf)
    for values in (mask, mask * 0):
        expected = encoder(src, None, values.nan_to_num(neginf=-torch.inf).double())
        torch.testing.assert_close(encoder(src, None, values.nan_to_num(neginf=-torch.inf)), expected)
