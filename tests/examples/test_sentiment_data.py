# SPDX-License-Identifier: BSD-3-Clause
from __future__ import annotations

import hashlib
import zipfile
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import sentiment_data
from errors import DataError

from .conftest import few_texts, write_archive


def test_texts_with_their_classes_and_groups(archive: Path):
    examples = {example.name: example for example in sentiment_data.read(archive)}
    assert len(examples) == 40 + 24 + 3
    assert [examples[f"film {n}"].label for n in range(3)] == [0, 1, 2]
    assert examples["tweet 7"].text == "Yay & yay. Again!"
    assert [examples[f"tweet {n}"].label for n in (7, 8, 9)] == [1, 2, 0]  # 0.5 is neutral still
    assert examples["tweet 7"].group == examples["tweet 8"].group != examples["tweet 9"].group
    assert examples["product 3_0"].group == examples["product 3_2"].group != examples["product 4_0"].group


def test_no_group_is_on_both_sides_of_the_split(archive: Path):
    examples = sentiment_data.read(archive)
    train, test = sentiment_data.split(examples)
    assert sorted(train + test, key=examples.index) == examples
    assert not {example.group for example in train} & {example.group for example in test}
    assert 0.1 < len(test) / len(examples) < 0.3
    assert (train, test) == sentiment_data.split(examples)


@pytest.mark.parametrize(
    ("line", "number"),
    [("12\tgood\tno number\r\n", 4), ("12\t4.5\tbeyond\r\n", 4), ("12\tno rating\r\n", 4), ("\r\n", 1)],
)
def test_a_line_that_is_not_as_expected_is_named(tmp_path: Path, line: str, number: int):
    texts = few_texts()
    texts["tweet"] = line if number == 1 else texts["tweet"] + line
    path = write_archive(tmp_path / "odd.zip", texts)
    with pytest.raises(DataError, match=rf"odd\.zip: .*tweets_GroundTruth\.txt, line {number}: expected an ID"):
        sentiment_data.read(path)


@pytest.mark.parametrize("keep", [0.5, 0.99, 0.0])
def test_a_truncated_archive_is_named(archive: Path, tmp_path: Path, keep: float):
    path = tmp_path / "cut.zip"
    path.write_bytes(archive.read_bytes()[: int(keep * archive.stat().st_size)])
    with pytest.raises(DataError, match=r"cut\.zip is not the archive"):
        sentiment_data.read(path)
    path.rename(tmp_path / sentiment_data.PACKAGE.archive)
    with pytest.raises(DataError, match=r"is damaged: its SHA-256 is .* Delete it"):
        sentiment_data.fetch(tmp_path)


def test_a_missing_file_is_named(tmp_path: Path):
    texts = few_texts()
    del texts["film"]
    with pytest.raises(DataError, match="movieReviewSnippets"):
        sentiment_data.read(write_archive(tmp_path / "few.zip", texts))


def test_a_download_runs_no_code_of_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    ran = tmp_path / "ran"
    links = tmp_path / "links"
    links.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(links))
    with pytest.raises(
        DataError, match=r"pip download .* failed: .*No matching distribution found for vaderSentiment==0\.5"
    ):
        sentiment_data.fetch(tmp_path / "cache")

    path = write_archive(links / sentiment_data.PACKAGE.archive, few_texts())
    with zipfile.ZipFile(path, "a") as package:
        package.writestr("vaderSentiment-0.5/setup.py", f"open({str(ran)!r}, 'w')\n")
        package.writestr(
            "vaderSentiment-0.5/pyproject.toml",
            '[build-system]\nrequires = []\nbuild-backend = "own"\nbackend-path = ["."]\n',
        )
        package.writestr("vaderSentiment-0.5/own.py", f"open({str(ran)!r}, 'w')\n")
    with pytest.raises(DataError, match="failed: "):  # another archive than the one that was looked at
        sentiment_data.fetch(tmp_path / "cache")
    assert not ran.exists() and not list((tmp_path / "cache").iterdir())

    path = write_archive(path, few_texts())
    with zipfile.ZipFile(path, "a") as package:
        package.writestr("vaderSentiment-0.5/setup.py", f"open({str(ran)!r}, 'w')\n")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    monkeypatch.setattr(sentiment_data, "PACKAGE", replace(sentiment_data.PACKAGE, sha256=digest))
    assert len(sentiment_data.read(sentiment_data.fetch(tmp_path / "cache"))) == 67
    assert not ran.exists()
    assert [each.name for each in (tmp_path / "cache").iterdir()] == [sentiment_data.PACKAGE.archive]


def test_the_real_texts(tmp_path: Path):
    try:
        path = sentiment_data.fetch(tmp_path)
    except DataError as error:
        pytest.skip(f"the texts cannot be fetched: {error}")
    assert [each.name for each in tmp_path.iterdir()] == [sentiment_data.PACKAGE.archive]
    examples = sentiment_data.read(path)
    sources = Counter(example.name.partition(" ")[0] for example in examples)
    assert sources == {"film": 10605, "product": 3708, "tweet": 4200}
    train, test = sentiment_data.split(examples)
    shares = [[Counter(each.label for each in part)[label] / len(part) for label in range(3)] for part in (train, test)]
    assert shares[0] == pytest.approx(shares[1], abs=0.02)
