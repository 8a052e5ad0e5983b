# SPDX-License-Identifier: BSD-3-Clause
"""A queue that joins what waits: while one batch computes in a thread, the next one gathers."""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Generic, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

_log = logging.getLogger(__name__)


class BatchError(Exception):
    """The batch that held an item could not be computed; the log says why."""


class BatchQueue(Generic[Item, Result]):
    """Computes items in batches, first come, first served, one batch at a time, in a thread of its own.

    A batch is what waits when the one before is done, up to ``budget`` of ``cost``, and one item at least. Nothing
    waits for company: an item that finds the thread idle is computed at once, with those that arrive together with it.
    """

    def __init__(
        self, compute: Callable[[list[Item]], Sequence[Result]], cost: Callable[[Item], int], budget: int
    ) -> None:
        self._compute, self._cost, self._budget = compute, cost, budget
        self._waiting: OrderedDict[asyncio.Future[Result], Item] = OrderedDict()
        self._thread = ThreadPoolExecutor(1)
        self._working: asyncio.Task[None] | None = None

    async def answer(self, items: Sequence[Item]) -> list[Result]:
        """The results for ``items``, in their order. Where this is cancelled, those still waiting are never computed.

        Raises BatchError where a batch with one of them fails.
        """
        loop = asyncio.get_running_loop()
        futures = [loop.create_future() for _ in items]
        self._waiting.update(zip(futures, items, strict=True))
        if self._working is None or self._working.done():
            self._working = loop.create_task(self._work())
        try:
            return await asyncio.gather(*futures)
        finally:
            for future in futures:
                self._waiting.pop(future, None)

    async def _work(self) -> None:
        loop = asyncio.get_running_loop()
        while self._waiting:
            batch = self._take()
            try:
                results = await loop.run_in_executor(self._thread, self._compute, list(batch.values()))
                answers = dict(zip(batch, results, strict=True))
            except asyncio.CancelledError:
                raise
            except BaseException:  # a tokenizer's panic is no Exception
                _log.exception("A batch of %d failed", len(batch))
                for future in batch:
                    if not future.done():
                        future.set_exception(BatchError())
            else:
                for future, result in answers.items():
                    if not future.done():  # nor cancelled
                        future.set_result(result)

    def _take(self) -> dict[asyncio.Future[Result], Item]:
        """The next batch, no longer waiting."""
        batch: dict[asyncio.Future[Result], Item] = {}
        total = 0
        for future, item in self._waiting.items():
            total += self._cost(item)
            if batch and total > self._budget:
                break
            batch[future] = item
        for future in batch:
            del self._waiting[future]
        return batch
