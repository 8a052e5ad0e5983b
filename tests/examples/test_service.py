# SPDX-License-Identifier: BSD-3-Clause
from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import serve
import uvicorn
from transformers import AutoTokenizer, pipeline

from .service_cases import CLASSES, LONG, TEXTS, Made, samples, save_classifier, soon, waiting_texts


@pytest.fixture(scope="module")
def folder(small_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_classifier(small_model, tmp_path_factory.mktemp("classifier"))


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
