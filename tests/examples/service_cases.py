# SPDX-License-Identifier: BSD-3-Clause
"""A small classifier, and a service of it in this process."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import classifier
import httpx
import serve
import service
import torch
from prometheus_client.parser import text_string_to_metric_families
from transformers import AutoModelForSequenceClassification, AutoTokenizer

CLASSES = ["bad", "so so", "good", "odd"]
TEXTS = [f"{'very ' * (n % 9)}{'lovely awful film 7 !'.split()[n % 5]} number {n}" for n in range(40)]
LONG = "word " * 600  # of tokens; the model takes 512


def save_classifier(small_model: Path, folder: Path) -> Path:
    """One that gives texts different classes."""
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(small_model, id2label=dict(enumerate(CLASSES)))
    for weight in (each for each in model.parameters() if each.dim() > 1):
        torch.nn.init.normal_(weight, std=0.3)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(small_model).save_pretrained(folder)
    return folder


class Made:
    """A service in this process, and what its model was asked; ``hold`` keeps it from answering, ``fail`` makes it."""

    def __init__(self, folder: Path, *more: str) -> None:
        self.options = serve.parse(["--model", str(folder), *more])
        self.classifier = classifier.Classifier(folder, self.options.stock, self.options.dtype)
        self.lengths: list[int] = []
        self.go, self.fail = threading.Event(), threading.Event()
        self.go.set()
        self._classify, self.classifier.classify = self.classifier.classify, self.classify
        self.meters = service.Meters()
        self.service = service.Service(self.classifier, self.options, self.meters)
        self.app = service.create_app(self.service, self.options, self.meters)

    def classify(self, batch: list[classifier.Encoded]) -> list[classifier.Prediction]:
        self.lengths += [len(encoded.ids) for encoded in batch]
        assert self.go.wait(10)
        if self.fail.is_set():
            raise RuntimeError("out of luck")
        return self._classify(batch)

    def client(self) -> httpx.AsyncClient:
        return httpx.AsyncClient(transport=httpx.ASGITransport(self.app), base_url="http://service")

    def ask(self, **request: Any) -> httpx.Response:
        async def program() -> httpx.Response:
            async with self.client() as client:
                return await client.post("/predict", **request)

        return asyncio.run(program())

    def get(self, path: str) -> httpx.Response:
        async def program() -> httpx.Response:
            async with self.client() as client:
                return await client.get(path)

        return asyncio.run(program())

    def metrics(self) -> dict[str, float]:
        return samples(self.get("/metrics").text)


def samples(text: str) -> dict[str, float]:
    """By name, with the status where there is one."""
    families = text_string_to_metric_families(text)
    return {s.name + s.labels.get("status", s.labels.get("le", "")): s.value for f in families for s in f.samples}


def waiting_texts(address: str) -> float | None:
    return samples(httpx.get(f"{address}/metrics").text).get("predict_waiting_texts")


async def soon(condition: Callable[[], Any]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.001)
