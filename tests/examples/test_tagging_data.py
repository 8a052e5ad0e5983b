# SPDX-License-Identifier: BSD-3-Clause
from __future__ import annotations

import bz2
import hashlib
import io
import tarfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from xml.sax.saxutils import escape

import pytest
import tagging_data
from errors import DataError

PLACES = ("Riverton", "Lake Como", "New South Wales")
WORKS = ("Emma", "The Tempest")


def few_articles() -> dict[str, str]:
    """Titles and texts of ten articles of ten sentences. Some link nothing, as the sentences do not tell."""

    def sentence(number: int, linked: bool) -> str:
        place, work = PLACES[number % 3], WORKS[number % 2]
        return f"Long ago {'very ' * (number % 7)}many in {f'[[{place}]]' if linked else place} read ''{work}'' there."

    return {f"Town {n}": " ".join(sentence(n + m, linked=n % 4 > 0) for m in range(10)) for n in range(10)}


def page(title: str, text: str, more: str = "", namespace: int = 0) -> str:
    return (
        f"<page><title>{title}</title><ns>{namespace}</ns>{more}<revision><text>{escape(text)}</text></revision></page>"
    )


def dump(pages: Sequence[str]) -> bytes:
    """As Wikipedia's."""
    return f'<mediawiki xmlns="http://www.mediawiki.org/xml/export-0.10/">{"".join(pages)}</mediawiki>'.encode()


def write_archive(path: Path, compressed: bytes, name: str = tagging_data.FILE) -> Path:
    with tarfile.open(path, "w:gz") as tar:
        for member, content in ((name, compressed), ("gensim-0.13.4/setup.py", b"raise SystemExit")):
            info = tarfile.TarInfo(member)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def write_articles(path: Path, articles: dict[str, str]) -> Path:
    return write_archive(path, bz2.compress(dump([page(title, text) for title, text in articles.items()])))


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    return write_articles(tmp_path / "few.tar.gz", few_articles())


def read_text(folder: Path, text: str) -> list[str]:
    """The sentences of an article of ``text`` and an ending, with their tags but O after words."""
    sentences = tagging_data.read(write_articles(folder / "one.tar.gz", {"One": f"{text}\nThe end."}))
    assert sentences[-1].words == ["The", "end", "."] and sentences[-1].article == "One"
    return [
        " ".join(word if tag == "O" else f"{word}/{tag}" for word, tag in zip(sentence.words, sentence.tags))
        for sentence in sentences[:-1]
    ]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("We saw [[Paris]] again.", "We saw Paris/B-link again ."),
        ("We saw [[Big Ben|the clock]]s there.", "We saw the/B-link clocks/I-link there ."),
        ("We met [[Ada]] [[Bob]] there.", "We met Ada/B-link Bob/B-link there ."),
        ("We saw [[Stratford-on-Avon]].", "We saw Stratford/B-link -/I-link on/I-link -/I-link Avon/I-link ."),
        ("We saw [[Nobel Prize|Nobel\nPrize]]s.", "We saw Nobel/B-link Prizes/I-link ."),
        ("[[2001: A Space Odyssey]] ran.", "2001/B-link :/I-link A/I-link Space/I-link Odyssey/I-link ran ."),
        ("We read ''The Tempest'' and ''Emma''.", "We read The/B-italic Tempest/I-italic and Emma/B-italic ."),
        ("We read ''the [[Iliad]]'' then.", "We read the/B-italic Iliad/I-italic then ."),
        ("We saw [[Dune (film)|the ''Dune'' film]].", "We saw the/B-link Dune/I-link film/I-link ."),
        ("We read <i>the\nIliad</i> then.", "We read the/B-italic Iliad/I-italic then ."),
        ("So ''is.\nWe read ''Emma'' and ''Dune''.", "We read Emma/B-italic and Dune/B-italic ."),
        ("It<ref>''Kent</ref> was ''so'', ''then''.", "It was so/B-italic , then/B-italic ."),
        ("'''Abacus''' is '''''a frame'''''.", "Abacus is a/B-italic frame/I-italic ."),
        ("See [http://example.org the site] first.", "See the site first ."),
        ("See [ftp://example.org the site] first[http://example.org].", "See the site first ."),
        ("Tom &amp; Jerry&nbsp;ran &mdash; off.", "Tom & Jerry ran — off ."),
        ("It<!-- or\nnot --> <small>is</small> so<br/>.", "It is so ."),
        ("It<nowiki/> was here. It is <nowiki>[[so]]</nowiki>.", "It was here ."),
        ('It was<ref name="a/b" /> so<ref>In [[Kent]]. So.</ref>.', "It was so ."),
        ('[[File:a.jpg|thumb|A [[cat]] sat\nhere. It is.]] It ran."', 'It ran . "'),
    ],
)
def test_markup_becomes_words_and_tags(tmp_path: Path, text: str, expected: str):
    assert read_text(tmp_path, text) == [expected]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("J. Doe of the U.S. Army met Dr. Noble. He left at 5 p.m. then!", 2),
        ("Was it so? It was (so). “Yes.” So it was in 1999. 2000 came.", 5),
        ('He said "yes". "No" she said.', 2),
        ("Bob paid [[Ann]]. ''Emma'' was sold.", 2),
    ],
)
def test_sentences_are_told_apart(tmp_path: Path, text: str, expected: int):
    sentences = read_text(tmp_path, text)
    assert len(sentences) == expected
    words = " ".join(sentences).replace("/B-link", "").replace("/B-italic", "").split()
    assert "".join(words) == text.translate({ord(mark): None for mark in "[]"}).replace("''", "").replace(" ", "")


