# SPDX-License-Identifier: BSD-3-Clause
"""How nvcc is called, by a script that stands in for it and leaves C++ to the C++ compiler."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_project import Project

_NVCC = f"""#!{sys.executable}
import pathlib, subprocess, sys

arguments = sys.argv[1:]
if "--version" in arguments:
    print("Cuda compilation tools, release 99.1, V99.1.1")
elif "--list-gpu-arch" in arguments:
    print("compute_80\\ncompute_90")
else:
    with pathlib.Path(__file__).with_name("log").open("a") as log:
        print(*arguments, file=log)
    dependencies = arguments[arguments.index("--dependency-output") + 1]
    kept = [word for word in arguments if word.startswith(("-D", "-I"))]
    command = ["c++", "-fPIC", "-MD", "-MF", dependencies, *kept, "-x", "c++", *arguments[arguments.index("-c") :]]
    sys.exit(subprocess.run(command).returncode)
"""


@pytest.fixture
def toolkit(project: Project, tmp_path: Path) -> Path:
    """A toolkit of CUDA 99.1, and a kernel in the project that its extension calls."""
    folder = tmp_path / "cuda"
    for name in ("bin", "lib64"):
        (folder / name).mkdir(parents=True)
    (folder / "bin" / "nvcc").write_text(_NVCC)
    (folder / "bin" / "nvcc").chmod(0o755)
    for name in ("cudart", "c10_cuda", "torch_cuda"):
        command = ["c++", "-shared", "-x", "c++", "/dev/null", "-o", folder / "lib64" / f"lib{name}.so"]
        subprocess.run(command, check=True)
    kernel = project.source.parent / "kernels" / "cuda" / "kernel.cu"
    kernel.parent.mkdir(parents=True)
    kernel.with_suffix(".h").write_text("#define ANSWER 7\n")
    kernel.write_text('#include "kernel.h"\nint from_kernel() { return ANSWER; }\n')
    project.source.write_text("int from_kernel();\n" + project.source.read_text().replace("42", "from_kernel()"))
    return folder


def build(project: Project, toolkit: Path, **variables: str) -> tuple[str, list[str]]:
    """(answer of the extension, calls of nvcc that compiled) of a build in place."""
    log = toolkit / "bin" / "log"
    log.write_text("")
    variables = {"STUB_TORCH": "2.13.0+cu990", "STUB_TORCH_CUDA": "99.0", "CUDA_HOME": str(toolkit)} | variables
    result = project.run("setup.py", "build_ext", "--inplace", **variables)
    assert result.returncode == 0, result.stdout + result.stderr
    code = "from resnorm_ext.build.extension import extension; print(extension.answer)"
    return project.run("-c", code, **variables).stdout.strip(), log.read_text().splitlines()


def test_nvcc_compiles_the_kernels_for_the_architectures_it_knows(project: Project, toolkit: Path):
    answer, (call,) = build(project, toolkit)
    assert answer == "7"
    for flag in ("-std=c++20", "-fPIC", "arch=compute_80,code=sm_80", "arch=compute_90,code=compute_90"):
        assert flag in call
    info = json.loads(next(project.package.glob("_C*.json")).read_text())
    assert info["cuda"] == "99.1" and info["cuda_architectures"] == ["8.0", "9.0+PTX"]


def test_nvidias_python_packages_are_a_toolkit(project: Project, toolkit: Path, tmp_path: Path):
    """They hold the runtime under its full name alone; they are taken where the machine's own does not fit."""
    packaged = project.stubs / "nvidia" / "cu99"
    packaged.parent.mkdir()
    toolkit.rename(packaged)
    (packaged / "lib64").rename(packaged / "lib")
    (packaged / "lib" / "libcudart.so").rename(packaged / "lib" / "libcudart.so.99")
    other = tmp_path / "other" / "bin" / "nvcc"
    other.parent.mkdir(parents=True)
    other.write_text(_NVCC.replace("99.1", "98.0"))
    other.chmod(0o755)
    machines = {"CUDA_HOME": str(other.parents[1]), "LDFLAGS": ""}
    variables = machines | {"STUB_TORCH": "2.13.0+cu990", "STUB_TORCH_CUDA": "99.0", "RESNORM_CUDA": "on"}
    result = project.run("setup.py", "build_ext", "--inplace", **variables)
    assert "and " + str(other.parents[1]) + " holds 98.0" in result.stderr  # a part of them is not enough
    for folder in ("nvvm", "include"):
        (packaged / folder).mkdir()
    answer, calls = build(project, packaged, **machines)
    assert answer == "7" and len(calls) == 1


def test_a_header_of_the_kernels_compiles_them_again(project: Project, toolkit: Path):
    assert build(project, toolkit)[0] == "7"
    assert build(project, toolkit) == ("7", [])
    (project.source.parent / "kernels" / "cuda" / "kernel.h").write_text("#define ANSWER 8\n")
    answer, calls = build(project, toolkit)
    assert answer == "8" and len(calls) == 1


def test_the_host_compiler_is_what_cc_says(project: Project, toolkit: Path):
    assert "-ccbin /somewhere/gcc" in build(project, toolkit, CC="/somewhere/gcc")[1][0]
