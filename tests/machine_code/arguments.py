# SPDX-License-Identifier: BSD-3-Clause
"""The kernels' arguments: structures laid out as those of the headers, to which compilation.py has the compiler compare
them, and tensors whose addresses tell which argument they are."""

from __future__ import annotations

import ctypes

TENSOR_SPACING = 1 << 41


def fields(kind: type, names: str) -> list[tuple[str, type]]:
    return [(name, kind) for name in names.split()]


class NormForwardArguments(ctypes.Structure):
    """As in norm_forward.cuh."""

    _fields_ = (
        *fields(ctypes.c_void_p, "input residual input_bias weight bias output sum mean rstd seed"),
        *fields(ctypes.c_int64, "rows input_stride residual_stride output_stride sum_stride"),
        *fields(ctypes.c_int, "cols"),
        *fields(ctypes.c_bool, "float32_parameters"),
        *fields(ctypes.c_int, "first_element"),
        *fields(ctypes.c_float, "reciprocal_cols eps"),
        *fields(ctypes.c_uint32, "threshold"),
        *fields(ctypes.c_float, "scale"),
    )


class NormBackwardArguments(ctypes.Structure):
    """As in norm_backward.cuh."""

    _fields_ = (
        *fields(ctypes.c_void_p, "x grad_output grad_sum weight mean rstd grad_input grad_residual partials seed"),
        *fields(ctypes.c_int64, "rows x_stride grad_output_stride grad_sum_stride"),
        *fields(ctypes.c_int64, "grad_input_stride grad_residual_stride"),
        *fields(ctypes.c_int, "cols row_threads stage_bytes staged_bytes first_element"),
        *fields(ctypes.c_bool, "float32_parameters"),
        *fields(ctypes.c_float, "reciprocal_cols"),
        *fields(ctypes.c_uint32, "threshold"),
        *fields(ctypes.c_float, "scale"),
    )


def with_tensors(structure: type[ctypes.Structure], names: str, **others: object) -> ctypes.Structure:
    """Arguments in which these pointers are not null."""
    order = [name for name, _ in structure._fields_]
    return structure(**{name: (order.index(name) + 1) * TENSOR_SPACING for name in names.split()}, **others)


def tensor_at(structure: type[ctypes.Structure], address: int) -> str:
    number = address // TENSOR_SPACING
    if not 1 <= number <= len(structure._fields_):
        raise LookupError(f"there is no tensor at {address:#x}")
    return structure._fields_[number - 1][0]
