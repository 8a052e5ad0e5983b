# SPDX-License-Identifier: BSD-3-Clause
from __future__ import annotations

import pytest
import torch

from resnorm_ext.engine import pack, packing_of, packing_of_sequences, unpack

MASKS = {
    "left-aligned": [[1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 1, 1]],
    "right-aligned": [[0, 1, 1, 1], [0, 0, 0, 1], [1, 1, 1, 1]],
    "scattered": [[1, 0, 1, 1], [0, 1, 0, 1], [0, 1, 1, 0]],
    "an empty sequence": [[1, 1, 0, 0], [0, 0, 0, 0], [0, 1, 1, 1]],
    "nothing but padding": [[0, 0, 0, 0], [0, 0, 0, 0]],
    "no padding": [[1, 1], [1, 1]],
}


@pytest.fixture(params=MASKS.values(), ids=MASKS.keys())
def mask(request):
    return torch.tensor(request.param, dtype=torch.bool)


def test_packing_describes_the_mask(mask):
    packing = packing_of(mask)
    seqlens = mask.sum(1).tolist()
    assert packing.cu_seqlens.dtype == torch.int32
    assert packing.cu_seqlens.tolist() == [sum(seqlens[:i]) for i in range(len(seqlens) + 1)]
    assert packing.indices.tolist() == [i for i, real in enumerate(mask.flatten().tolist()) if real]
    assert packing[2:] == (mask.size(0), mask.size(1), max(seqlens))
    assert torch.equal(packing.padding(), ~mask)


@pytest.mark.parametrize("shape", [(), (3,), (2, 3)], ids=str)
def test_pack_keeps_the_real_tokens_in_order_and_unpack_puts_zeros_elsewhere(mask, shape):
    x = torch.randn(*mask.shape, *shape)
    packing = packing_of(mask)
    tokens = pack(x, packing)
    assert torch.equal(tokens, x[mask])
    assert torch.equal(unpack(tokens, packing), torch.where(mask.view(*mask.shape, *[1] * len(shape)), x, 0.0))


def test_pack_takes_any_strides_and_leaves_the_mask_alone():
    x = torch.randn(4, 3, 5).transpose(0, 1)
    mask = torch.tensor(MASKS["scattered"], dtype=torch.bool).t().contiguous().t()
    before = mask.clone()
    assert torch.equal(pack(x, packing_of(mask)), x[mask])
    assert torch.equal(mask, before)


def test_pack_and_unpack_are_differentiable(mask):
    packing = packing_of(mask)
    x = torch.randn(*mask.shape, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: unpack(pack(x, packing) ** 2, packing), (x,))


def test_sequences_pad_to_the_left_aligned_batch():
    cu_seqlens = torch.tensor([0, 3, 3, 4, 8], dtype=torch.int32)
    expected = packing_of(torch.arange(4) < cu_seqlens.diff().unsqueeze(1))
    packing = packing_of_sequences(cu_seqlens, 8)
    assert torch.equal(packing.indices, expected.indices)
    assert packing[2:] == expected[2:]
    tokens = torch.randn(8, 2)
    wider = packing_of_sequences(cu_seqlens, 8, max_seqlen=6)
    assert wider.length == 6
    assert torch.equal(unpack(tokens, wider)[:, :4], unpack(tokens, packing))
    assert torch.equal(pack(unpack(tokens, wider), wider), tokens)


@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (0, 0)], ids=str)
def test_empty_batches(shape):
    packing = packing_of(torch.ones(shape, dtype=torch.bool))
    assert packing.max_seqlen == 0
    assert packing.cu_seqlens.tolist() == [0] * (shape[0] + 1)
    assert unpack(pack(torch.randn(*shape, 2), packing), packing).shape == (*shape, 2)


def test_masks_of_wrong_kind_raise():
    with pytest.raises(TypeError, match="int64"):
        packing_of(torch.ones(2, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match="1-D"):
        packing_of(torch.ones(3, dtype=torch.bool))
