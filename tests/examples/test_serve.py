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
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

for needed in ("fastapi", "httpx", "prometheus_client", "uvicorn"):
    pytest.importorskip(needed)

import classifier  # noqa: E402
import httpx  # noqa: E402
import serve  # noqa: E402
import service  # noqa: E402
import uvicorn  # noqa: E402
import workers  # noqa: E402
from checkpoint import StopSignals  # noqa: E402
from prometheus_client.parser import text_string_to_metric_families  # noqa: E402
from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline  # noqa: E402

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


@pytest.fixture(scope="module")
def folder(small_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_classifier(small_model, tmp_path_factory.mktemp("classifier"))


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


@pytest.fixture(scope="module")
def made(folder: Path) -> Made:
    return Made(folder, "--max-texts", "8", "--max-characters", "4000", "--max-body", "20000", "--queue", "10")


@pytest.fixture(scope="module")
def expected(folder: Path) -> Callable[[str], dict[str, float]]:
    """transformers' own answer to a text alone."""
    classify = pipeline("text-classification", str(folder), top_k=None, truncation=True)
    return lambda text: {each["label"]: each["score"] for each in classify([text])[0]}


@pytest.mark.parametrize("how", [(), ("--stock",), ("--dtype", "bfloat16"), ("--max-batch-tokens", "30")])
def test_answers_are_those_of_transformers(folder: Path, expected, how: tuple[str, ...]):
    made = Made(folder, *how)
    requests = [TEXTS[:1], TEXTS[1:9], TEXTS[9], *([text] for text in TEXTS[10:]), [LONG, ""]]

    async def program() -> list[httpx.Response]:
        async with made.client() as client:
            return await asyncio.gather(*(client.post("/predict", json={"texts": texts}) for texts in requests))

    answers = asyncio.run(program())
    labels = set()
    for texts, answer in zip(requests, answers):
        texts = [texts] if isinstance(texts, str) else texts
        predictions = answer.raise_for_status().json()["predictions"]
        assert [each["truncated"] for each in predictions] == [text is LONG for text in texts]
        for text, prediction in zip(texts, predictions):
            wanted = expected(text)
            assert list(prediction["probabilities"]) == CLASSES
            assert prediction["probabilities"] == pytest.approx(wanted, abs=0.02 if "bfloat16" in how else 1e-5)
            assert prediction["label"] == max(prediction["probabilities"], key=prediction["probabilities"].get)
            labels.add(prediction["label"])
    assert len(labels) >= 2
    batches = made.metrics()["predict_batch_texts_count"]
    assert batches < len(TEXTS) / 2 or "--max-batch-tokens" in how
    assert max(made.lengths) == 512


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ('{"texts": ["a"', "JSON decode error, Expecting ',' delimiter"),
        ("[" * 5000, "error parsing the body"),
        ('"a"', "Input should be a valid dictionary"),
        ("{}", "Field required, but got {}"),
        ('{"text": "a"}', "Field required, but got {'text': 'a'}"),
        ('{"\\ud800": 1}', "Field required, but got {'\\\\ud800': 1}"),
        ('{"texts": []}', "List should have at least 1 item after validation, not 0"),
        ('{"texts": null}', "Input should be a valid list, but got None"),
        ('{"texts": ["a", 7]}', "Input should be a valid string, but got 7"),
        ('{"texts": ["a", "\\ud800"]}', "without lone surrogates, but got '\\\\ud800'"),
        (json.dumps({"texts": [1] * 5000}), "Input should be a valid string, but got 1"),
        (json.dumps({"texts": ["a"] * 9}), "expected at most 8 texts, but got 9"),
        (json.dumps({"texts": ["a" * 2000, "b" * 2001]}), "expected at most 4000 characters, but got 4001"),
    ],
)
def test_what_is_no_request_is_refused_and_explained(made: Made, content: str, reason: str):
    before = made.metrics()
    answer = made.ask(content=content, headers={"content-type": "application/json"})
    assert answer.status_code == (400 if "parsing" in reason else 422)
    detail = answer.json()["detail"]
    assert reason in json.dumps(detail, ensure_ascii=False) and len(answer.content) < 500
    status = f"predict_requests_total{answer.status_code}"
    assert made.metrics()[status] == before.get(status, 0) + 1
    assert made.ask(json={"texts": "a"}).status_code == 200


