# SPDX-License-Identifier: BSD-3-Clause
"""The HTTP service: what it accepts, what it refuses, what it counts."""

from __future__ import annotations

import argparse
import asyncio
import os
import reprlib
import time
from collections.abc import Coroutine, Sequence
from typing import Annotated, Any, TypeVar

from batching import BatchError, BatchQueue
from classifier import Classifier, Encoded, Prediction
from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector
from pydantic import AfterValidator, BaseModel, BeforeValidator, Field
from pydantic_core import PydanticCustomError
from starlette.middleware.body_limit import RequestBodyLimitMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

T = TypeVar("T")


class Predictions(BaseModel):
    predictions: list[Prediction]


def _listed(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _unicode(text: str) -> str:
    """JSON's escapes can name halves of a character, which Python takes and a tokenizer does not."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise PydanticCustomError("not_unicode", "Input should be Unicode, without lone surrogates") from error
    return text


class Texts(BaseModel):
    texts: Annotated[
        list[Annotated[str, AfterValidator(_unicode)]],
        Field(min_length=1, fail_fast=True, description="texts, or one text"),
        BeforeValidator(_listed, json_schema_input_type=str | list[str]),
    ]


class Meters:
    """What GET /metrics shows. Where several processes serve, it is their sum, whichever answers."""

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()
        self.requests = Counter(
            "predict_requests", "Requests, by the status of the answer", ["status"], registry=registry
        )
        self.seconds = Histogram("predict_seconds", "From a request to its answer", registry=registry)
        self.texts = Counter("predict_texts", "Texts that were classified", registry=registry)
        self.tokens = Counter("predict_tokens", "Their tokens, without padding", registry=registry)
        self.batch = Histogram(
            "predict_batch_texts", "Texts of a batch", buckets=[2**n for n in range(10)], registry=registry
        )
        self.waiting = Gauge(
            "predict_waiting_texts",
            "Texts that were accepted and are not answered yet",
            multiprocess_mode="livesum",
            registry=registry,
        )

    def text(self) -> bytes:
        registry = self._registry
        if "PROMETHEUS_MULTIPROC_DIR" in os.environ:
            registry = CollectorRegistry()
            MultiProcessCollector(registry)
        return generate_latest(registry)


class Service:
    """Classifies the texts of requests, in batches over all of them.

    Attributes:
        stopping: whether nothing is accepted any more.
    """

    def __init__(self, classifier: Classifier, options: argparse.Namespace, meters: Meters) -> None:
        self.stopping = False
        self._classifier, self._options, self._meters = classifier, options, meters
        self._accepted = 0
        self._encoding = BatchQueue(classifier.encode, len, options.max_characters)
        self._classifying = BatchQueue(self._classify, lambda encoded: len(encoded.ids), options.max_batch_tokens)

    async def predict(self, texts: Sequence[str]) -> list[Prediction]:
        self._check(texts)
        self._count(len(texts))
        try:
            return await self._classifying.answer(await self._encoding.answer(texts))
        except BatchError as error:
            raise HTTPException(500, "The model failed") from error
        finally:
            self._count(-len(texts))

    def _check(self, texts: Sequence[str]) -> None:
        options = self._options
        characters = sum(map(len, texts))
        if len(texts) > options.max_texts:
            raise HTTPException(422, f"expected at most {options.max_texts} texts, but got {len(texts)}")
        if characters > options.max_characters:
            raise HTTPException(422, f"expected at most {options.max_characters} characters, but got {characters}")
        if self.stopping:
            raise _unavailable("stopping")
        if self._accepted + len(texts) > options.queue:
            raise _unavailable(f"busy: {self._accepted} texts are waiting")

    def _count(self, texts: int) -> None:
        self._accepted += texts
        self._meters.waiting.inc(texts)

    def _classify(self, batch: list[Encoded]) -> list[Prediction]:
        predictions = self._classifier.classify(batch)
        self._meters.batch.observe(len(batch))
        self._meters.texts.inc(len(batch))
        self._meters.tokens.inc(sum(len(encoded.ids) for encoded in batch))
        return predictions


def _unavailable(reason: str) -> HTTPException:
    return HTTPException(503, f"The service is {reason}", {"Retry-After": "1"})


class _Measure:
    """Middleware that counts and times the requests to /predict."""

    def __init__(self, app: ASGIApp, meters: Meters) -> None:
        self._app, self._meters = app, meters

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] != "/predict":
            return await self._app(scope, receive, send)
        began, status = time.perf_counter(), 500

        async def noted(message: Message) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        try:
            await self._app(scope, receive, noted)
        finally:
            self._meters.requests.labels(status).inc()
            self._meters.seconds.observe(time.perf_counter() - began)


def create_app(service: Service, options: argparse.Namespace, meters: Meters) -> FastAPI:
    app = FastAPI(title="Text classification")
    app.add_middleware(RequestBodyLimitMiddleware, max_body_size=options.max_body)
    app.add_middleware(_Measure, meters=meters)

    @app.post("/predict", response_model=Predictions)
    async def predict(body: Texts, request: Request) -> Predictions | Response:
        try:
            predictions = await _unless_gone(request, service.predict(body.texts))
        except asyncio.CancelledError:  # by uvicorn, where the time for what was accepted is over
            if service.stopping:
                raise _unavailable("stopping") from None
            raise
        if predictions is None:
            return Response(status_code=499)  # nobody reads it: as nginx, for the count
        return Predictions(predictions=predictions)

    @app.get("/health")
    async def health() -> dict[str, str]:
        if service.stopping:
            raise _unavailable("stopping")
        return {"status": "ready"}

    @app.get("/metrics")
    def metrics() -> Response:
        return Response(meters.text(), media_type=CONTENT_TYPE_LATEST)

    @app.exception_handler(RequestValidationError)
    async def explain(request: Request, error: RequestValidationError) -> JSONResponse:
        """As FastAPI's, but with little of what was sent: it may be long, or text that no JSON can carry."""
        details = []
        for each in error.errors():
            got = each["ctx"]["error"] if each["type"] == "json_invalid" else f"but got {reprlib.repr(each['input'])}"
            details.append({"type": each["type"], "loc": each["loc"], "msg": f"{each['msg']}, {got}"})
        return JSONResponse({"detail": details}, 422)

    return app


async def _unless_gone(request: Request, answer: Coroutine[Any, Any, T]) -> T | None:
    """What ``answer`` gives; None where the client goes away before, and nobody needs it."""
    tasks = [asyncio.ensure_future(answer), asyncio.ensure_future(_gone(request))]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        return tasks[0].result() if tasks[0].done() else None
    finally:
        for task in tasks:
            task.cancel()


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
