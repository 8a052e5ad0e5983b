# SPDX-License-Identifier: BSD-3-Clause
"""Compiles the extension at first use, for exactly this machine's torch, compiler and CPU, and keeps it for the next
time under RESNORM_CACHE_DIR (default ``~/.cache/resnorm_ext``), where nobody but this user and root may write.

Each combination of sources, flags, torch, compiler, instruction sets and Python has a folder there with its library,
which appears whole or not at all. What a toolchain compiles for a checkout lies in a folder beside them, where the next
build finds what it need not compile again. A file lock lets one process compile there while others wait; the kernel
drops it when its holders die, however they die.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import selectors
import shlex
import shutil
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from . import config, ninja
from . import library as libraries
from . import toolchain as toolchains
from .progress import Progress, say
from .toolchain import BuildError, Toolchain

# Libraries kept of a checkout that is edited: the one that was made last, and what running processes may yet load.
_KEPT_LIBRARIES = 3
# What other toolchains and checkouts have compiled, 300 MB each, goes when nobody has used it for a month.
_KEPT_SECONDS = 30 * 24 * 3600


def compiled_library() -> Path:
    """The library for this machine, compiled if the cache has none that fits. Raises BuildError where it cannot be
    compiled or kept, or others could have put another one in its place."""
    toolchain = detect()
    library = _cached_library(toolchain)
    try:
        if not _is_complete(library):
            library = _compile(toolchain, library)
        check_writers(cache_directory(), library.parent, library)
        return library
    except OSError as error:
        raise BuildError(
            f"the C++ extension cannot be compiled in {cache_directory()}: {error}. "
            "Name a folder that can be written in RESNORM_CACHE_DIR."
        ) from error


def find_cached() -> Path | None:
    """The library that compiled_library() would return without compiling anything."""
    library = _cached_library(detect())
    return library if _is_complete(library) else None


def cache_directory() -> Path:
    try:
        if directory := os.environ.get("RESNORM_CACHE_DIR"):
            return Path(directory).expanduser().resolve()
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").resolve() / "resnorm_ext"
    except RuntimeError as error:  # there is no home
        raise BuildError(f"{error} Name a folder for compiled extensions in RESNORM_CACHE_DIR.") from error


def detect() -> Toolchain:
    """What there is to build with, for this machine's GPUs and its CPU's best instruction set alone."""
    return toolchains.detect(visible_architectures() or config.CUDA_ARCHITECTURES, config.best_isas())


def visible_architectures() -> tuple[str, ...]:
    """Compute capabilities of this machine's GPUs. Asks the driver's tool: asking torch would start CUDA in this
    process, after which it can no longer fork."""
    command = ("nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader")
    try:
        listing = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return ()
    return tuple(sorted(set(listing.split()), key=toolchains.architecture_order))


def _workplace(toolchain: Toolchain) -> str:
    """Names a toolchain and a checkout."""
    where = hashlib.sha256(f"{toolchain.key} {libraries.python_abi()} {config.CSRC}".encode()).hexdigest()
    return f"{config.VERSION}+{toolchain.local_version}-{where[:12]}"


def _cached_library(toolchain: Toolchain) -> Path:
    return cache_directory() / f"{_workplace(toolchain)}-{libraries.key(toolchain)[:16]}" / "_C.so"


def check_writers(*paths: Path) -> None:
    """Raises BuildError where somebody other than this user and root could change one of ``paths``: what is loaded from
    there runs as this user."""
    for path in paths:
        status = path.stat()
        if status.st_uid not in (os.geteuid(), 0) or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            raise BuildError(
                f"{path} holds code that would run as you, and others can change it: expected it to belong to user "
                f"{os.geteuid()} or root and to be writable by nobody else, but got user {status.st_uid} and mode "
                f"{stat.S_IMODE(status.st_mode):04o}. Delete it, or name another folder in RESNORM_CACHE_DIR."
            )


def _is_complete(library: Path) -> bool:
    try:
        return library.is_file() and libraries.info_path(library).is_file()
    except PermissionError:
        return False


def _compile(toolchain: Toolchain, library: Path) -> Path:
    """``library``, or that of the sources as they are when they have been compiled."""
    cache = cache_directory()
    cache.mkdir(mode=0o755, parents=True, exist_ok=True)
    check_writers(cache)
    objects = cache / f"{_workplace(toolchain)}-objects"
    with _lock(cache / f"{objects.name}.lock") as lock:
        if _is_complete(library):  # by another process, while this one waited
            return library
        with Progress(f"{toolchain.kernels}, with PyTorch {toolchain.torch}; kept in {cache}") as progress:
            objects.mkdir(mode=0o755, exist_ok=True)
            check_writers(objects)
            _run_worker(toolchain, objects, lock, progress)
            while (now := _cached_library(toolchain)) != library:  # somebody has edited the sources meanwhile
                library = now
                _run_worker(toolchain, objects, lock, progress)
            _publish(objects / ninja.LIBRARY, toolchain, library)
        if not config.IS_CHECKOUT:  # nobody edits the sources of an installed package
            shutil.rmtree(objects, ignore_errors=True)
        libraries_made = sorted(cache.glob(f"{_workplace(toolchain)}-*/_C.so"), key=lambda path: path.stat().st_mtime)
        for superseded in libraries_made[:-_KEPT_LIBRARIES]:
            shutil.rmtree(superseded.parent, ignore_errors=True)
        for other in cache.glob("*-objects"):
            if other != objects and time.time() - other.stat().st_mtime > _KEPT_SECONDS:
                shutil.rmtree(other, ignore_errors=True)
    return library


def _run_worker(toolchain: Toolchain, folder: Path, lock: int, progress: Progress) -> None:
    command = [sys.executable, "-m", f"{__package__}.worker", str(folder), str(os.getpid()), str(lock)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)}
    process = subprocess.Popen(
        command,
        cwd=folder,  # which has no package of this name in it
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,  # Ctrl-C reaches this process alone, which stops the other
        pass_fds=[lock],  # held until the compilers are gone, also where this process dies before them
    )
    messages = []
    with process:
        try:
            for line in _lines(process):
                if not progress(line):
                    messages.append(line)
        except BaseException:
            process.terminate()
            raise
    if process.returncode != 0:
        compiler = f"{shlex.join(toolchain.compiler)} ({toolchain.compiler_version})"
        raise BuildError(
            f"compiling resnorm_ext with {compiler} failed; CXX can name another compiler. What was said:\n"
            + "\n".join(messages)
        )


def _lines(process: subprocess.Popen[bytes]) -> Iterator[str]:
    """What a process writes, a line at a time, and an empty one after each second in which nothing came."""
    rest = b""
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        while True:
            if not selector.select(timeout=1):
                yield ""
            elif chunk := os.read(process.stdout.fileno(), 1 << 16):
                *lines, rest = (rest + chunk).split(b"\n")
                yield from (line.decode(errors="replace") for line in lines)
            else:
                return


def _publish(built: Path, toolchain: Toolchain, library: Path) -> None:
    """Puts a library and its description into a folder that appears at once."""
    folder = built.with_name("finished")
    shutil.rmtree(folder, ignore_errors=True)  # of a process that was killed
    folder.mkdir(mode=0o755)
    shutil.copyfile(built, folder / library.name)
    (folder / library.name).chmod(0o644)
    libraries.info_path(folder / library.name).write_text(json.dumps(libraries.info(toolchain), indent=2) + "\n")
    shutil.rmtree(library.parent, ignore_errors=True)  # one that somebody has damaged
    folder.rename(library.parent)


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[int]:
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("another process is compiling the C++ extension; waiting for it")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield file.fileno()
