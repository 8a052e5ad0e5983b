# SPDX-License-Identifier: BSD-3-Clause
from __future__ import annotations

import asyncio
import json
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import cycle
from pathlib import Path

import load_test
import psutil
import pytest
import sentiment_data
from load_test import Round, Variant

from .service_cases import save_classifier

LABELS = {"stock": ["good"], "accelerated": ["good", "bad"]}  # in turn


class Answers(BaseHTTPRequestHandler):
    """A service that gives labels in turn, and any ``status``."""

    protocol_version = "HTTP/1.1"
    status = 200
    port: int | None = None  # where there is another one, or nobody
    asked: list[str]
    labels: Iterator[str]

    def do_POST(self) -> None:
        (text,) = json.loads(self.rfile.read(int(self.headers["content-length"])))["texts"]
        self.asked.append(text)
        answer = json.dumps({"predictions": [{"label": next(self.labels)}]}).encode()
        self.send_response(self.status)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *arguments: object) -> None:
        pass


class Server(ThreadingHTTPServer):
    def handle_error(self, *_: object) -> None:
        """A client that has gone is no error here."""


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> dict[str, type[Answers]]:
    """What stands for serve.py, by the variant's name."""
    made = {name: type(name, (Answers,), {"asked": [], "labels": cycle(labels)}) for name, labels in LABELS.items()}

    @contextmanager
    def start(name: str, more: list[str], options: object, texts: list[str]) -> Iterator[Variant]:
        assert ("--stock" in more) == name.startswith("stock")
        fake = made[name.partition(",")[0]]
        with Server(("127.0.0.1", 0), fake) as server:
            thread = threading.Thread(target=server.serve_forever, args=(0.01,))
            thread.start()
            try:
                yield Variant(name, fake.port or server.server_port, psutil.Process(), cycle(enumerate(texts)))
            finally:
                server.shutdown()
                thread.join()

    monkeypatch.setattr(load_test, "start", start)
    return made


@pytest.fixture
def command(archive: Path) -> Callable[..., list[str]]:
    return lambda *more: ["--data", str(archive), "--seconds", "0.05", "--clients", "4", *map(str, more)]


def test_every_client_sends_the_texts_in_turn_and_labels_are_compared(fakes, command, archive: Path, capsys):
    assert load_test.main(command("--rounds", 2, "--clients", 1)) == 0
    texts = [example.text for example in sentiment_data.split(sentiment_data.read(archive))[1]]
    for fake in fakes.values():
        wanted = (texts * len(fake.asked))[: len(fake.asked)]
        assert fake.asked == wanted and len(wanted) > 2
    shown = capsys.readouterr().out
    for row in ("texts per second", "median latency, ms", "99th percentile, ms", "clients' CPU", "1 clients"):
        assert row in shown
    assert "stock, float32" in shown and "have the same label (" in shown and "100.00%" not in shown


def test_clients_ask_at_the_same_time(fakes, command):
    together = threading.Barrier(4, timeout=10)
    original = Answers.do_POST

    def all_four(self: Answers) -> None:
        together.wait()
        original(self)

    for fake in fakes.values():
        fake.do_POST = all_four
    assert load_test.main(command("--rounds", 1, "--clients", 4, "--seconds", 0)) == 0
    assert [len(fake.asked) for fake in fakes.values()] == [4, 4]


@pytest.mark.parametrize("fault", ["status", "closed", "not there"])
def test_an_answer_that_should_not_be_ends_it(fakes, command, capsys, fault: str):
    fakes["accelerated"].status = 503 if fault == "status" else 200
    if fault == "closed":
        fakes["accelerated"].do_POST = lambda self: setattr(self, "close_connection", True)
    elif fault == "not there":
        fakes["accelerated"].port = 1
    assert load_test.main(command()) == 1
    error = capsys.readouterr().err
    assert error.startswith("load_test: the service (accelerated, float32) failed: ") and error.count("\n") == 1
    if fault == "status":
        assert "expected status 200, but got http/1.1 503" in error


def test_a_signal_ends_it(fakes, command):
    def then_signal(self: Answers) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        Answers.do_POST(self)

    fakes["stock"].do_POST = then_signal
    assert load_test.main(command("--seconds", 60)) == 128 + signal.SIGTERM
    assert fakes["accelerated"].asked == []


def test_a_service_that_does_not_start_is_named(command, tmp_path: Path, capfd):
    assert load_test.main(command("--model", tmp_path)) == 1
    serve, load = capfd.readouterr().err.splitlines()
    assert serve.startswith(f"serve: {tmp_path} is no model that can be used: ")
    assert load == "load_test: the service (stock, float32) does not start: exit code 1"


def test_the_real_service(small_model: Path, tmp_path: Path):
    folder = save_classifier(small_model, tmp_path)
    options = load_test.parse(["--model", str(folder), "--seconds", "0", "--clients", "3"])
    with load_test.StopSignals() as stop, load_test.start("real", [], options, ["one", "two"]) as variant:
        asyncio.run(load_test.load(variant, options, stop))
        assert variant.process.is_running()
    assert not variant.process.is_running()
    assert set(variant.labels) == {0, 1} and len(variant.rounds[0].latencies) == 3
    assert 0 < max(variant.rounds[0].latencies) <= variant.rounds[0].seconds


def test_percentiles_are_of_what_was_measured():
    assert [Round(list(range(1, 201))).percentile(share) for share in (50, 99)] == [100, 198]
    assert Round([0.5]).percentile(99) == 0.5


@pytest.mark.parametrize("option", [("--clients", "0"), ("--seconds", "1e9"), ("--seconds", "nan"), ("--rounds", "-1")])
def test_options_out_of_range(option: tuple[str, str], capsys):
    with pytest.raises(SystemExit, match="2"):
        load_test.main(option)
    assert f"argument {option[0]}: expected a number" in capsys.readouterr().err
