# SPDX-License-Identifier: BSD-3-Clause
from __future__ import annotations

import pytest
import torch

from resnorm_ext.build.extension import extension

from .linear_cases import BACKENDS, IN, OUT, needs_onednn


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest):
    """Everything that multiplies, for the layers of these tests; the operator has oneDNN for the last."""
    shapes = [(dtype, IN, out) for dtype in (torch.float32, torch.bfloat16) for out in (OUT, 3 * OUT)]
    if request.param == "onednn":
        needs_onednn()
    for shape in shapes:
        extension.set_linear_backend(*shape, request.param)
    yield request.param
    for shape in shapes:
        extension.set_linear_backend(*shape, "aten")
