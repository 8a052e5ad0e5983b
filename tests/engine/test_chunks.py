# SPDX-License-Identifier: BSD-3-Clause
from __future__ import annotations

from resnorm_ext.engine import chunks


def test_chunks_are_whole_sequences():
    bounds = [0, 4, 4, 9, 30, 31, 35, 35]
    assert list(chunks._chunks(bounds, 10)) == [(0, 3), (3, 4), (4, 7)]
    assert list(chunks._chunks([0], 10)) == []