def test_other_ways_in_are_refused(made: Made):
    assert made.ask(content='{"texts": ["a"]}', headers={"content-type": "text/plain"}).status_code == 422
    assert made.get("/predict").status_code == 405
    assert made.get("/elsewhere").status_code == 404


@pytest.mark.parametrize("declared", [None, "30000", "10"])
def test_a_body_that_is_too_large_is_not_read(made: Made, declared: str | None):
    sent = 0

    async def chunks() -> AsyncIterator[bytes]:
        nonlocal sent
        for _ in range(1000):
            sent += 1000
            yield b" " * 1000

    headers = {"content-type": "application/json", **({"content-length": declared} if declared else {})}
    assert made.ask(content=chunks(), headers=headers).status_code == 413
    assert sent <= 21000
    assert made.ask(json={"texts": "a"}).status_code == 200


def test_a_full_queue_refuses_and_goes_on(made: Made):
    async def program() -> tuple[list[httpx.Response], list[httpx.Response]]:
        async with made.client() as client:
            made.go.clear()
            accepted = [asyncio.ensure_future(client.post("/predict", json={"texts": ["a"]})) for _ in range(3)]
            accepted.append(asyncio.ensure_future(client.post("/predict", json={"texts": ["b"] * 7})))
            await soon(lambda: made.service._accepted == 10)
            assert samples((await client.get("/metrics")).text)["predict_waiting_texts"] == 10
            assert (await client.get("/health")).status_code == 200
            refused = [await client.post("/predict", json={"texts": ["c"] * n}) for n in (1, 8)]
            made.go.set()
            return await asyncio.gather(*accepted), refused

    accepted, refused = asyncio.run(program())
    assert [answer.status_code for answer in accepted] == [200] * 4
    for answer in refused:
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
        assert answer.json()["detail"] == "The service is busy: 10 texts are waiting"
    assert made.ask(json={"texts": ["c"] * 8}).status_code == 200
    assert made.metrics()["predict_waiting_texts"] == 0


def test_a_client_that_goes_away_while_waiting_costs_nothing(made: Made):
    async def program() -> None:
        gone = asyncio.Event()
        body = [{"type": "http.request", "body": json.dumps({"texts": [TEXTS[8]] * 2}).encode()}]

        async def receive() -> dict[str, Any]:
            if body:
                return body.pop()
            await gone.wait()
            return {"type": "http.disconnect"}

        async def send(message: dict[str, Any]) -> None:
            pass

        headers = [(b"content-type", b"application/json")]
        scope = {"type": "http", "method": "POST", "path": "/predict", "query_string": b"", "headers": headers}
        async with made.client() as client:
            made.go.clear()
            first = asyncio.ensure_future(client.post("/predict", json={"texts": ["a"]}))
            await soon(lambda: made.lengths)
            leaves = asyncio.ensure_future(made.app(scope, receive, send))
            await soon(lambda: made.service._accepted == 3)
            last = asyncio.ensure_future(client.post("/predict", json={"texts": ["b"]}))
            gone.set()
            await asyncio.wait_for(leaves, 10)
            made.go.set()
            assert (await first).status_code == (await last).status_code == 200

    made.lengths.clear()
    asyncio.run(program())
    assert made.lengths == [3, 3]
    metrics = made.metrics()
    assert metrics["predict_requests_total499"] == 1 and metrics["predict_waiting_texts"] == 0


