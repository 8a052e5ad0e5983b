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

from resnorm_ext.build import config, toolchain
from resnorm_ext.build.extension import extension

ISAS = ("scalar", "avx2", "avx512", "avx512_bf16")


def sources(units: list[config.Unit]) -> list[str]:
    return sorted({unit.source for unit in units})


def test_every_source_is_a_unit():
    present = [path.relative_to(config.CSRC).as_posix() for path in config.CSRC.rglob("*.c*")]
    units = [*config.kernel_units(ISAS), *config.torch_units(cuda=True), *config.cuda_units()]
    assert sources(units) == sorted(path for path in present if path.endswith((".cpp", ".cu")))


def test_units_have_objects_of_their_own():
    objects = [unit.object for unit in (*config.kernel_units(ISAS), *config.torch_units(cuda=True))]
    assert len(set(objects)) == len(objects)


def test_cuda_sources_only_with_cuda():
    with_cuda, without = (set(config.torch_units(cuda=cuda)) for cuda in (True, False))
    assert without < with_cuda and all(unit.source.startswith("ops/cuda/") for unit in with_cuda - without)


def test_every_family_is_compiled_for_every_instruction_set():
    units = [(Path(unit.source).stem, unit.isa) for unit in config.kernel_units(ISAS) if unit.isa]
    assert sorted(units) == sorted((family, isa) for family in config.FAMILIES for isa in ISAS)


def test_a_build_for_one_instruction_set_has_no_other():
    units = config.kernel_units(("scalar", "avx2"))
    assert {unit.isa for unit in units} == {None, "scalar", "avx2"}
    (dispatch,) = (unit for unit in units if unit.source.endswith("dispatch.cpp"))
    assert dispatch.flags == ("-DRESNORM_WITH_AVX2",)


@pytest.mark.parametrize(
    ("isas", "base"),
    [(("scalar", "avx512_bf16"), None), (("scalar", "avx512", "avx512_bf16"), "avx512"), (ISAS, "avx512")],
)
def test_a_set_that_extends_one_that_is_built_leaves_the_rest_to_it(isas, base):
    expected = {(isa, f"-DRESNORM_BASE={base}") for isa in isas if isa == "avx512_bf16" and base}
    units = config.kernel_units(isas)
    assert {(unit.isa, flag) for unit in units for flag in unit.flags if "RESNORM_BASE" in flag} == expected


@pytest.mark.parametrize(
    ("flags", "best"),
    [
        ("sse2 avx", ("scalar",)),
        ("avx2 fma", ("scalar",)),
        ("avx2 fma f16c avx512f", ("scalar", "avx2")),
        ("avx2 fma f16c avx512f avx512bw avx512vl avx512dq", ("scalar", "avx512")),
        ("avx2 fma f16c avx512f avx512bw avx512vl avx512dq avx512_bf16", ("scalar", "avx512_bf16")),
    ],
)
@pytest.mark.skipif(not config.is_x86_64(), reason="x86-64 instruction sets")
def test_best_instruction_set_of_a_cpu(monkeypatch: pytest.MonkeyPatch, flags: str, best: tuple[str, ...]):
    monkeypatch.delenv("RESNORM_CPU_ISA", raising=False)
    monkeypatch.setattr(Path, "read_text", lambda _: f"model name\t: some\nflags\t\t: fpu {flags}\n")
    assert config.best_isas() == best


@pytest.mark.parametrize(
    ("asked", "isas"),
    [("avx2", ("scalar", "avx2", "avx512")), ("scalar", ("scalar", "avx512")), ("avx512_bf16", ("scalar", "avx512"))],
)
@pytest.mark.skipif(not config.is_x86_64(), reason="x86-64 instruction sets")
def test_the_instruction_set_that_is_asked_for_is_compiled_where_the_cpu_has_it(
    monkeypatch: pytest.MonkeyPatch, asked: str, isas: tuple[str, ...]
):
    monkeypatch.setenv("RESNORM_CPU_ISA", asked)
    monkeypatch.setattr(config, "cpu_features", lambda: config.features_of("avx512"))
    assert config.best_isas() == isas


