# SPDX-License-Identifier: BSD-3-Clause
from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True)
def torch_nn_without_its_fast_path():
    """What torch.nn computes on its fast path is not a reference: masks and padding come out wrong there."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    yield
    torch.backends.mha.set_fastpath_enabled(enabled)


@pytest.fixture(autouse=True)
def one_thread():
    """These tensors are tiny: on a busy machine, waiting for a second thread takes twenty times the computation."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)
