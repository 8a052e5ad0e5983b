# SPDX-License-Identifier: BSD-3-Clause
"""Where these tests compute, how tensors get there and back, and the sizes that need a plan of each kind."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from operators.cases import SEED, Case, Inputs, require_grad
from torch import Tensor
from torch.utils._pytree import tree_map_only

DEVICE = torch.device("cuda")
AWAY = torch.device("cpu")  # where a tensor is a mistake

# Lengths of rows that part of a warp holds, a warp, a block, clusters of 2, 4 and 8 blocks, and none; float32 rows, for
# half-precision ones take half the threads. In each kind one that is no multiple of a vector.
COLUMNS_OF_PART_OF_A_WARP = (7, 32, 61, 128, 133, 256)
COLUMNS_OF_A_WARP = (384, 512)
COLUMNS_OF_A_BLOCK = (768, 1001, 1024, 4096, 8192)
COLUMNS_OF_A_CLUSTER = (12288, 20001, 32768, 65536)
COLUMNS_OF_NO_PLAN = (140000, 300001)
COLUMNS = (
    *COLUMNS_OF_PART_OF_A_WARP,
    *COLUMNS_OF_A_WARP,
    *COLUMNS_OF_A_BLOCK,
    *COLUMNS_OF_A_CLUSTER,
    *COLUMNS_OF_NO_PLAN,
)
ONE_OF_EACH = (7, 61, 128, 133, 384, 1001, 4096, 12288, 20001, 65536, 140000)


def to_device(tree):
    """Every tensor in ``tree`` on the device."""
    return tree_map_only(Tensor, lambda tensor: tensor.to(DEVICE), tree)


def to_cpu(tree):
    return tree_map_only(Tensor, lambda tensor: tensor.detach().cpu(), tree)


def seed_at(inputs: Inputs) -> Tensor:
    """The cases' seed where ``inputs`` are."""
    return SEED.to(inputs["input"].device)


def results_and_gradients(
    case: Case, inputs: Inputs, grads: Sequence[Tensor], **options
) -> tuple[tuple[Tensor, ...], Inputs]:
    leaves = require_grad(inputs)
    results = case.ours(leaves, **{"seed": seed_at(inputs)} | options)
    gradients = torch.autograd.grad(results, leaves.values(), grads)
    return tuple(result.detach() for result in results), dict(zip(leaves, gradients, strict=True))
