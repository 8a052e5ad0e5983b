# SPDX-License-Identifier: BSD-3-Clause
"""Short texts with their sentiment: reviews of films and products, and tweets, rated by some twenty people each.

They are those of Hutto and Gilbert's VADER (ICWSM 2014), which the source package vaderSentiment 0.5 on PyPI carries
under the MIT licence. pip fetches the package; none of its code runs, and nothing of it is unpacked to disk.
"""

from __future__ import annotations

import hashlib
import html
import io
import os
import re
import subprocess
import sys
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from command_line import DataError
from sklearn.model_selection import GroupShuffleSplit
from sklearn.utils import shuffle

CLASSES = ("negative", "neutral", "positive")
NEUTRAL = 0.5  # mean ratings, from -4 to 4, up to this far from 0 are neutral

ARCHIVE = "vaderSentiment-0.5.zip"
SHA256 = "5d97c37f3ef6e24eef331122e055dbedafeb6a56abfce0608b326701116ea49a"
INNER_ARCHIVE = "vaderSentiment-0.5/additional_resources/hutto_ICWSM_2014.tar.gz"
FILES = {
    "film": "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt",
    "product": "hutto_ICWSM_2014/amazonReviewSnippets_GroundTruth.txt",
    "tweet": "hutto_ICWSM_2014/tweets_GroundTruth.txt",
}

# pip asks a source package's setup.py for the package's name and version, even to download it. This stands where pip
# looks for setuptools, and answers instead.
_INERT_SETUPTOOLS = """
import pathlib, sys

__legacy__ = sys.modules[__name__]

def prepare_metadata_for_build_wheel(folder, config_settings=None):
    info = pathlib.Path(folder, "vadersentiment-0.5.dist-info")
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\\nName: vaderSentiment\\nVersion: 0.5\\n")
    return info.name
"""


@dataclass(frozen=True)
class Example:
    """A text, its class (an index into ``CLASSES``), and what no other part of a split may hold a piece of."""

    name: str
    text: str
    label: int
    group: str


def fetch(folder: Path) -> Path:
    """The package's archive in ``folder``, downloaded where it is not there yet."""
    path = folder / ARCHIVE
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            os.replace(_download(Path(scratch)), path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if digest != SHA256:
        raise DataError(f"{path} is damaged: its SHA-256 is {digest}, not {SHA256}. Delete it to have it fetched anew.")
    return path


def read(archive: Path) -> list[Example]:
    """All texts of ``archive``, in its order."""
    try:
        with zipfile.ZipFile(archive) as package:
            inner = io.BytesIO(package.read(INNER_ARCHIVE))
        with tarfile.open(fileobj=inner) as tar:
            contents = {source: tar.extractfile(name).read() for source, name in FILES.items()}
    except (OSError, EOFError, KeyError, zipfile.BadZipFile, tarfile.TarError, zlib.error) as error:
        raise DataError(f"{archive} is not the archive that was expected: {error}") from error
    return [example for source in FILES for example in _parse(archive, source, contents[source])]


def split(examples: Sequence[Example]) -> tuple[list[Example], list[Example]]:
    """Four fifths to train on and one to test on, always the same ones, each in random order; no group is in both."""
    splitter = GroupShuffleSplit(n_splits=1, test_size=0.2, random_state=0)
    parts = next(splitter.split(examples, groups=[example.group for example in examples]))
    train, test = ([examples[index] for index in shuffle(part, random_state=0)] for part in parts)
    return train, test


def _download(folder: Path) -> Path:
    setuptools = folder / "setuptools"
    setuptools.mkdir()
    (setuptools / "__init__.py").touch()
    (setuptools / "build_meta.py").write_text(_INERT_SETUPTOOLS)
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", ":all:", "--no-build-isolation"]
    command += ["--use-pep517", "--disable-pip-version-check", "--dest", str(folder), "vaderSentiment==0.5"]
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    pip = subprocess.run(command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if pip.returncode:
        reason = (pip.stderr or pip.stdout).strip().splitlines() or ["no reason given"]
        raise DataError(f"{' '.join(command[1:])} failed: {reason[-1]}")
    return folder / ARCHIVE


def _parse(archive: Path, source: str, content: bytes) -> Iterator[Example]:
    """Lines of an ID, the mean rating and the text, between tabs."""
    name = FILES[source]
    try:
        lines = content.decode("utf-8").rstrip().split("\n")
    except UnicodeDecodeError as error:
        raise DataError(f"{archive}: {name} is not UTF-8: {error}") from error
    for number, line in enumerate(lines, 1):
        try:
            id_, rating, text = line.split("\t")
            yield Example(
                f"{source} {id_}", html.unescape(text).strip(), _label(float(rating)), _group(source, id_, text)
            )
        except ValueError as error:
            raise DataError(
                f"{archive}: {name}, line {number}: expected an ID, a rating from -4 to 4 and a text between tabs, "
                f"but got {line[:60]!r}"
            ) from error


def _label(rating: float) -> int:
    if not -4 <= rating <= 4:
        raise ValueError(rating)
    return 0 if rating < -NEUTRAL else 2 if rating > NEUTRAL else 1


def _group(source: str, id_: str, text: str) -> str:
    """Sentences of one product's review share what their IDs begin with. Other IDs are single texts', some of which are
    there again with other punctuation and capitals."""
    return f"review {id_.partition('_')[0]}" if source == "product" else " ".join(re.findall(r"\w+", text.lower()))
