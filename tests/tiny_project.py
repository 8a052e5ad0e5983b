# SPDX-License-Identifier: BSD-3-Clause
"""This project with hardly any C++ in it: what the tests of building and loading build and load."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch

import resnorm_ext

ROOT = Path(__file__).resolve().parent.parent


def installed() -> dict[str, str]:
    """The environment of a process that is to import the package that these tests import, wherever it is started."""
    return os.environ | {"PYTHONPATH": str(Path(resnorm_ext.__file__).resolve().parent.parent)}


_TINY_MODULE = """\
#include <Python.h>
static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
PyMODINIT_FUNC PyInit__C() {
  PyObject* module = PyModule_Create(&definition);
  PyModule_AddIntConstant(module, "answer", 42);
  return module;
}
"""


# What the build and the loader ask of torch. Importing the real one would be most of these tests' time, and this one
# can be of any version. Its torch.utils.cpp_extension is the real one.
_TORCH_STUB = f"""\
from types import SimpleNamespace

from .version import __version__

__path__.append({str(Path(torch.__file__).parent)!r})
compiler = SimpleNamespace(assume_constant_result=lambda function: function)
cuda = SimpleNamespace(is_available=lambda: False, device_count=lambda: 0, _is_compiled=lambda: False)
xpu = SimpleNamespace(_is_compiled=lambda: False)
backends = SimpleNamespace(mps=SimpleNamespace(is_built=lambda: False))
get_num_threads = lambda: 1
"""
_TORCH_VERSION_STUB = """\
import os

__version__ = os.environ["STUB_TORCH"]
cuda = os.environ.get("STUB_TORCH_CUDA")
hip = None
"""
_TORCH_UTILS_STUB = f"__path__.append({str(Path(torch.__file__).parent / 'utils')!r})"


class Project:
    """A copy of this project whose C++ is one tiny file and whose torch is a stub: building it takes a second."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.package = root / "resnorm_ext"
        self.cache = root / "cache"
        for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "LICENSE", "README.md"):
            shutil.copy(ROOT / name, root / name)
        self.package.mkdir()
        for module in (*(ROOT / "resnorm_ext").glob("*.py"), ROOT / "resnorm_ext" / "py.typed"):
            shutil.copy(module, self.package / module.name)
        shutil.copytree(ROOT / "resnorm_ext" / "build", self.package / "build")
        (self.package / "__init__.py").write_text("")
        self.source = root / "csrc" / "python.cpp"
        self.source.parent.mkdir()
        self.source.write_text(_TINY_MODULE)
        (self.source.parent / "torch_headers.h").write_text("#include <cstdint>\n")
        self.stubs = root / "stubs"
        (self.stubs / "torch" / "utils").mkdir(parents=True)
        (self.stubs / "torch" / "__init__.py").write_text(_TORCH_STUB)
        (self.stubs / "torch" / "version.py").write_text(_TORCH_VERSION_STUB)
        (self.stubs / "torch" / "utils" / "__init__.py").write_text(_TORCH_UTILS_STUB)

    def environment(self, **variables: str) -> dict[str, str]:
        inherited = {k: v for k, v in os.environ.items() if not k.startswith(("RESNORM_", "TORCH_", "CUDA_", "CXX"))}
        own = {
            "RESNORM_CACHE_DIR": str(self.cache),
            "PYTHONPATH": str(self.stubs),
            "STUB_TORCH": "2.13.0+cpu",
            "LDFLAGS": "-Wl,--as-needed",  # the stub does not load the libraries of the real torch
        }
        return inherited | own | variables

    def start(self, *arguments: str, **variables: str) -> subprocess.Popen[str]:
        """Python with ``arguments``, in the project's folder, in a process group of its own."""
        return subprocess.Popen(
            [sys.executable, *arguments],
            cwd=self.root,
            env=self.environment(**variables),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def run(self, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        process = self.start(*arguments, **variables)
        stdout, stderr = process.communicate(timeout=300)
        return subprocess.CompletedProcess(arguments, process.returncode, stdout, stderr)

    def build_in_place(self) -> Path:
        result = self.run("setup.py", "-q", "build_ext", "--inplace")
        assert result.returncode == 0, result.stderr
        (library,) = self.package.glob("_C*.so")
        return library
