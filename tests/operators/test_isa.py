# SPDX-License-Identifier: BSD-3-Clause
"""Each instruction set that this CPU has, beside the one in use, passes the tests marked `every_isa`."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from resnorm_ext.build.extension import extension

OPERATOR_TESTS = Path(__file__).parent
ISAS = ["scalar", "avx2", "avx512", "avx512_bf16"]


def run_python(*arguments: str, isa: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"RESNORM_CPU_ISA": isa}
    return subprocess.run(
        [sys.executable, *arguments],
        env=environment,
        cwd=OPERATOR_TESTS.parent.parent,
        capture_output=True,
        text=True,
        check=False,
    )


def isa_in(isa: str) -> subprocess.CompletedProcess:
    return run_python("-c", "from resnorm_ext.build.extension import extension; print(extension.cpu_isa())", isa=isa)


@pytest.mark.parametrize("isa", ISAS)
def test_every_supported_isa(isa):
    if isa not in extension.supported_cpu_isas():
        pytest.skip(f"this CPU has no {isa}")
    if isa == extension.cpu_isa():
        pytest.skip("in use: the other tests ran on it")
    assert isa_in(isa).stdout.strip() == isa
    tests = ["-m", "pytest", "-q", "-x", "-m", "every_isa", "--hypothesis-profile=brief", str(OPERATOR_TESTS)]
    result = run_python(*tests, isa=isa)
    assert result.returncode == 0, result.stdout[-4000:]
    assert " passed" in result.stdout


def test_the_best_supported_isa_is_in_use_where_nothing_is_asked_for():
    supported = extension.supported_cpu_isas()
    assert supported == [isa for isa in ISAS if isa in supported] and supported[0] == "scalar"
    if "RESNORM_CPU_ISA" not in os.environ:
        assert extension.cpu_isa() == supported[-1]


@pytest.mark.parametrize("isa", ["avx1024", "AVX2", " scalar"])
def test_an_unknown_isa_is_one_clear_error(isa):
    result = isa_in(isa)
    assert result.returncode != 0
    error = result.stderr.strip().splitlines()[-1]
    assert "RESNORM_CPU_ISA" in error and isa in error and all(known in error for known in ISAS), result.stderr
