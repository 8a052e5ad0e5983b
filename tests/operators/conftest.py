# SPDX-License-Identifier: BSD-3-Clause
from __future__ import annotations

import pytest
import torch
from hypothesis import settings

settings.register_profile("brief", settings.get_profile("resnorm_ext"), max_examples=15)


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "every_isa: test_isa.py runs it again under each instruction set")


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    torch.manual_seed(0)
