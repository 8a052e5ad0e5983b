# SPDX-License-Identifier: BSD-3-Clause
from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def errors_of_kernels(request: pytest.FixtureRequest):
    """A kernel's fault shows at a later call, and the process can then use the GPU no more: the run ends with it."""
    yield
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        pytest.exit(f"{request.node.nodeid} broke the GPU's context: {error}", returncode=pytest.ExitCode.TESTS_FAILED)
