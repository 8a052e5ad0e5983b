# SPDX-License-Identifier: BSD-3-Clause
"""A tiny GPT-2, batches for it, and what its outputs are held against."""

from __future__ import annotations

import torch
import transformers

MASKS = {
    "none": None,
    "full": [[1] * 9] * 3,
    "left": [[1] * 9, [0] * 4 + [1] * 5, [0] * 8 + [1]],
    "holes": [[1] * 9, [1, 0, 1, 0, 1, 1, 0, 0, 1], [0, 1, 1, 1, 0, 1, 1, 1, 1]],
    "right": [[1] * 9, [1] * 5 + [0] * 4, [1] + [0] * 8],
}


def build(head: str = "Model", **changes) -> torch.nn.Module:
    sizes = {"vocab_size": 100, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 40}
    quiet = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "initializer_range": 0.2}
    config = transformers.GPT2Config(**(sizes | quiet | {"pad_token_id": 0, "bos_token_id": 1} | changes))
    return getattr(transformers, f"GPT2{head}")(config).eval()


def batch_of(mask: str) -> dict[str, torch.Tensor]:
    batch = {"input_ids": torch.randint(1, 100, (3, 9))}
    if MASKS[mask] is not None:
        batch["attention_mask"] = torch.tensor(MASKS[mask])
    return batch


def assert_same(actual: torch.Tensor, expected: torch.Tensor, batch: dict[str, torch.Tensor]) -> None:
    real = batch.get("attention_mask", torch.ones(actual.shape[:2])).bool()
    torch.testing.assert_close(actual[real], expected[real], rtol=5e-5, atol=5e-5)