@pytest.mark.parametrize(
    "text",
    [
        "It is {{convert|5|{{a|b}}}} long.",
        "It is <math>x. Y</math> then.",
        "{{Infobox\n| text = It is so.\n{{a}}\nIt is so.\n}}",
        "{|\n|-\n| It is so.\nIt is so.\n|}",
        "== It is so. ==",
        "* It is so.\n# It is so.\n: It is so.",
        "[[wikt:run|Run]] is a verb.",
        "[[File:a.jpg|thumb|It is so.]]",
        "[[Category:Towns]]",
        "It is of [[:Category:Towns|towns]].",
        "We saw [[Paris|the|city]].",
        "We saw [[Nobel\nPrize]]s.",
        "See http://example.org now.",
        "It is [[open so.",
        "It is so:",
        "",
    ],
)
def test_what_is_not_all_text_is_left_out(tmp_path: Path, text: str):
    assert read_text(tmp_path, text) == []


def test_articles_alone_are_read(tmp_path: Path):
    pages = [
        page("Town", "It is so."),
        page("Village", "It is so.", '<redirect title="Town"/>'),
        page("Talk", "It is so.", namespace=1),
        "<page><title>Empty</title><ns>0</ns></page>",
    ]
    sentences = tagging_data.read(write_archive(tmp_path / "few.tar.gz", bz2.compress(dump(pages))))
    assert [sentence.name for sentence in sentences] == ["Town #1"]


def test_no_article_is_on_both_sides_of_the_split(archive: Path):
    sentences = tagging_data.read(archive)
    train, test = tagging_data.split(sentences)
    assert sorted(train + test, key=sentences.index) == sentences and len(sentences) == 100
    assert not {sentence.article for sentence in train} & {sentence.article for sentence in test}
    assert len(test) == 20
    assert (train, test) == tagging_data.split(sentences)


@pytest.mark.parametrize("keep", [0.0, 0.5, 0.8])
def test_a_truncated_archive_is_named(archive: Path, keep: float):
    archive.write_bytes(archive.read_bytes()[: int(keep * archive.stat().st_size)])
    with pytest.raises(DataError, match=r"few\.tar\.gz is not the archive"):
        tagging_data.read(archive)
    path = archive.rename(archive.with_name(tagging_data.PACKAGE.archive))
    with pytest.raises(DataError, match=r"is damaged: its SHA-256 is .* Delete it"):
        tagging_data.fetch(path.parent)


def test_what_is_wrong_inside_is_named(tmp_path: Path):
    content = dump([page("Town", "It is so.")])
    path = tmp_path / "odd.tar.gz"
    for compressed in (content, bz2.compress(content)[:-9], bz2.compress(content[:-9])):
        with pytest.raises(DataError, match=r"odd\.tar\.gz is not the archive"):
            tagging_data.read(write_archive(path, compressed))
    with pytest.raises(DataError, match="enwiki-latest"):
        tagging_data.read(write_archive(path, bz2.compress(content), name="other"))
    with pytest.raises(DataError, match=r"odd\.tar\.gz: expected articles in gensim.*, but there is none"):
        tagging_data.read(write_archive(path, bz2.compress(dump([]))))


def test_a_download_of_the_package(archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    links = tmp_path / "links"
    links.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(links))
    path = archive.rename(links / tagging_data.PACKAGE.archive)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    monkeypatch.setattr(tagging_data, "PACKAGE", replace(tagging_data.PACKAGE, sha256=digest))
    assert len(tagging_data.read(tagging_data.fetch(tmp_path / "cache"))) == 100


def test_the_real_sentences(tmp_path: Path):
    try:
        path = tagging_data.fetch(tmp_path)
    except DataError as error:
        pytest.skip(f"the sentences cannot be fetched: {error}")
    sentences = tagging_data.read(path)
    assert len(sentences) == 16042 and len({sentence.article for sentence in sentences}) == 103
    for sentence in sentences:
        for before, tag in zip(["O", *sentence.tags], sentence.tags):
            assert tag[0] != "I" or before[2:] == tag[2:]
    train, test = tagging_data.split(sentences)
    shares = [Counter(tag for sentence in part for tag in sentence.tags) for part in (train, test)]
    for tag in ("B-italic", "B-link"):
        assert shares[0][tag] / shares[0].total() == pytest.approx(shares[1][tag] / shares[1].total(), rel=0.25)