def test_a_failure_of_the_model_is_its_requests_alone(made: Made, caplog: pytest.LogCaptureFixture):
    made.fail.set()
    answer = made.ask(json={"texts": ["a", "b"]})
    made.fail.clear()
    assert (answer.status_code, answer.json()) == (500, {"detail": "The model failed"})
    assert "RuntimeError: out of luck" in caplog.text
    assert made.ask(json={"texts": ["a", "b"]}).status_code == 200
    assert made.metrics()["predict_requests_total500"] == 1


def test_metrics_count_what_was_served(folder: Path):
    made = Made(folder)
    for texts in (TEXTS[:5], TEXTS[5], [LONG]):
        assert made.ask(json={"texts": texts}).status_code == 200
    metrics = made.metrics()
    tokens = AutoTokenizer.from_pretrained(folder)(TEXTS[:6]).input_ids
    assert metrics["predict_tokens_total"] == sum(map(len, tokens)) + 512
    assert metrics["predict_texts_total"] == metrics["predict_batch_texts_sum"] == 7
    assert metrics["predict_batch_texts_count"] == metrics["predict_seconds_count"] == 3
    assert (metrics["predict_batch_texts_bucket1.0"], metrics["predict_batch_texts_bucket8.0"]) == (2, 3)
    assert metrics["predict_requests_total200"] == 3 and metrics["predict_seconds_sum"] > 0


def test_a_stopping_service_accepts_nothing(folder: Path):
    made = Made(folder)
    assert made.get("/health").json() == {"status": "ready"}
    server = serve._Server(uvicorn.Config(made.app, log_config=None), made.service, parent=None)
    server.handle_exit(signal.SIGTERM, None)
    assert made.get("/health").status_code == made.ask(json={"texts": "a"}).status_code == 503
    assert made.get("/metrics").status_code == 200


def test_a_worker_ends_with_the_process_that_started_it(folder: Path, monkeypatch: pytest.MonkeyPatch):
    made = Made(folder)
    server = serve._Server(uvicorn.Config(made.app, log_config=None), made.service, os.getppid())
    assert not asyncio.run(server.on_tick(1))
    monkeypatch.setattr(os, "getppid", lambda: 1)
    assert asyncio.run(server.on_tick(1)) and made.service.stopping


@contextmanager
def served(made: Made, **more: Any) -> Iterator[tuple[serve._Server, int]]:
    """By uvicorn, in a thread, at this port."""
    with serve.bind("127.0.0.1", 0) as listening:
        port = listening.getsockname()[1]
        config = uvicorn.Config(made.app, lifespan="off", log_config=None, **more)
        server = serve._Server(config, made.service, parent=None)
        thread = threading.Thread(target=server.run, args=([listening],))
        thread.start()
        try:
            asyncio.run(soon(lambda: server.started))
            yield server, port
        finally:
            server.should_exit = True
            thread.join(timeout=10)
            assert not thread.is_alive()


@pytest.fixture(scope="module")
def live(made: Made) -> Iterator[int]:
    with served(made) as (_, port):
        yield port


def test_an_answer_does_not_wait_for_an_acknowledgement(made: Made):
    """As it would, for 40 ms, by Nagle's algorithm."""
    with served(made) as (server, port), httpx.Client() as client:
        assert client.post(f"http://127.0.0.1:{port}/predict", json={"texts": "a"}).status_code == 200
        (connection,) = server.server_state.connections
        accepted = connection.transport.get_extra_info("socket")
        assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) == 1


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (b"POST /predict HTTP/1.1\r\nhost: a\r\ncontent-length: 30000\r\n\r\n", 413),
        (
            b"POST /predict HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n"
            + b"2710\r\n%b\r\n" % (b" " * 10000) * 3,
            413,
        ),
        (b"POST /predict HTTP/1.1\r\nhost: a\r\ncontent-length: minus\r\n\r\n", 400),
        (b"no HTTP at all\r\n\r\n", 400),
    ],
    ids=["declared", "chunked", "no-number", "no-http"],
)
def test_what_arrives_is_refused_and_serving_goes_on(live: int, sent: bytes, status: int):
    with socket.create_connection(("127.0.0.1", live), timeout=10) as raw:
        raw.sendall(sent.replace(b"content-length", b"content-type: application/json\r\ncontent-length"))
        assert raw.recv(1000).startswith(b"HTTP/1.1 %d " % status)
    answer = httpx.post(f"http://127.0.0.1:{live}/predict", json={"texts": "a"})
    assert answer.status_code == 200


