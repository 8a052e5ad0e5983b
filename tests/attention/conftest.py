# SPDX-License-Identifier: BSD-3-Clause
from __future__ import annotations

import pytest
import torch

from resnorm_ext.build.extension import ensure_loaded


@pytest.fixture(scope="session", autouse=True)
def operators():
    ensure_loaded()


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)


@pytest.fixture
def numbers_of_threads():
    """To set one after another; the number before comes back."""
    threads = torch.get_num_threads()
    yield (1, 2, 3, 7)
    torch.set_num_threads(threads)
