# SPDX-License-Identifier: BSD-3-Clause
"""tests/cpp/mutation runs on demand; what it breaks must still be there when somebody does."""

from __future__ import annotations

import pytest
from tiny_project import ROOT


def test_every_fault_can_be_put_into_the_sources(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(ROOT / "tests" / "cpp" / "mutation")
    from mutations import MUTATIONS

    places = [(m.name, (ROOT / m.file).read_text().count(text)) for m in MUTATIONS for text in m.replacements]
    assert places and not [(name, count) for name, count in places if count != 1]
