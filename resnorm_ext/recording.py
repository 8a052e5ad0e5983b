# SPDX-License-Identifier: BSD-3-Clause
"""Who records a call instead of wanting its result."""

from __future__ import annotations

import torch

from .build.extension import assume_constant_result


def is_exported() -> bool:
    """Whether a call is recorded for a place that need not have this package: by torch.jit.trace, or for ONNX.

    Only torch's own operators will do there. torch.export keeps this package's, for programs that import it.
    """
    # Where the exporter to ONNX does not trace it goes by torch.export, and asking that first costs less.
    return torch.jit.is_tracing() or (torch.compiler.is_compiling() and _is_in_onnx_export())


@assume_constant_result  # dynamo takes torch's answer for False, also where it traces for the exporter
def _is_in_onnx_export() -> bool:
    return torch.onnx.is_in_onnx_export()