def test_a_client_that_closes_its_connection_is_noticed(made: Made, live: int):
    address, content = f"http://127.0.0.1:{live}", b'{"texts": "a"}'
    request = b"POST /predict HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%b"
    request %= len(content), content
    made.lengths.clear()
    made.go.clear()
    with socket.create_connection(("127.0.0.1", live), timeout=10) as first:
        first.sendall(request)
        asyncio.run(soon(lambda: made.lengths))
        with socket.create_connection(("127.0.0.1", live)) as gone:
            gone.sendall(request)
            asyncio.run(soon(lambda: waiting_texts(address) == 2))
        asyncio.run(soon(lambda: waiting_texts(address) == 1))
        made.go.set()
        assert first.recv(1000).startswith(b"HTTP/1.1 200 ")
    assert made.lengths == [3]


def test_what_is_not_answered_in_time_at_a_stop_is_refused(folder: Path):
    made = Made(folder)
    made.go.clear()
    with served(made, timeout_graceful_shutdown=1) as (server, port), ThreadPoolExecutor(1) as threads:
        answer = threads.submit(httpx.post, f"http://127.0.0.1:{port}/predict", json={"texts": "a"}, timeout=10)
        asyncio.run(soon(lambda: made.lengths))
        server.handle_exit(signal.SIGTERM, None)
        refused = answer.result()
    made.go.set()
    assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")


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
    assert "expected a number from" in (error := capsys.readouterr().err) or "has no room for" in error


def test_nodes_are_read_as_linux_writes_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(workers, "NODES", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2, 5, 8})
    assert workers.numa_nodes() == [[0, 1, 2, 5, 8]]
    for name, cpus in {"node0": "0-1,4,8-9\n", "node1": "2-3,5-7\n", "node2": "\n", "node3": "10\n"}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "cpulist").write_text(cpus)
    assert workers.numa_nodes() == [[0, 1, 8], [2, 5]]  # node2 has memory alone, and node3 is for others


def test_processes_share_out_the_nodes():
    nodes = [[0, 1, 2], [3, 4, 5]]
    assert workers.cpu_sets(nodes, None) == [{0, 1, 2}, {3, 4, 5}]
    assert workers.cpu_sets(nodes, 1) == [{0, 1, 2, 3, 4, 5}]
    assert workers.cpu_sets(nodes, 3) == [{0, 2}, {3, 4, 5}, {1}]
    assert workers.cpu_sets([[0, 1]], 2) == [{0}, {1}]
    assert workers.cpu_sets([[0, 1]], 3) == [{0, 1}] * 3


def test_this_machine_s_nodes():
    assert sorted(cpu for node in workers.numa_nodes() for cpu in node) == sorted(os.sched_getaffinity(0))


def worker(code: str) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-c", f"import signal, time\n{code}"], stdout=subprocess.PIPE)


WAITS = "signal.signal(signal.SIGTERM, lambda *_: exit(0))\nprint('ready', flush=True)\ntime.sleep(60)"


@pytest.mark.parametrize(("code", "shown"), [("exit(3)", "3"), ("exit(0)", "0"), ("signal.raise_signal(9)", "-9")])
def test_a_worker_that_ends_ends_all(capsys, code: str, shown: str):
    other = worker(WAITS)
    other.stdout.readline()
    ended = worker(code)
    with StopSignals() as stop:
        assert workers._supervise([other, ended], stop) == 1
    assert other.returncode == 0
    assert capsys.readouterr().err == f"serve: process {ended.pid} ended with exit code {shown}: all end\n"


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
