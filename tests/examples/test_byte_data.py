# SPDX-License-Identifier: BSD-3-Clause
from __future__ import annotations

import inspect
import json
import re
from pathlib import Path

import byte_data
import language_model
import pytest
import torch
from byte_data import Document, Windows


@pytest.mark.parametrize(("context", "overlap"), [(8, 0), (8, 4), (8, 7), (5, 2), (2, 1)])
def test_every_byte_is_a_label_once(context: int, overlap: int):
    contents = [bytes(range(1, 1 + length)) for length in range(1, 30)]
    windows = Windows([Document(str(len(each)), each) for each in contents], context, overlap)
    assert windows.labelled() == b"".join(contents)
    assert len(windows.names) == len(windows)
    for name, item in zip(windows.names, windows):
        length, begin = map(int, re.fullmatch(r"(\d+) from byte (\d+)", name).groups())
        content = contents[length - 1]
        ids, labels = item["input_ids"].tolist(), item["labels"].tolist()
        assert bytes(ids) == (bytes([byte_data.START]) + content)[begin : begin + len(ids)]
        assert len(ids) == len(labels) == min(context, length - begin) and labels[-1] != byte_data.IGNORED
        assert labels == [
            byte_data.IGNORED if begin and place < overlap else content[begin + place] for place in range(len(ids))
        ]
    assert len(Windows([Document("", contents[-1])], context, overlap, limit=2)) == 2


def test_what_compression_adds():
    text = bytes(torch.randint(256, (4000,)).tolist())
    for compress in language_model.COMPRESSORS.values():
        assert 8 < byte_data.compressed_bits_per_byte(text, b"", compress) < 9
        assert byte_data.compressed_bits_per_byte(text, 3 * text, compress) < 1
    assert byte_data.compressed_bits_per_byte(b"12", b"345", lambda content: content[::2]) == 8 * (3 - 2) / 2


def test_pythons_documentation(documents: list[Document]):
    assert 1e6 < sum(len(document.content) for document in documents) < 1e7
    names = [document.name for document in documents]
    assert len(set(names)) == len(names) and "topic for" in names and "json/__init__.py" in names
    assert not any("test" in name.split("/") or name.startswith("_py") for name in names)
    known = " ".join(inspect.getdoc(json.dumps).partition("\n\n")[2].partition("\n\n")[0].split()).encode()
    assert b"skipkeys" in known
    found = [document.name for document in documents if known in b" ".join(document.content.split())]
    assert found == ["json/__init__.py"]

    train, test = byte_data.split(documents)
    assert sorted(train + test, key=documents.index) == documents and (train, test) == byte_data.split(documents)
    assert 0.07 < sum(len(document.content) for document in test) / sum(map(len, (d.content for d in documents))) < 0.13

    def paragraphs(part: list[Document]) -> set[bytes]:
        every = (paragraph for document in part for paragraph in re.split(rb"\n\s*\n", document.content))
        return {b" ".join(paragraph.split()) for paragraph in every}

    assert len(paragraphs(test)) > 500 and not paragraphs(train) & paragraphs(test)


def test_sources_are_read_in_their_order_and_do_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    source = (
        '"""One."""\nraise SystemExit\nclass A:\n    """Two."""\n    def f(): "Three."\nasync def g(): "Fo\\u00fcr."\n'
    )
    for name in ("a.py", "b/__init__.py", "b/_c.py", "_d.py", "_e/f.py", "test/g.py", "b/tests/h.py"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True, parents=True)
        path.write_text(source.replace("One", f"One of {name}") if name != "b/__init__.py" else "")
    monkeypatch.setattr(byte_data.sysconfig, "get_path", lambda _: str(tmp_path))
    monkeypatch.setattr(byte_data, "topics", {"if": "The if statement."})
    assert byte_data.python_documentation() == [
        Document("topic if", b"The if statement."),
        Document("a.py", "One of a.py.\n\nTwo.\n\nThree.\n\nFoür.".encode()),
    ]


def test_repeated_paragraphs_are_left_out():
    texts = {"one": "A  b.\n\n  C\n  d.\n", "two": "\nA\nb.\n \nNew.", "three": "C d.\n\n\nA b."}
    assert byte_data.without_repeats(texts) == [Document("one", b"A  b.\n\n  C\n  d."), Document("two", b"New.")]
