# SPDX-License-Identifier: BSD-3-Clause
from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import classifier
import httpx
import pytest
import serve
import torch
import workers
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from .service_cases import LONG, TEXTS, samples, save_classifier, soon, waiting_texts


@pytest.fixture(scope="module")
def folder(small_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_classifier(small_model, tmp_path_factory.mktemp("classifier"))


def error_of(capsys: pytest.CaptureFixture, *arguments: object) -> str:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(serve._Server, "run", lambda *_: pytest.fail("it serves"))
        assert serve.main([str(each) for each in arguments]) == 1
    error = capsys.readouterr().err
    assert error.startswith("serve: ") and error.count("\n") == 1
    return error


def damaged(folder: Path, copy: Path, how: str) -> Path:
    shutil.copytree(folder, copy)
    weights, config = copy / "model.safetensors", json.loads((copy / "config.json").read_text())
    if how == "cut weights":
        weights.write_bytes(weights.read_bytes()[:-1000])
    elif how == "no weights":
        weights.unlink()
    elif how == "no tokenizer":
        for file in copy.glob("tokenizer*"):
            file.unlink()
    elif how == "another tokenizer":
        tokenizer = AutoTokenizer.from_pretrained(copy)
        tokenizer.add_tokens(["resnorm"])
        tokenizer.save_pretrained(copy)
    elif how == "not finite":
        model = AutoModelForSequenceClassification.from_pretrained(copy)
        torch.nn.init.constant_(model.classifier.bias, torch.nan)
        model.save_pretrained(copy)
    elif how == "many labels":
        config["problem_type"] = "multi_label_classification"
    (copy / "config.json").write_text("{" if how == "no config" else json.dumps(config))
    return copy


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("cut weights", "incomplete metadata"),
        ("no weights", "model.safetensors"),
        ("no config", "not a valid JSON"),
        ("no tokenizer", "its tokenizer has no words"),
        ("another tokenizer", "its tokenizer has 30523 tokens, the model 30522"),
        ("not finite", "its probabilities are not finite"),
        ("many labels", "its labels are not classes"),
    ],
)
def test_a_folder_that_is_no_classifier_is_named(folder: Path, tmp_path: Path, capsys, how: str, reason: str):
    copy = damaged(folder, tmp_path / "copy", how)
    error = error_of(capsys, "--model", copy, "--port", 0)
    assert f"{copy} is no " in error and reason in error


def test_a_model_without_a_head_is_refused(small_model: Path, capsys):
    assert "it has no classifier.bias, classifier.weight" in error_of(capsys, "--model", small_model, "--port", 0)


def test_a_signal_while_the_model_is_loaded_ends_the_program(folder: Path, monkeypatch: pytest.MonkeyPatch):
    class Interrupted(classifier.Classifier):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(serve, "Classifier", Interrupted)
    monkeypatch.setattr(serve._Server, "run", lambda *_: pytest.fail("it serves"))
    assert serve.main(["--model", str(folder), "--port", "0"]) == 0


def test_a_missing_folder_is_named_with_what_makes_one(tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    error = error_of(capsys)
    assert str(serve.MODEL) in error and "python examples/text_classification.py" in error


def test_an_address_that_cannot_be_had_is_named(folder: Path, capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        error = error_of(capsys, "--model", folder, "--port", port)
        assert error == f"serve: cannot serve at 127.0.0.1, port {port}: Address already in use\n"
    assert "cannot serve at nowhere.invalid, port 8000: " in error_of(
        capsys, "--model", folder, "--host", "nowhere.invalid"
    )
    assert "cannot serve at .., port 8000: " in error_of(capsys, "--model", folder, "--host", "..")


@pytest.mark.parametrize("option", [("--port", "70000"), ("--processes", "0"), ("--queue", "some"), ("--queue", "63")])
def test_options_out_of_range(option: tuple[str, str], capsys):
    with pytest.raises(SystemExit, match="2"):
        serve.main(option)
    assert "expected a number" in (error := capsys.readouterr().err) or "has no room for" in error


@contextmanager
def running(folder: Path, *more: object) -> Iterator[tuple[subprocess.Popen, list[int], str]]:
    """A service as from a shell, whose processes these are, and its address."""
    command = [sys.executable, serve.__file__, "--model", folder, "--port", 0, "--grace", 30, *more]
    service = subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        lines = [service.stdout.readline() for _ in range(2 if "--processes" in more else 1)]
        found = [
            re.fullmatch(r"Serving at (http://127\.0\.0\.1:\d+), process (\d+), \d+ threads\n", line) for line in lines
        ]
        yield service, [int(each[2]) for each in found], found[0][1]
    finally:
        if service.poll() is None:
            service.terminate()
        service.communicate(timeout=60)


def refuses(address: str) -> bool:
    try:
        httpx.get(f"{address}/health")
    except httpx.ConnectError:
        return True
    return False


def stop_with_requests_in_flight(service: subprocess.Popen, address: str, number: int, clients: int) -> None:
    """All are answered, nobody else is let in, and the service ends well."""

    def ask() -> httpx.Response:
        return httpx.post(f"{address}/predict", json={"texts": [LONG] * 100}, timeout=60)

    with ThreadPoolExecutor(clients) as threads:
        answers = [threads.submit(ask) for _ in range(clients)]
        asyncio.run(soon(lambda: waiting_texts(address) == 100 * clients))
        service.send_signal(number)
        assert not any(answer.done() for answer in answers)
        asyncio.run(soon(lambda: refuses(address)))
        assert service.poll() is None
        for answer in answers:
            assert len(answer.result().raise_for_status().json()["predictions"]) == 100
    assert service.wait(timeout=30) == 0
    assert service.stderr.read() == ""


LIMITS = ("--max-texts", 100, "--max-characters", 10**6, "--max-batch-tokens", 1)


def test_a_signal_lets_what_was_accepted_be_answered(folder: Path):
    with running(folder, *LIMITS) as (service, processes, address):
        assert processes == [service.pid]
        stop_with_requests_in_flight(service, address, signal.SIGTERM, clients=1)


def test_two_processes_share_port_cpus_metrics_and_signals(folder: Path):
    with running(folder, "--processes", 2, *LIMITS) as (service, processes, address):
        wanted = workers.cpu_sets(workers.numa_nodes(), 2)
        assert sorted(sorted(os.sched_getaffinity(process)) for process in processes) == sorted(map(sorted, wanted))
        for text in TEXTS[:10]:
            assert httpx.post(f"{address}/predict", json={"texts": text}).status_code == 200
        for _ in range(5):
            assert samples(httpx.get(f"{address}/metrics").text)["predict_requests_total200"] == 10
        stop_with_requests_in_flight(service, address, signal.SIGINT, clients=3)
    with pytest.raises(ProcessLookupError):
        os.kill(processes[0], 0)
