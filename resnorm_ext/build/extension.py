# SPDX-License-Identifier: BSD-3-Clause
"""Finds and loads the C++ extension: built ahead of time, else compiled at first use, else one clear error.

A process holds one extension, because loading registers the operators and they can be registered once.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import json
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import torch

from . import config, jit, toolchain
from . import library as libraries

_PACKAGE = Path(__file__).resolve().parents[1]
_NAME = "resnorm_ext._C"
_lock = threading.RLock()
_loaded: ModuleType | None = None
_when_loaded: list[Callable[[ModuleType], None]] = []


def load_extension() -> ModuleType:
    """The extension module; the first call loads it, or compiles it where RESNORM_JIT (auto, 1, 0) says so.

    Raises ImportError, naming what was looked for and what to type, where there is none to load.
    """
    if _loaded is not None:
        return _loaded
    with _lock:
        if _loaded is not None:
            return _loaded
        choice = jit_choice()
        library = None if choice == "1" else find_built()
        if library is not None:
            check_built(library)
            return load_library(library)
        if choice == "0":
            raise ImportError(
                f"resnorm_ext has no C++ extension: looked for {_PACKAGE}/_C*.so, and RESNORM_JIT=0 forbids to compile "
                f"one now. {how_to_build()}, or unset RESNORM_JIT."
            )
        try:
            return load_library(jit.compiled_library())
        except toolchain.BuildError as error:
            raise ImportError(
                f"resnorm_ext has no C++ extension: looked for {_PACKAGE}/_C*.so, then tried to compile one. "
                f"{how_to_build()}, or mend what went wrong: {error}"
            ) from error


def load_if_built() -> None:
    """Loads what is built, so that an import is enough for programs that hold torch.ops.resnorm's operators: exported
    ones. Where something stands against it the first call will say what."""
    try:
        if jit_choice() != "1" and (library := find_built()) is not None:
            check_built(library)
            load_library(library)
    except (ImportError, RuntimeError, ValueError):
        pass


def when_loaded(callback: Callable[[ModuleType], None]) -> None:
    """Has ``callback`` called with the extension module when that is loaded; at once where it is."""
    with _lock:
        _when_loaded.append(callback)
        if _loaded is not None:
            callback(_loaded)


def assume_constant_result(function: Callable) -> Callable:
    """``torch.compiler.assume_constant_result`` without its import of torch._dynamo, which takes longer than torch."""
    function._dynamo_marked_constant = True
    return function


@assume_constant_result
def ensure_loaded() -> None:
    """Loads the extension; in code that torch.compile traces, while it traces."""
    load_extension()


class _Loaded:
    """Holds what the extension module holds."""


class _Lazy(_Loaded):
    """Becomes ``_Loaded``, whose attributes cost no more than a module's, when an attribute is first asked for."""

    def __getattr__(self, name: str) -> object:
        if name.startswith("__"):  # asked for by tools that look at objects, not by callers
            raise AttributeError(name)
        module = load_extension()
        self.__dict__.update(vars(module))
        self.__class__ = _Loaded
        return getattr(module, name)


extension = _Lazy()


def jit_choice() -> str:
    """RESNORM_JIT: ``auto`` compiles where nothing is built, ``1`` always (once, then from its cache), ``0`` never."""
    return toolchain.environment_choice("RESNORM_JIT", ("auto", "1", "0"))


def loaded() -> ModuleType | None:
    """The extension of this process, where one has been loaded."""
    return _loaded


def find_built() -> Path | None:
    """The extension that an installation or an in-place build put into the package."""
    for suffix in importlib.machinery.EXTENSION_SUFFIXES:
        if (library := _PACKAGE / f"_C{suffix}").is_file():
            return library
    return None


def find_usable() -> Path | None:
    """The library that is loaded, or would be without compiling anything."""
    if _loaded is not None:
        return Path(_loaded.__file__)
    choice = jit_choice()
    built = find_built() if choice != "1" else None
    return built or (jit.find_cached() if choice != "0" else None)


def read_info(library: Path) -> dict:
    """The description written beside a library when its build was complete."""
    path = libraries.info_path(library)
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ImportError(f"{library} has no readable {path.name} beside it ({error}). {how_to_build()}.") from error


def check_built(library: Path) -> None:
    """Raises ImportError where ``library`` was built for another torch: loading it could crash the process."""
    info = read_info(library)
    present, present_cuda = str(torch.__version__), torch.version.cuda
    same_version = config.minor_version(info["torch"]) == config.minor_version(present)
    same_cuda = info["cuda"] is None or info["torch_cuda"] == present_cuda  # without CUDA kernels in it any will do
    if not (same_version and same_cuda):
        raise ImportError(
            f"resnorm_ext was built for {_torch_name(info['torch'], info['torch_cuda'])}, "
            f"you have {_torch_name(present, present_cuda)} ({library}). "
            f"{how_to_build()}, or set RESNORM_JIT=1 to compile it at first use."
        )


def load_library(library: Path) -> ModuleType:
    """Imports ``library`` as the extension of this process."""
    global _loaded
    with _lock:
        if _loaded is not None:
            if Path(_loaded.__file__) == library:
                return _loaded
            raise RuntimeError(
                f"this process already uses {_loaded.__file__}, and it can load only one extension. Sources or "
                f"settings have changed since it was loaded, or another one is asked for: restart Python to use "
                f"{library}."
            )
        spec = importlib.util.spec_from_file_location(_NAME, library)
        try:
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
        except ImportError as error:
            raise ImportError(f"{library} cannot be loaded: {error}. {how_to_build()}.") from error
        for callback in _when_loaded:
            callback(module)
        sys.modules[_NAME] = _loaded = module
        return module


def how_to_build() -> str:
    """What to type for an extension that fits this torch."""
    checkout = _PACKAGE.parent
    if (checkout / "setup.py").is_file():
        return f"Build it: pip install --no-build-isolation -e {checkout}"
    fits = config.local_version(str(torch.__version__), torch.version.cuda)
    return f"Install the wheel resnorm_ext-{config.VERSION}+{fits}"


def _torch_name(version: str, cuda: str | None) -> str:
    return f"PyTorch {version.split('+')[0]} ({'CPU' if cuda is None else 'CUDA ' + cuda})"
