# SPDX-License-Identifier: BSD-3-Clause
from __future__ import annotations

import pytest
import torch
from torch import nn

import resnorm_ext.modules as rn

BATCH, LENGTH, DIM, HEADS = 3, 5, 8, 2
TOLERANCE = {"rtol": 1e-9, "atol": 1e-11}  # float64 sums of a few dozen terms near 1, in two orders


def make_pair(**options):
    reference = nn.MultiheadAttention(DIM, HEADS, dtype=torch.float64, **options)
    for parameter in reference.parameters():
        nn.init.normal_(parameter, std=0.5)
    ours = rn.SelfAttention(DIM, HEADS, dtype=torch.float64, **options)
    ours.load_state_dict(reference.state_dict(), strict=True)
    return reference, ours


def make_masks(kind):
    hidden = (torch.rand(LENGTH, LENGTH) < 0.4) & ~torch.eye(LENGTH, dtype=torch.bool)
    padding = torch.tensor([[0, 0, 0, 1, 1], [1, 0, 0, 0, 0], [0, 0, 0, 0, 0]], dtype=torch.bool)
    bias = torch.randn(LENGTH, LENGTH, dtype=torch.float64).masked_fill(hidden, -torch.inf)
    return {
        "none": {},
        "padding": {"key_padding_mask": padding},
        "mask": {"attn_mask": hidden},
        "mask and padding": {
            "attn_mask": hidden & ~hidden.t(),
            "key_padding_mask": padding & (torch.arange(LENGTH) > 3),
        },
        "float mask and padding": {
            "attn_mask": bias,
            "key_padding_mask": torch.randn(BATCH, LENGTH, dtype=torch.float64),
        },
        "mask per head": {"attn_mask": bias + torch.randn(BATCH * HEADS, 1, 1, dtype=torch.float64)},
        "causal": {"attn_mask": torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1), "is_causal": True},
    }[kind]


@pytest.mark.parametrize("weights", ["no weights", "mean weights", "weights"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("batch_first", [True, False], ids=["batch first", "length first"])
@pytest.mark.parametrize(
    "masks", ["none", "padding", "mask", "mask and padding", "float mask and padding", "mask per head", "causal"]
)
def test_forward_and_gradients(masks, batch_first, bias, weights):
    reference, ours = make_pair(batch_first=batch_first, bias=bias)
    arguments = make_masks(masks)
    arguments |= {"need_weights": weights != "no weights", "average_attn_weights": weights == "mean weights"}
    src = torch.randn(BATCH, LENGTH, DIM, dtype=torch.float64)
    src = src if batch_first else src.transpose(0, 1).contiguous()
    results = []
    for attention in (reference, ours):
        x = src.clone().requires_grad_()
        output = attention(x, x, x, **arguments)
        loss = sum(
            (part * torch.cos(torch.arange(part.numel()).view_as(part))).sum() for part in output if part is not None
        )
        loss.backward()
        results.append((*output, x.grad, [parameter.grad for parameter in attention.parameters()]))
    torch.testing.assert_close(results[1], results[0], **TOLERANCE)


@pytest.mark.parametrize("need_weights", [True, False], ids=["weights", "no weights"])
def test_unbatched(need_weights):
    reference, ours = make_pair()
    x = torch.randn(LENGTH, DIM, dtype=torch.float64)
    arguments = {"key_padding_mask": torch.tensor([0, 0, 1, 0, 1], dtype=torch.bool), "need_weights": need_weights}
    torch.testing.assert_close(ours(x, x, x, **arguments), reference(x, x, x, **arguments), **TOLERANCE)


def test_key_and_value_may_be_left_out_and_causal_needs_no_mask():
    reference, ours = make_pair(batch_first=True)
    x = torch.randn(BATCH, LENGTH, DIM, dtype=torch.float64)
    mask = torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1)
    torch.testing.assert_close(ours(x), reference(x, x, x), **TOLERANCE)
    torch.testing.assert_close(ours(x, is_causal=True), reference(x, x, x, attn_mask=mask), **TOLERANCE)


@pytest.mark.parametrize(
    "options",
    [{"add_bias_kv": True}, {"add_zero_attn": True}, {"kdim": DIM, "vdim": DIM}, {"kdim": 6, "vdim": 7}],
    ids=str,
)
def test_what_is_not_plain_self_attention_is_torch_nn(options):
    reference, ours = make_pair(batch_first=True, **options)
    query = torch.randn(BATCH, LENGTH, DIM, dtype=torch.float64)
    key = torch.randn(BATCH, LENGTH, options.get("kdim", DIM), dtype=torch.float64)
    value = torch.randn(BATCH, LENGTH, options.get("vdim", DIM), dtype=torch.float64)
    torch.testing.assert_close(ours(query, key, value), reference(query, key, value), **TOLERANCE)


@pytest.mark.parametrize("need_weights", [True, False], ids=["weights", "no weights"])
def test_query_whose_keys_are_all_hidden(need_weights):
    _, ours = make_pair(batch_first=True)
    x = torch.randn(BATCH, LENGTH, DIM, dtype=torch.float64, requires_grad=True)
    padding = torch.zeros(BATCH, LENGTH, dtype=torch.bool)
    padding[1] = True
    output, weights = ours(x, x, x, key_padding_mask=padding, need_weights=need_weights)
    torch.testing.assert_close(output[1], ours.out_proj.bias.expand(LENGTH, DIM), **TOLERANCE)
    if need_weights:
        assert torch.equal(weights[1], torch.zeros(LENGTH, LENGTH, dtype=torch.float64))
    output.sum().backward()
    assert x.grad.isfinite().all()
    assert not x.grad[1].any()


def test_dropout_of_the_weights():
    """Over many draws, the output's mean and variance are those of torch.nn's."""
    reference, ours = make_pair(batch_first=True, dropout=0.4)
    x = torch.randn(1, LENGTH, DIM, dtype=torch.float64).expand(20000, -1, -1)
    for need_weights in (False, True):
        with torch.no_grad():
            expected, output = (a.train()(x, x, x, need_weights=need_weights)[0] for a in (reference, ours))
        deviation = expected.std(0)
        # The difference of two means of n draws deviates by sqrt(2 / n) = 0.01 deviations; five of those.
        assert ((output.mean(0) - expected.mean(0)).abs() <= 0.05 * deviation).all()
        torch.testing.assert_close(output.std(0), deviation, rtol=0.06, atol=0)


def test_bad_arguments_raise_as_in_torch_nn():
    with pytest.raises(AssertionError, match="divisible"):
        rn.SelfAttention(10, 3)
    reference, ours = make_pair(batch_first=True)
    x = torch.randn(BATCH, LENGTH, DIM, dtype=torch.float64)
    for arguments in (
        {"key_padding_mask": torch.zeros(BATCH, LENGTH + 1, dtype=torch.bool)},
        {"key_padding_mask": torch.zeros(BATCH, LENGTH, dtype=torch.int32)},
        {"attn_mask": torch.zeros(LENGTH, LENGTH - 1, dtype=torch.bool)},
        {"attn_mask": torch.zeros(BATCH, LENGTH, LENGTH, dtype=torch.bool)},
        {"attn_mask": torch.zeros(LENGTH, LENGTH, dtype=torch.uint8)},
    ):
        with pytest.raises(Exception) as expected:
            reference(x, x, x, **arguments)
        with pytest.raises(expected.type, match=r"expected.*got"):
            ours(x, x, x, **arguments)
