# SPDX-License-Identifier: BSD-3-Clause
from __future__ import annotations

import pytest
import torch

settings = pytest.importorskip("hypothesis").settings

# Compiled code and first calls make single examples slow, and a failure must be the same on every machine.
settings.register_profile("resnorm_ext", deadline=None, derandomize=True)
settings.load_profile("resnorm_ext")
settings.register_profile("brief", settings.get_profile("resnorm_ext"), max_examples=15)


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "every_isa: test_isa.py runs it again under each instruction set")


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    torch.manual_seed(0)
