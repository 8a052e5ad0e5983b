# SPDX-License-Identifier: BSD-3-Clause
"""What setup.py makes: in-place builds, wheels named by what they are for, source distributions that can be built."""

from __future__ import annotations

import json
import shutil
import tarfile
import zipfile

from tiny_project import Project


def test_in_place_build_describes_itself_and_compiles_only_what_changed(project: Project):
    first = project.run("setup.py", "build_ext", "--inplace")
    assert first.returncode == 0, first.stderr
    assert "building CPU kernels alone (PyTorch 2.13.0+cpu is built without CUDA)" in first.stdout
    assert "python.cpp" in first.stdout
    (library,) = project.package.glob("_C*.so")
    info = json.loads(library.with_suffix(".json").read_text())
    assert info["torch"] == "2.13.0+cpu" and info["cuda"] is None and "-O3" in info["cxx_flags"]
    second = project.run("setup.py", "build_ext", "--inplace")
    assert second.returncode == 0 and "ninja: no work to do" in second.stdout
    assert project.run("-c", "from resnorm_ext.build.extension import extension as e; print(e.answer)").stdout == "42\n"


def test_editable_install_compiles_only_what_changed(project: Project):
    install = "-m pip install --no-build-isolation --no-deps --target installed --upgrade -e .".split()
    compiled = []
    for _ in range(2):
        result = project.run(*install)
        assert result.returncode == 0, result.stdout + result.stderr
        (unit,) = project.root.glob("build/**/python.o")
        compiled.append(unit.stat().st_mtime_ns)
    assert compiled[0] == compiled[1]
    assert project.run("-c", "from resnorm_ext.build.extension import extension as e; print(e.answer)").stdout == "42\n"


def test_wheel_is_named_by_what_it_is_for_and_carries_the_sources(project: Project):
    result = project.run("-m", "build", "--wheel", "--no-isolation")
    assert result.returncode == 0, result.stdout + result.stderr
    (wheel,) = (project.root / "dist").glob("*.whl")
    assert wheel.name.startswith("resnorm_ext-0.1.0+cpu.torch2.13-cp")
    names = zipfile.ZipFile(wheel).namelist()
    assert "resnorm_ext/_csrc/python.cpp" in names
    assert {name.rsplit(".", 1)[1] for name in names if name.startswith("resnorm_ext/_C.")} == {"so", "json"}
    assert "resnorm_ext/py.typed" in names
    assert not [name for name in names if name.startswith(("csrc", "tests", "torch", "stubs"))]
    (metadata,) = (name for name in names if name.endswith("dist-info/METADATA"))
    required = [line for line in zipfile.ZipFile(wheel).read(metadata).decode().splitlines() if "Requires-Dist" in line]
    assert "Requires-Dist: torch==2.13.*" in required


def test_installed_wheel_compiles_from_the_sources_it_carries(project: Project):
    assert project.run("-m", "build", "--wheel", "--no-isolation").returncode == 0
    (wheel,) = (project.root / "dist").glob("*.whl")
    site = project.root / "site"
    zipfile.ZipFile(wheel).extractall(site)
    load = "from resnorm_ext.build.extension import load_extension; module = load_extension()"
    code = f"import sys; sys.path[0] = {str(site)!r}; {load}; print(module.answer, module.__file__)"
    result = project.run("-c", code, RESNORM_JIT="1")
    assert result.stdout.startswith(f"42 {project.cache}"), result.stderr
    assert not list(project.cache.glob("*-objects")), "nobody edits the sources of a wheel"


def test_source_distribution_builds(project: Project):
    result = project.run("-m", "build", "--sdist", "--no-isolation")
    assert result.returncode == 0, result.stdout + result.stderr
    (archive,) = (project.root / "dist").glob("*.tar.gz")
    assert archive.name == "resnorm_ext-0.1.0.tar.gz"
    tarfile.open(archive).extractall(project.root, filter="data")
    unpacked = project.root / "resnorm_ext-0.1.0"
    again = project.run("-m", "build", "--wheel", "--no-isolation", "--outdir", "dist", str(unpacked))
    assert again.returncode == 0, again.stdout + again.stderr
    assert list((project.root / "dist").glob("*.whl"))


def test_build_without_torch_says_what_to_type(project: Project):
    shutil.rmtree(project.stubs / "torch")
    block = project.stubs / "sitecustomize.py"  # as if nothing were installed, and ninja not on PATH
    block.write_text(
        "import importlib.util as util\n"
        "find = util.find_spec\n"
        "util.find_spec = lambda name, *rest: None if name in ('torch', 'ninja') else find(name, *rest)\n"
    )
    nothing = {"PATH": "/nowhere"}
    result = project.run("setup.py", "build_ext", "--inplace", **nothing)
    assert result.returncode != 0 and "Traceback" not in result.stderr
    assert result.stderr.splitlines()[-1].endswith("packages that are not here; type: pip install torch ninja")
    (project.root / "pip-build-env-x").mkdir()
    paths = f"{project.stubs}:{project.root / 'pip-build-env-x'}"
    result = project.run("setup.py", "dist_info", PYTHONPATH=paths, **nothing)
    assert result.returncode != 0 and "pip builds where it cannot be seen. With torch, ninja installed" in result.stderr
    assert result.stderr.rstrip().endswith("type: pip install --no-build-isolation .")


def test_a_torch_that_cannot_be_imported(project: Project):
    (project.stubs / "torch" / "__init__.py").write_text("raise ImportError('libfoo.so.1 is missing')")
    result = project.run("setup.py", "build_ext", "--inplace")
    assert result.returncode != 0 and "Traceback" not in result.stderr
    assert "here it cannot be imported: libfoo.so.1 is missing" in result.stderr


def test_old_setuptools(project: Project):
    """The one line instead of what it would make of pyproject.toml."""
    metadata = project.stubs / "setuptools-65.5.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Name: setuptools\nVersion: 65.5.0\n")
    result = project.run("setup.py", "build_ext", "--inplace")
    assert result.returncode != 0 and "pip install 'setuptools>=77'" in result.stderr


def test_a_compiler_that_is_none(project: Project):
    result = project.run("setup.py", "build_ext", "--inplace", CXX="/bin/true")
    assert result.returncode != 0 and not list(project.package.glob("_C*"))
    assert result.stderr.splitlines()[-1].startswith("resnorm_ext: ") and "Traceback" not in result.stderr


def test_cuda_on_without_a_cuda_torch_fails(project: Project):
    result = project.run("setup.py", "build_ext", "--inplace", RESNORM_CUDA="on")
    assert "RESNORM_CUDA=on, but PyTorch 2.13.0+cpu is built without CUDA" in result.stderr


def test_cuda_on_without_a_toolkit_names_what_was_looked_for(project: Project):
    result = project.run(
        "setup.py", "build_ext", "--inplace", RESNORM_CUDA="on", STUB_TORCH_CUDA="99.0", CUDA_HOME="/nowhere"
    )
    assert result.returncode != 0
    if "needs a CUDA 99.0 toolkit" not in result.stderr:  # this machine has none at all
        for place in ("/nowhere/bin/nvcc (CUDA_HOME)", "CUDA_PATH (not set)", "nvcc on PATH", "/usr/local/cuda"):
            assert place in result.stderr


def test_unknown_cuda_setting_names_the_known_ones(project: Project):
    result = project.run("setup.py", "build_ext", "--inplace", RESNORM_CUDA="perhaps")
    assert "RESNORM_CUDA must be one of auto, on, off; got 'perhaps'" in result.stderr
