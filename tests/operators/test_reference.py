# SPDX-License-Identifier: BSD-3-Clause
"""The oracle itself, against what others publish or compute."""

from __future__ import annotations

import pytest
import torch

from resnorm_ext import reference

from .cases import TORCH_ACTIVATIONS

# Known answers of Philox-4x32-10 from Random123, the package of its authors (Salmon et al. 2011). Its upper two counter
# words are zero here, so only the vectors with that counter apply.
PHILOX_KNOWN_ANSWER = (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("normalized_shape", [(7,), (3, 7), (1,)])
def test_layer_norm_is_torchs(affine, normalized_shape):
    input = torch.randn(4, 3, 7, dtype=torch.float64)[..., : normalized_shape[-1]] * 3 + 5
    parameters = [torch.randn(normalized_shape, dtype=torch.float64) if affine else None for _ in range(2)]
    expected = torch.nn.functional.layer_norm(input, normalized_shape, *parameters, eps=1e-3)
    torch.testing.assert_close(reference.layer_norm(input, normalized_shape, *parameters, eps=1e-3), expected)


@pytest.mark.parametrize("activation", TORCH_ACTIVATIONS)
def test_activations_are_torchs(activation):
    input, bias = torch.randn(50, 7, dtype=torch.float64) * 4, torch.randn(7, dtype=torch.float64)
    expected = TORCH_ACTIVATIONS[activation](input + bias)
    torch.testing.assert_close(reference.bias_activation(input, bias, activation), expected)
    with pytest.raises(ValueError, match="gelu_tanh, but got elu"):
        reference.bias_activation(input, bias, "elu")


@pytest.mark.smoke
def test_philox_known_answer():
    words = reference.philox_4x32_10(torch.tensor([0]), torch.tensor(0))
    assert tuple(int(word) for word in words) == PHILOX_KNOWN_ANSWER


def test_philox_takes_all_bits_of_counter_and_key():
    """Against the definition in plain Python integers, with both words of counter and key in use."""
    for counter, key in [(0x0123_4567_89AB_CDEF, 0x7EDC_BA98_7654_3210), (2**62 + 5, -3), (7, -(2**63))]:
        words = reference.philox_4x32_10(torch.tensor([counter]), torch.tensor(key))
        assert tuple(int(word) for word in words) == philox_by_definition(counter, key % 2**64)


def philox_by_definition(counter: int, key: int) -> tuple[int, ...]:
    c = [counter % 2**32, counter >> 32, 0, 0]
    k = [key % 2**32, key >> 32]
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(p1 >> 32) ^ c[1] ^ k[0], p1 % 2**32, (p0 >> 32) ^ c[3] ^ k[1], p0 % 2**32]
        k = [(k[0] + 0x9E3779B9) % 2**32, (k[1] + 0xBB67AE85) % 2**32]
    return tuple(c)


def test_draws_are_the_half_words_low_half_first():
    """Element e takes half-word e mod 8; at p = t / 65536 it is kept where that draw is at least t."""
    halves = [half for word in PHILOX_KNOWN_ANSWER for half in (word & 0xFFFF, word >> 16)]
    for threshold in (1, 0x6627, 0x6628, 0xAC4C, 0xE169, 65535):
        keep = reference.dropout_keep_mask(torch.tensor(0), (2, 4), threshold / 65536)
        assert keep.flatten().tolist() == [half >= threshold for half in halves]


@pytest.mark.parametrize(
    ("p", "threshold"),
    [(0, 0), (1e-6, 0), (7.7e-6, 1), (0.1, 6554), (0.5, 32768), (0.99999, 65535), (0.999995, 65536), (1, 65536)],
)
def test_dropout_threshold_and_exact_expectation(p, threshold):
    assert reference.dropout_threshold(p) == threshold
    if threshold < 65536:
        assert (1 - threshold / 65536) * reference.dropout_scale(p) == pytest.approx(1, rel=1e-7)


def test_dropout_rate():
    keep = reference.dropout_keep_mask(torch.tensor(99), (300, 1000), 0.3)
    assert keep.double().mean().item() == pytest.approx(0.7, abs=5 * (0.21 / 3e5) ** 0.5)
