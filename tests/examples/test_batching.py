# SPDX-License-Identifier: BSD-3-Clause
from __future__ import annotations

import asyncio
import threading
import time

import pytest
from batching import BatchError, BatchQueue


class Held:
    """Computes when it is let to, notes the batches, and fails with a batch that has a negative number."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.started, self.go = threading.Semaphore(0), threading.Semaphore(0)

    def __call__(self, batch: list[int]) -> list[int]:
        self.batches.append(batch)
        self.started.release()
        assert self.go.acquire(timeout=10)
        if min(batch) < 0:
            raise RuntimeError("negative")
        return [10 * item for item in batch]

    async def start(self) -> None:
        """Until a batch is being computed; the event loop is free meanwhile."""
        while not self.started.acquire(blocking=False):
            await asyncio.sleep(0.001)


def ask(queue: BatchQueue, *items: int) -> asyncio.Task:
    return asyncio.ensure_future(queue.answer(items))


def test_what_waits_is_joined_in_order_up_to_the_budget():
    async def program() -> None:
        compute = Held()
        queue = BatchQueue(compute, cost=lambda item: item, budget=10)
        first = ask(queue, 1)
        await compute.start()
        others = [
            ask(queue, 4, 3),
            ask(queue, 5),
            ask(queue, 20),
            ask(queue, 1),
        ]  # 5 does not fit, so 1 waits behind it
        compute.go.release(10)
        assert await first == [10]
        assert await asyncio.gather(*others) == [[40, 30], [50], [200], [10]]
        assert compute.batches == [[1], [4, 3], [5], [20], [1]]

    asyncio.run(program())


def test_a_request_may_be_split_and_comes_back_in_its_order():
    async def program() -> None:
        compute = Held()
        compute.go.release(10)
        assert await BatchQueue(compute, lambda item: item, 10).answer([6, 3, 8, 2, 11]) == [60, 30, 80, 20, 110]
        assert compute.batches == [[6, 3], [8, 2], [11]]

    asyncio.run(program())


def test_an_idle_queue_computes_at_once_and_again_later():
    async def program() -> None:
        compute = Held()
        compute.go.release(10)
        queue = BatchQueue(compute, lambda item: 1, 10)
        for item in range(3):
            began = time.perf_counter()
            assert await queue.answer([item]) == [10 * item]
            assert time.perf_counter() - began < 1
        assert compute.batches == [[0], [1], [2]]

    asyncio.run(program())


def test_a_failure_is_its_batch_s_alone_and_logged(caplog: pytest.LogCaptureFixture):
    async def program() -> None:
        compute = Held()
        queue = BatchQueue(compute, lambda item: 1, 2)
        before = ask(queue, 1)
        await compute.start()
        with_it, split, after = ask(queue, 2), ask(queue, -1, 3), ask(queue, 4)
        compute.go.release(10)
        results = await asyncio.gather(before, with_it, split, after, return_exceptions=True)
        assert results[0] == [10] and results[3] == [40]
        assert [type(result) for result in results[1:3]] == [BatchError] * 2
        assert compute.batches[:2] == [[1], [2, -1]]
        assert await queue.answer([5]) == [50]

    asyncio.run(program())
    assert [record.getMessage() for record in caplog.records] == ["A batch of 2 failed"]
    assert "RuntimeError: negative" in caplog.text


def test_too_few_results_are_a_failure():
    async def program() -> None:
        with pytest.raises(BatchError):
            await BatchQueue(lambda batch: batch[:1], lambda item: 1, 10).answer([1, 2])

    asyncio.run(program())


def test_what_is_no_exception_is_a_failure_too():
    """As a panic in a tokenizer's Rust."""

    def panic(batch: list[int]) -> list[int]:
        raise type("Panic", (BaseException,), {})

    async def program() -> None:
        queue = BatchQueue(panic, lambda item: 1, 10)
        for _ in range(2):
            with pytest.raises(BatchError):
                await asyncio.wait_for(queue.answer([1]), 10)

    asyncio.run(program())


def test_what_is_cancelled_while_it_waits_is_never_computed():
    async def program() -> None:
        compute = Held()
        queue = BatchQueue(compute, lambda item: 1, 10)
        running = ask(queue, 1)
        await compute.start()
        gone, waiting = ask(queue, 2, 3), ask(queue, 4)
        await asyncio.sleep(0)
        gone.cancel()
        running.cancel()
        compute.go.release(10)
        assert await waiting == [40]
        assert compute.batches == [[1], [4]]

    asyncio.run(program())
