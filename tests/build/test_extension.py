# SPDX-License-Identifier: BSD-3-Clause
from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_project import Project, installed

CALL = "from resnorm_ext.build.extension import extension; print(extension.answer)"


def run_real(code: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """``code`` in a process of its own, with the real torch and extension."""
    command = [sys.executable, "-c", code]
    return subprocess.run(command, cwd="/", env=installed() | variables, capture_output=True, text=True, timeout=300)


def test_import_works_with_nothing_and_the_first_call_says_what_to_type(project: Project):
    result = project.run("-c", f"import resnorm_ext; print('imported'); {CALL}", RESNORM_JIT="0")
    assert result.stdout == "imported\n"
    error = result.stderr.splitlines()[-1]
    assert error.startswith("ImportError: resnorm_ext has no C++ extension: looked for")
    assert f"pip install --no-build-isolation -e {project.root}" in error and "RESNORM_JIT=0" in error


def test_without_torch_one_line_says_so(tmp_path: Path):
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['torch'] = None\n")
    environment = installed()
    environment["PYTHONPATH"] += f":{tmp_path}"
    command = [sys.executable, "-m", "resnorm_ext", "info"]
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert run.returncode != 0 and "During handling" not in run.stderr
    assert run.stderr.splitlines()[-1].endswith("which is not installed here; type: pip install torch")


def test_no_compiler_and_no_extension(project: Project):
    result = project.run("-c", CALL, PATH="/nonexistent")
    error = result.stderr.splitlines()[-1]
    assert error.startswith("ImportError: resnorm_ext has no C++ extension: looked for")
    assert "no C++ compiler: looked for c++ on PATH" in error and "apt install g++" in error


def test_compiles_at_first_use_where_nothing_is_built(project: Project):
    result = project.run("-c", CALL)
    assert result.stdout == "42\n" and "compiling the C++ extension" in result.stderr


def test_prefers_what_is_built(project: Project):
    project.build_in_place()
    result = project.run("-c", CALL)
    assert (result.stdout, result.stderr) == ("42\n", "")


def test_jit_on_request_passes_over_what_is_built(project: Project):
    project.build_in_place()
    assert "compiled in" in project.run("-c", CALL, RESNORM_JIT="1").stderr


def test_unknown_jit_setting(project: Project):
    result = project.run("-c", CALL, RESNORM_JIT="yes")
    assert "RESNORM_JIT must be one of auto, 1, 0; got 'yes'" in result.stderr


def test_built_for_another_torch(project: Project):
    project.build_in_place()
    error = project.run("-c", CALL, STUB_TORCH="2.14.1").stderr.splitlines()[-1]
    assert "ImportError: resnorm_ext was built for PyTorch 2.13.0 (CPU), you have PyTorch 2.14.1 (CPU)" in error
    assert "pip install --no-build-isolation -e" in error and "RESNORM_JIT=1" in error


def test_built_for_another_cuda(project: Project):
    """Which matters where there are CUDA kernels in it, and only there."""
    info = project.build_in_place().with_suffix(".json")
    present = {"STUB_TORCH": "2.13.0+cu126", "STUB_TORCH_CUDA": "12.6"}
    assert project.run("-c", CALL, **present).stdout == "42\n"
    info.write_text(json.dumps(json.loads(info.read_text()) | {"torch_cuda": "13.0", "cuda": "13.0"}))
    for variables, name in (({}, "PyTorch 2.13.0 (CPU)"), (present, "PyTorch 2.13.0 (CUDA 12.6)")):
        error = project.run("-c", CALL, **variables).stderr.splitlines()[-1]
        assert f"was built for PyTorch 2.13.0 (CUDA 13.0), you have {name}" in error


def test_another_patch_release_of_torch_is_the_same_abi(project: Project):
    project.build_in_place()
    assert project.run("-c", CALL, STUB_TORCH="2.13.1").stdout == "42\n"


@pytest.mark.parametrize("damage", ["library", "description"])
def test_damaged_installation(project: Project, damage: str):
    library = project.build_in_place()
    if damage == "library":
        library.write_bytes(b"not a library")
    else:
        library.with_suffix(".json").unlink()
    error = project.run("-c", CALL).stderr.splitlines()[-1]
    assert error.startswith(f"ImportError: {library}") and "pip install --no-build-isolation -e" in error


def test_one_extension_per_process(project: Project):
    project.build_in_place()
    result = project.run(
        "-c", f"{CALL}; from resnorm_ext.build import extension, jit; extension.load_library(jit.compiled_library())"
    )
    assert "RuntimeError: this process already uses" in result.stderr and "restart Python" in result.stderr


def test_looking_at_the_extension_does_not_load_it(project: Project):
    code = (
        "import inspect; from resnorm_ext.build import extension as e;"
        "repr(e.extension); inspect.unwrap(e.extension); print(hasattr(e.extension, '__wrapped__'), e.loaded())"
    )
    assert project.run("-c", code).stdout == "False None\n"


@pytest.mark.smoke
def test_attributes_are_plain_once_loaded():
    from resnorm_ext.build.extension import extension

    assert extension.build_info()["cpp_standard"] >= 202002
    assert not hasattr(type(extension), "__getattr__")
    with pytest.raises(AttributeError):
        extension.no_such_function  # noqa: B018


@pytest.mark.smoke
def test_unknown_cpu_isa():
    result = run_real("from resnorm_ext.build.extension import extension; extension.cpu_isa()", RESNORM_CPU_ISA="mmx")
    error = result.stderr.splitlines()[-1]
    assert error.startswith("ValueError") and "RESNORM_CPU_ISA" in error and "mmx" in error and "scalar" in error


@pytest.mark.smoke
def test_import_registers_the_operators():
    assert run_real("import resnorm_ext, torch; torch.ops.resnorm.layer_norm.default").returncode == 0


def test_loads_while_torch_compile_traces(tmp_path: Path):
    code = """
import shutil, torch
from resnorm_ext.build import extension, jit, library

cached, built = jit._cached_library(jit.detect()), extension.find_built()
cached.parent.mkdir(parents=True)
shutil.copy(built, cached)
shutil.copy(library.info_path(built), library.info_path(cached))

@torch.compile(fullgraph=True, backend="eager")
def normalize(x):
    extension.ensure_loaded()
    return torch.ops.resnorm.layer_norm(x, [8])

assert extension.loaded() is None
x = torch.randn(4, 8)
torch.testing.assert_close(normalize(x), torch.nn.functional.layer_norm(x, [8]))
assert extension.loaded() is not None
"""
    result = run_real(code, RESNORM_JIT="1", RESNORM_CACHE_DIR=str(tmp_path))
    assert result.returncode == 0, result.stderr
