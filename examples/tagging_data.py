# SPDX-License-Identifier: BSD-3-Clause
"""Sentences of Wikipedia with their marks: which words its editors have linked, or set in italics.

They are those of a hundred articles of 2016, under CC BY-SA 3.0, in a file that the source package gensim 0.13.4 on
PyPI carries to test itself with. pip fetches the package; none of its code runs, and nothing of it is unpacked to disk.
"""

from __future__ import annotations

import bz2
import io
import re
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path
from xml.etree import ElementTree

import mwparserfromhell
import pip_source
from errors import DataError
from mwparserfromhell.definitions import is_parsable
from mwparserfromhell.nodes import Comment, ExternalLink, HTMLEntity, Node, Tag, Text, Wikilink
from mwparserfromhell.wikicode import Wikicode
from pip_source import SourcePackage, reading

PACKAGE = SourcePackage(
    "gensim",
    "0.13.4",
    "gensim-0.13.4.tar.gz",
    "d2ddd700858742faffecea3df58fa9a8ab9074e84bdb7be800c978d74810e97c",
)
FILE = "gensim-0.13.4/gensim/test/test_data/enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"

TAGS = ("O", "B-italic", "I-italic", "B-link", "I-link")

_OBJECT = "\N{OBJECT REPLACEMENT CHARACTER}"  # stands for a template, a formula, a table and the like

# Italics without an end: in Wikipedia they end with the line or the footnote, in mwparserfromhell where the next begin.
_ITALICS = re.compile(r"''((?:(?!</?ref).)+?)''")
_LINE_OF_PROSE = re.compile(r"^[^*#:;|!={}_\n].*", re.MULTILINE)  # none of a list, a table or a heading
# Not after an initial or a short form, such as J. or Dr.
_BETWEEN_SENTENCES = re.compile(
    r"(?:(?<=[!?])|(?<=[\w)\"”]{2}[a-z0-9)\"”]\.)|(?<=[.!?][\"”)]))\s+(?=[\"“(]?[A-Z0-9])",
)
_LAST_OF_SENTENCE = re.compile(r"[.!?][\"”')]*$")
_NO_TEXT = re.compile(rf"[{_OBJECT}\[\]{{}}<>|=]|''")  # the rest is markup without an end
_WORD = re.compile(r"\w+|[^\w\s]")


@dataclass(frozen=True)
class Sentence:
    """A sentence's words, a tag for each, and its article, which no other part of a split may hold a piece of."""

    name: str
    words: list[str]
    tags: list[str]
    article: str


def fetch(folder: Path) -> Path:
    """The package's archive in ``folder``, downloaded where it is not there yet."""
    return pip_source.fetch(PACKAGE, folder)


def read(archive: Path) -> list[Sentence]:
    """All sentences of ``archive``, in its order."""
    with reading(archive, ElementTree.ParseError, ValueError):
        with tarfile.open(archive) as package:
            dump = bz2.decompress(package.extractfile(FILE).read())
        articles = list(_articles(dump))
    sentences = [sentence for title, text in articles for sentence in _sentences(title, text)]
    if not sentences:
        raise DataError(f"{archive}: expected articles in {FILE}, but there is none")
    return sentences


def split(sentences: Sequence[Sentence]) -> tuple[list[Sentence], list[Sentence]]:
    """Those of four fifths of the articles to train on, and those of the others to test on, each in random order."""
    return pip_source.split(sentences, [sentence.article for sentence in sentences])


def _articles(dump: bytes) -> Iterator[tuple[str, str]]:
    """Titles and texts, in Wikipedia's markup."""
    for _, page in ElementTree.iterparse(io.BytesIO(dump)):
        if page.tag.endswith("}page"):
            if page.findtext("{*}ns") == "0" and page.find("{*}redirect") is None:
                yield page.findtext("{*}title", ""), page.findtext("{*}revision/{*}text", "")
            page.clear()


def _sentences(title: str, text: str) -> Iterator[Sentence]:
    """Those of running text that are nothing but text."""
    text = _ITALICS.sub(r"<i>\1</i>", text.replace("'''", ""))  # bold is rare but for an article's own title
    shown = list(_shown(mwparserfromhell.parse(text, skip_style_tags=True)))
    prose = "".join(character for character, _ in shown)
    number = 0
    for line in _LINE_OF_PROSE.finditer(prose):
        begin = line.start()
        for end in [*(gap.start() for gap in _BETWEEN_SENTENCES.finditer(prose, *line.span())), line.end()]:
            sentence = prose[begin:end].strip()
            if _LAST_OF_SENTENCE.search(sentence) and not _NO_TEXT.search(sentence):
                number += 1
                marks = [mark for _, mark in shown[begin:end]]
                yield Sentence(f"{title} #{number}", *_tagged(prose[begin:end], marks), title)
            begin = end


def _shown(code: Wikicode, mark: Node | None = None) -> Iterator[tuple[str, Node | None]]:
    """The characters that a reader sees of ``code``, each with the outermost link or italics that it is in."""
    for node in code.nodes:
        content = _content(node)
        if isinstance(content, Wikicode):
            is_mark = isinstance(node, Wikilink) or (isinstance(node, Tag) and node.tag == "i")
            yield from _shown(content, node if is_mark and mark is None else mark)
        else:
            yield from zip(content if mark is None else content.replace("\n", " "), repeat(mark))


def _content(node: Node) -> Wikicode | str:
    """What is to be shown of ``node``."""
    match node:
        case Text():
            return node.value
        case HTMLEntity():
            return node.normalize()
        case Comment() | Tag(tag="ref"):
            return ""
        case Wikilink():
            namespace, colon, page = node.title.partition(":")
            if not colon or page.startswith(" "):
                return node.title if node.text is None else node.text
            return "" if namespace in ("File", "Image", "Category") else _OBJECT
        case ExternalLink(brackets=True):
            return node.title or ""
        case Tag(self_closing=True):
            return node.wiki_markup or ""  # which begins a line of a list
        case Tag() if is_parsable(str(node.tag)) and node.tag not in ("code", "table"):
            return node.contents
    return _OBJECT


def _tagged(sentence: str, marks: Sequence[Node | None]) -> tuple[list[str], list[str]]:
    """The words, and their tags: a word is in the mark that its first character is in."""
    words, tags, before = [], [], None
    for word in _WORD.finditer(sentence):
        mark = marks[word.start()]
        name = "link" if isinstance(mark, Wikilink) else "italic"
        words.append(word[0])
        tags.append("O" if mark is None else f"{'I' if mark is before else 'B'}-{name}")
        before = mark
    return words, tags
