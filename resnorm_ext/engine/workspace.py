# SPDX-License-Identifier: BSD-3-Clause
"""The memory that CPU kernels keep between calls."""

from __future__ import annotations

from ..build.extension import ensure_loaded, extension


def free_workspaces() -> int:
    """Frees what CPU kernels keep for their next call, and returns how many bytes that were.

    Each thread that has run kernels keeps some hundred kilobytes, and as much as a few rows where rows are long, until
    it ends; one that has run accelerated models, the activations of at most 1024 tokens in one layer: 9 MiB for MiniLM,
    18 MiB for BERT-base. Freed are those of the calling thread and of PyTorch's pool that works for it; kernels that
    other Python threads are running are not disturbed.
    """
    ensure_loaded()
    return extension.free_workspaces()
