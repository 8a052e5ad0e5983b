# SPDX-License-Identifier: BSD-3-Clause
from __future__ import annotations

import pytest
import torch

from resnorm_ext.build.extension import ensure_loaded, extension

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


@pytest.fixture
def fresh():
    """Nothing is prepared. These tensors are tiny, and one thread is the fastest."""
    ensure_loaded()
    extension.clear_layer_cache()
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