@pytest.mark.smoke
@pytest.mark.skipif(not config.is_x86_64(), reason="x86-64 instruction sets")
def test_the_best_instruction_set_is_the_one_that_runs():
    supported, asked = extension.supported_cpu_isas(), os.environ.get("RESNORM_CPU_ISA") or "scalar"
    assert {"scalar", asked, supported[-1]} == set(config.best_isas())


def test_other_processors_build_the_scalar_kernels_alone(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    units = config.kernel_units(config.all_isas())
    assert {unit.isa for unit in units} == {None, "scalar"} and config.best_isas() == ("scalar",)
    assert not [flag for unit in units for flag in unit.flags if flag.startswith(("-m", "-DRESNORM_WITH"))]


def test_no_flag_ties_the_build_to_this_machine_or_breaks_arithmetic():
    flags = " ".join([*config.CXX_FLAGS, *(flag for unit in config.kernel_units(ISAS) for flag in unit.flags)])
    assert "native" not in flags and "fast-math" not in flags


@pytest.mark.skipif(shutil.which("cmake") is None, reason="no cmake")
def test_cmake_has_the_same_sources_and_flags(tmp_path: Path):
    configured = subprocess.run(["cmake", "-S", ROOT, "-B", tmp_path], capture_output=True, text=True)
    if "Could NOT find GTest" in configured.stderr:
        pytest.skip("no GoogleTest")
    assert configured.returncode == 0, configured.stderr
    flags = set()
    for entry in json.loads((tmp_path / "compile_commands.json").read_text()):
        file = Path(entry["file"])
        if file.is_relative_to(ROOT / "csrc" / "kernels" / "cpu"):
            words = [word for word in shlex.split(entry["command"]) if re.match(r"-[DOWfgms]", word)]
            flags.add((file.relative_to(ROOT / "csrc").as_posix(), *sorted(words)))
    units = config.kernel_units(config.all_isas())
    assert flags == {(unit.source, *sorted([*config.CXX_FLAGS, *unit.flags])) for unit in units}


def test_local_version_is_one_that_pip_accepts():
    assert config.local_version("2.13.0+cpu", None) == "cpu.torch2.13"
    assert config.local_version("2.14.1", "13.0") == "cu130.torch2.14"


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
    assert toolchain.cuda_architectures(config.CUDA_ARCHITECTURES, SUPPORTED) == expected


def test_default_architectures_are_those_that_the_toolkit_knows(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    assert toolchain.cuda_architectures(config.CUDA_ARCHITECTURES, SUPPORTED[:4]) == ("7.5", "8.0", "9.0+PTX")
    assert toolchain.cuda_architectures(("12.1",), SUPPORTED) == ("12.0+PTX",)


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
    found, reason = toolchain.find_cuda("2.99.0", "99.0", ("90.0",))
    assert found == toolchain.Toolkit(toolkit, "99.1", ("90.0+PTX",)) and "2.99.0" in reason
    monkeypatch.setenv("RESNORM_CUDA", "on")
    with pytest.raises(toolchain.BuildError, match=r"needs a CUDA 98\.0 toolkit, and .*cuda-99 holds 99\.1"):
        toolchain.find_cuda("2.99.0", "98.0", ("90.0",))
    monkeypatch.setenv("RESNORM_CUDA", "off")
    assert toolchain.find_cuda("2.99.0", "99.0", ("90.0",)) == (None, "RESNORM_CUDA=off")


def test_jobs_follow_the_cores_and_the_memory(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("MAX_JOBS", raising=False)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: range(64))
    for gib, jobs in ((5, 2), (1, 1), (1000, 64)):
        monkeypatch.setattr(toolchain, "_available_memory", lambda gib=gib: gib * 2**30)
        assert toolchain.max_jobs() == jobs
    monkeypatch.setenv("MAX_JOBS", "3")
    assert toolchain.max_jobs() == 3
    for wrong in ("0", "-1", "many"):
        monkeypatch.setenv("MAX_JOBS", wrong)
        with pytest.raises(ValueError, match="MAX_JOBS must be a positive integer; got"):
            toolchain.max_jobs()
