# SPDX-License-Identifier: BSD-3-Clause
"""Which CUDA kernel takes which rows. Plans need no GPU, so any build can be asked."""

from __future__ import annotations

import pytest
import torch

from resnorm_ext.build.extension import extension

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def plan(kernel: str, columns: int, dtype: torch.dtype, **options) -> dict:
    return extension.kernel_plan(kernel, columns, dtype, **options)


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        (64, {"row_threads": 8, "vectors_per_thread": 1}),
        (256, {"row_threads": 8, "vectors_per_thread": 4}),
        (768, {"row_threads": 32, "vectors_per_thread": 3}),
        (1024, {"row_threads": 32, "vectors_per_thread": 4}),
        (4096, {"row_threads": 128, "vectors_per_thread": 4}),
        (16384, {"row_threads": 512, "cluster": 1}),
        (20480, {"row_threads": 320, "cluster": 2}),
        (32768, {"row_threads": 512, "cluster": 2}),
        (131072, {"row_threads": 512, "cluster": 8}),
        (131080, {"generic": True}),
    ],
)
def test_forward_of_bfloat16_rows(columns: int, expected: dict):
    actual = plan("norm_forward", columns, torch.bfloat16)
    assert expected.items() <= actual.items() and actual["shifted"] is False


@pytest.mark.parametrize("kernel", ["norm_forward", "norm_backward", "residual_add"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [1, 33, 768, 775, 5000])
@pytest.mark.parametrize("residual_dtype", [None, torch.float32])
def test_a_plan_covers_the_row(kernel: str, dtype: torch.dtype, columns: int, residual_dtype: torch.dtype | None):
    actual = plan(kernel, columns, dtype, residual_dtype=residual_dtype)
    vector = 16 // dtype.itemsize
    held = actual["row_threads"] * actual["vectors_per_thread"] * actual["cluster"] * actual["tiles"] * vector
    assert not actual["generic"] and held >= columns
    assert actual["shifted"] == (columns % vector != 0)
    assert actual["threads"] % actual["row_threads"] == 0


@pytest.mark.parametrize("architecture", [75, 80, 90, 100])
@pytest.mark.parametrize(
    "options", [{}, {"residual_dtype": torch.bfloat16}, {"residual_dtype": torch.float32}, {"aligned": False}]
)
def test_two_blocks_run_at_once_where_four_vectors_fit_a_thread(architecture: int, options: dict):
    actual = plan("norm_forward", 16000, torch.bfloat16, architecture=architecture, **options)
    four = not options or (architecture == 90 and options.get("residual_dtype") == torch.bfloat16)
    assert (actual["vectors_per_thread"], actual["threads"]) == ((4, 512) if four else (2, 1024))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kernel", ["norm_forward", "norm_backward"])
def test_blocks_of_a_cluster_share_a_row_evenly(kernel: str, dtype: torch.dtype):
    """No more idle threads than the last vectors of the last warps leave."""
    vector = 16 // dtype.itemsize
    for columns in range(8192 * 2 // dtype.itemsize, 65536, 1024):
        actual = plan(kernel, columns, dtype, architecture=90)
        if actual["cluster"] > 1:
            held = actual["threads"] * actual["vectors_per_thread"] * actual["cluster"] * vector
            assert held - columns < 32 * actual["vectors_per_thread"] * actual["cluster"] * vector


def test_clusters_are_for_architectures_that_have_them():
    assert plan("norm_forward", 32768, torch.bfloat16, architecture=90)["cluster"] == 2
    assert plan("norm_forward", 32768, torch.bfloat16, architecture=80)["generic"]
    assert plan("norm_backward", 16384, torch.bfloat16, architecture=90)["cluster"] == 2
    assert plan("norm_backward", 16384, torch.bfloat16, architecture=80)["generic"]


def test_unaligned_rows_take_shifted_vectors():
    assert plan("norm_forward", 768, torch.float16, aligned=False)["shifted"]
    assert "shifted" in plan("norm_backward", 768, torch.float16, aligned=False)["description"]


def test_rare_types_go_element_by_element():
    assert plan("norm_forward", 768, torch.float64)["generic"]
    assert plan("residual_add", 768, torch.float32, residual_dtype=torch.bfloat16)["generic"]


def test_what_cannot_be_asked():
    with pytest.raises(ValueError, match="expected norm_forward, norm_backward or residual_add, got softmax"):
        plan("softmax", 768, torch.float32)
    with pytest.raises(ValueError, match="expected a positive number of columns, got 0"):
        plan("norm_forward", 0, torch.float32)
