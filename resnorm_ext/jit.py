# SPDX-License-Identifier: BSD-3-Clause
"""Compiles the extension at first use, for exactly this machine's torch and compiler, and keeps it for the next time.

Each combination of sources, flags, torch, compiler and Python has a folder of its own under RESNORM_CACHE_DIR (default
``~/.cache/resnorm_ext``). A file lock lets one process compile while others wait; the kernel drops it when its holder
dies, however it dies. A library appears in its folder whole or not at all.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

from . import _extension, _library, _toolchain, build_config


def load(verbose: bool = False) -> ModuleType:
    """The extension module, compiled if the cache has none that fits; ``verbose`` shows the compilers' commands.

    Raises BuildError where it cannot be compiled, and RuntimeError where this process has already loaded another one.
    """
    toolchain = _detect()
    library = _cached_library(toolchain)
    _extension.check_not_loaded_from_elsewhere(library)
    if not _is_complete(library):
        _compile(toolchain, library, verbose)
    return _extension.load_library(library)


def find_cached() -> Path | None:
    """The library that load() would load without compiling anything."""
    library = _cached_library(_detect())
    return library if _is_complete(library) else None


def cache_directory() -> Path:
    if directory := os.environ.get("RESNORM_CACHE_DIR"):
        return Path(directory).expanduser().resolve()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").resolve() / "resnorm_ext"


def _detect() -> _toolchain.Toolchain:
    return _toolchain.detect(visible_architectures() or build_config.CUDA_ARCHITECTURES)


def visible_architectures() -> tuple[str, ...]:
    """Compute capabilities of this machine's GPUs. Asks the driver's tool: asking torch would start CUDA in this
    process, after which it can no longer fork."""
    command = ("nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader")
    try:
        listing = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return ()
    return tuple(sorted(set(listing.split()), key=_toolchain.architecture_order))


def _cached_library(toolchain: _toolchain.Toolchain) -> Path:
    name = f"{build_config.VERSION}+{toolchain.local_version}-{_library.key(toolchain)[:16]}"
    return cache_directory() / name / "_C.so"


def _is_complete(library: Path) -> bool:
    return library.is_file() and _library.info_path(library).is_file()


def _compile(toolchain: _toolchain.Toolchain, library: Path, verbose: bool) -> None:
    folder = library.parent
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _lock(folder.with_name(folder.name + ".lock")):
        if _is_complete(library):  # by another process, while this one waited
            return
        for abandoned in folder.parent.glob(f"{folder.name}.build-*"):  # by a process that was killed
            shutil.rmtree(abandoned, ignore_errors=True)
        with tempfile.TemporaryDirectory(prefix=f"{folder.name}.build-", dir=folder.parent) as scratch:
            with _Progress(toolchain, verbose) as progress:
                _run_build(toolchain, Path(scratch), progress)
            (built,) = Path(scratch).glob("lib/*/_C*.so")
            folder.mkdir(exist_ok=True)
            built.replace(library)
            _library.info_path(built).replace(_library.info_path(library))


def _run_build(toolchain: _toolchain.Toolchain, directory: Path, progress: Callable[[str], None]) -> None:
    """Compiles in a process of its own, because setuptools and PyTorch change the state of the one that they run in."""
    command = [sys.executable, "-m", f"{__package__}._build", "--build-lib", "lib", "--build-temp", "objects"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)}
    if toolchain.toolkit:
        environment["TORCH_CUDA_ARCH_LIST"] = ";".join(toolchain.toolkit.architectures)
    output = []
    process = subprocess.Popen(
        command,
        cwd=directory,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,  # so that it can be stopped with its compilers
    )
    with process:
        try:
            for line in process.stdout:
                output.append(line)
                progress(line)
        except BaseException:
            os.killpg(process.pid, signal.SIGTERM)
            raise
    if process.returncode != 0:
        raise _toolchain.BuildError(f"compiling resnorm_ext failed: {shlex.join(command)}\n{''.join(output)}")


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            _say("another process is compiling the C++ extension; waiting for it")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


class _Progress:
    """Says that compiling began and ended, and on a terminal how far it is."""

    def __init__(self, toolchain: _toolchain.Toolchain, verbose: bool) -> None:
        self.toolchain, self.verbose = toolchain, verbose
        self.terminal = sys.stderr.isatty() and not verbose
        cuda = toolchain.toolkit is not None
        self.finished, self.total = 0, len(build_config.sources(cuda=cuda))

    def __enter__(self) -> _Progress:
        _say(
            f"compiling the C++ extension for PyTorch {self.toolchain.torch}: {self.toolchain.kernels}. Once, about 4 "
            f"minutes on 2 cores, less on more; kept in {cache_directory()}"
        )
        self.start = time.monotonic()
        return self

    def __call__(self, line: str) -> None:
        self.finished += bool(re.match(r"\[\d+/\d+\] ", line))  # ninja's, one for each unit compiled
        if self.verbose:
            print(line, end="", file=sys.stderr, flush=True)
        elif self.terminal:
            elapsed = int(time.monotonic() - self.start)
            print(f"\r\033[K[{self.finished}/{self.total}] {elapsed} s", end="", file=sys.stderr, flush=True)

    def __exit__(self, kind: type | None, *_: object) -> None:
        if self.terminal:
            print("\r\033[K", end="", file=sys.stderr)
        if kind is None:
            _say(f"compiled in {time.monotonic() - self.start:.0f} s")


def _say(message: str) -> None:
    print(f"resnorm_ext: {message}", file=sys.stderr, flush=True)
