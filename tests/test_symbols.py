# SPDX-License-Identifier: BSD-3-Clause
"""No instruction that some x86-64 CPU lacks may stand outside the functions that run only where the CPU has it."""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import pytest

from resnorm_ext.build.extension import load_extension

pytestmark = pytest.mark.skipif(platform.machine() != "x86_64", reason="x86-64 instruction sets")

_FUNCTION = re.compile(r"^[0-9a-f]+ <(.*)>:$")
_VECTOR_INSTRUCTION = re.compile(r"^\s*[0-9a-f]+:\t(?:[a-z0-9]+ )*?(v[a-z0-9]+\b.*)")  # VEX, EVEX: names start with v
_AVX512_REGISTER = re.compile(r"%zmm|%k[0-7]|%[xy]mm(1[6-9]|2\d|3[01])")

Instructions = dict[str, set[str]]  # of each function


@pytest.fixture(scope="module")
def vector_instructions() -> Instructions:
    if shutil.which("objdump") is None:
        pytest.skip("no objdump (Debian, Ubuntu: apt install binutils)")
    library = Path(load_extension().__file__)
    command = ["objdump", "--disassemble", "--no-show-raw-insn", "--demangle", str(library)]
    found, function = defaultdict(set), ""
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            if match := _FUNCTION.match(line):
                function = match[1]
            elif match := _VECTOR_INSTRUCTION.match(line):
                found[function].add(match[1])
    assert process.returncode == 0
    return found


def outside(instructions: Instructions, *namespaces: str) -> Instructions:
    inside = tuple(f"resnorm::cpu::{namespace}::" for namespace in namespaces)
    return {name: used for name, used in instructions.items() if not any(part in name for part in inside)}


def only(instructions: Instructions, wanted: Callable[[str], object]) -> Instructions:
    selected = {name: {i for i in used if wanted(i)} for name, used in instructions.items()}
    return {name: used for name, used in selected.items() if used}


def test_avx_only_in_functions_for_it(vector_instructions: Instructions):
    assert vector_instructions, "the library has no AVX code at all"
    assert not outside(vector_instructions, "avx2", "avx512", "avx512_bf16")


def test_avx512_only_in_functions_for_it(vector_instructions: Instructions):
    avx512 = only(vector_instructions, _AVX512_REGISTER.search)
    assert avx512, "the library has no AVX-512 code at all"
    assert not outside(avx512, "avx512", "avx512_bf16")


def test_bf16_only_in_functions_for_it(vector_instructions: Instructions):
    bf16 = only(vector_instructions, lambda instruction: "bf16" in instruction.split()[0])
    assert bf16, "the library has no bf16 code at all"
    assert not outside(bf16, "avx512_bf16")
