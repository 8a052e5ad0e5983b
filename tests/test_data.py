# SPDX-License-Identifier: BSD-3-Clause
from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from resnorm_ext.data import TokenBudgetSampler, pack_sequences
from resnorm_ext.modules import TransformerEncoder, TransformerEncoderLayer

LENGTHS = torch.randint(1, 60, (500,), generator=torch.Generator().manual_seed(0)).tolist()


def test_every_sequence_once_within_the_budget():
    sampler = TokenBudgetSampler(LENGTHS, 256)
    batches = list(sampler)
    assert sorted(index for batch in batches for index in batch) == list(range(500))
    assert len(sampler) == len(batches)
    tokens = [sum(LENGTHS[index] for index in batch) for batch in batches]
    assert max(tokens) <= 256 and sum(tokens) / len(tokens) > 0.8 * 256


def test_lengths_within_a_batch_are_alike():
    def padding(window: int) -> float:
        batches = [[LENGTHS[i] for i in batch] for batch in TokenBudgetSampler(LENGTHS, 256, window=window)]
        return sum(len(batch) * max(batch) for batch in batches) / sum(LENGTHS)

    assert padding(500) < 1.1 < padding(10) < 2


def test_epochs_differ_and_repeat():
    sampler, other = TokenBudgetSampler(LENGTHS, 256, seed=3), TokenBudgetSampler(LENGTHS, 256, seed=3)
    first = list(sampler)
    assert first == list(other) == list(sampler)
    sampler.set_epoch(1)
    assert list(sampler) != first
    sampler.set_epoch(0)
    assert list(sampler) == first
    assert list(TokenBudgetSampler(LENGTHS, 256, seed=4)) != first


def test_without_shuffle_windows_follow_one_another():
    batches = list(TokenBudgetSampler(LENGTHS, 256, window=50, shuffle=False))
    order = [index // 50 for batch in batches for index in batch]
    assert order == sorted(order)


def test_processes_share_the_batches_alike():
    everything = list(TokenBudgetSampler(LENGTHS, 256))
    shares = [list(TokenBudgetSampler(LENGTHS, 256, num_replicas=3, rank=rank)) for rank in range(3)]
    assert {len(share) for share in shares} == {len(everything) // 3}
    assert [batch for step in zip(*shares, strict=True) for batch in step] == everything[: len(everything) // 3 * 3]


def test_a_sequence_beyond_the_budget_is_a_batch_alone():
    assert list(TokenBudgetSampler([3, 500, 4], 8, shuffle=False)) == [[0, 2], [1]]
    assert list(TokenBudgetSampler([], 8)) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_tokens": 0}, "max_tokens >= 1, but got 0"),
        ({"max_tokens": 5, "window": 0}, "window >= 1, but got 0"),
        ({"max_tokens": 5, "num_replicas": 2, "rank": 2}, "from 0 to 1, but got 2"),
        ({"max_tokens": 5, "num_replicas": 0}, "but got 0"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        TokenBudgetSampler([1, 2], **arguments)
    with pytest.raises(ValueError, match="none"):
        pack_sequences([])


def test_fewer_batches_than_processes():
    with pytest.raises(ValueError, match=r"expected 3 batches or more.*: 1 came"):
        len(TokenBudgetSampler([1, 2], 5, num_replicas=3, rank=0))


def test_a_loader_trains_an_encoder():
    """Packed batches give the loss, and the gradients, of the same sequences one by one."""
    torch.manual_seed(0)
    sequences = [torch.randn(length, 16) for length in LENGTHS[:40]]
    encoder = TransformerEncoder(TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True), 2)
    sampler = TokenBudgetSampler([len(each) for each in sequences], 128)
    for batch in DataLoader(sequences, batch_sampler=sampler, collate_fn=pack_sequences):
        encoder(batch.tokens, cu_seqlens=batch.cu_seqlens, max_seqlen=batch.max_seqlen).square().sum().backward()
    packed = [parameter.grad.clone() for parameter in encoder.parameters()]
    encoder.zero_grad()
    original = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True), 2)
    original.load_state_dict(encoder.state_dict())
    for sequence in sequences:
        original(sequence.unsqueeze(0)).square().sum().backward()
    for ours, theirs in zip(packed, original.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs.grad, rtol=1e-4, atol=1e-3)
