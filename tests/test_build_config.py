# SPDX-License-Identifier: BSD-3-Clause
from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
from tiny_project import ROOT

from resnorm_ext import _toolchain, build_config


def test_every_source_belongs_to_a_list():
    present = [path.relative_to(build_config.CSRC).as_posix() for path in build_config.CSRC.rglob("*.c*")]
    assert sorted(build_config.sources(cuda=True)) == sorted(path for path in present if path.endswith((".cpp", ".cu")))


def test_cuda_sources_only_with_cuda():
    with_cuda, without = (set(build_config.torch_sources(cuda=cuda)) for cuda in (True, False))
    assert without < with_cuda and all(source.startswith("ops/cuda/") for source in with_cuda - without)


def test_flags_of_an_instruction_set_name_a_source():
    assert set(build_config.ISA_FLAGS) <= set(build_config.kernel_sources())


def test_other_processors_build_the_scalar_kernels_alone(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    sources = build_config.kernel_sources()
    assert [source for source in sources if source.startswith("kernels/cpu/isa_")] == ["kernels/cpu/isa_scalar.cpp"]
    assert not [flag for source in sources for flag in build_config.kernel_flags(source) if flag.startswith("-m")]


def test_no_flag_ties_the_build_to_this_machine_or_breaks_arithmetic():
    flags = " ".join(flag for source in build_config.kernel_sources() for flag in build_config.kernel_flags(source))
    assert "native" not in flags and "fast-math" not in flags


@pytest.mark.skipif(shutil.which("cmake") is None, reason="no cmake")
def test_cmake_has_the_same_sources_and_flags(tmp_path: Path):
    configured = subprocess.run(["cmake", "-S", ROOT, "-B", tmp_path], capture_output=True, text=True)
    if "Could NOT find GTest" in configured.stderr:
        pytest.skip("no GoogleTest")
    assert configured.returncode == 0, configured.stderr
    flags = {}
    for entry in json.loads((tmp_path / "compile_commands.json").read_text()):
        file = Path(entry["file"])
        if file.is_relative_to(ROOT / "csrc" / "kernels" / "cpu"):
            words = shlex.split(entry["command"])
            flags[file.relative_to(ROOT / "csrc").as_posix()] = [w for w in words if re.match(r"-[OWfgms]", w)]
    assert flags == {source: list(build_config.kernel_flags(source)) for source in build_config.kernel_sources()}


def test_local_version_is_one_that_pip_accepts():
    assert build_config.local_version("2.13.0+cpu", None) == "cpu.torch2.13"
    assert build_config.local_version("2.14.1", "13.0") == "cu130.torch2.14"


SUPPORTED = ["7.5", "8.0", "8.6", "9.0", "10.0", "12.0"]


@pytest.mark.parametrize(
    ("listed", "expected"),
    [
        ("", ("7.5", "8.0", "9.0", "10.0", "12.0+PTX")),
        ("9.0", ("9.0",)),
        ("8.0;9.0a+PTX", ("8.0", "9.0a+PTX")),
        (" 8.0 8.6,9.0 ", ("8.0", "8.6", "9.0")),
    ],
)
def test_architecture_list(monkeypatch: pytest.MonkeyPatch, listed: str, expected: tuple[str, ...]):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", listed)
    assert _toolchain.cuda_architectures(build_config.CUDA_ARCHITECTURES, SUPPORTED) == expected


def test_default_architectures_are_those_that_the_toolkit_knows(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    assert _toolchain.cuda_architectures(build_config.CUDA_ARCHITECTURES, SUPPORTED[:4]) == ("7.5", "8.0", "9.0+PTX")
    assert _toolchain.cuda_architectures(("12.1",), SUPPORTED) == ("12.0+PTX",)


def test_toolkit_is_found_behind_a_script_on_path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    toolkit = tmp_path / "cuda-99"
    for path, says in [
        (toolkit / "bin" / "nvcc", f"#$ TOP={toolkit}/bin/.."),
        (tmp_path / "bin" / "nvcc", f"#$ TOP={toolkit}/bin/.."),
    ]:
        path.parent.mkdir(parents=True)
        path.write_text(f"#!/bin/sh\necho '{says}'\necho release 99.1, V99.1\necho compute_900\n")
        path.chmod(0o755)
    for name in ("CUDA_HOME", "CUDA_PATH", "RESNORM_CUDA", "TORCH_CUDA_ARCH_LIST"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin{os.pathsep}{os.environ['PATH']}")
    found, reason = _toolchain.find_cuda("2.99.0", "99.0", ("90.0",))
    assert found == _toolchain.Toolkit(toolkit, "99.1", ("90.0+PTX",)) and "2.99.0" in reason
    monkeypatch.setenv("RESNORM_CUDA", "on")
    with pytest.raises(_toolchain.BuildError, match=r"needs a CUDA 98\.0 toolkit, and .*cuda-99 holds 99\.1"):
        _toolchain.find_cuda("2.99.0", "98.0", ("90.0",))
    monkeypatch.setenv("RESNORM_CUDA", "off")
    assert _toolchain.find_cuda("2.99.0", "99.0", ("90.0",)) == (None, "RESNORM_CUDA=off")


def test_jobs_follow_the_cores_and_the_memory(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: range(64))
    for gib, jobs in ((5, 2), (1, 1), (1000, 64)):
        monkeypatch.setattr(_toolchain, "_available_memory", lambda gib=gib: gib * 2**30)
        assert _toolchain.max_jobs() == jobs
