# SPDX-License-Identifier: BSD-3-Clause
"""Calls from several Python threads at once."""

from __future__ import annotations

import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from resnorm_ext.functional import layer_norm

from .cases import FULL_CASES, require_grad

THREADS, CALLS = 4, 25


@pytest.mark.parametrize("case", FULL_CASES, ids=str)
def test_concurrent_calls_do_not_disturb_each_other(case):
    """Forward and backward, all threads on different data, each result compared with what one thread computes."""
    samples = [case.make_inputs((37 + seed, 300), seed=seed) for seed in range(THREADS)]

    def step(inputs):
        leaves = require_grad(inputs)
        outputs = case.ours(leaves)
        return [*outputs, *torch.autograd.grad(outputs, leaves.values(), [o.detach().cos() for o in outputs])]

    expected = [step(sample) for sample in samples]
    start = threading.Barrier(THREADS)

    def work(i: int) -> bool:
        start.wait()
        return all(
            torch.equal(actual, value)
            for _ in range(CALLS)
            for actual, value in zip(step(samples[i]), expected[i], strict=True)
        )

    with ThreadPoolExecutor(THREADS) as pool:
        assert all(pool.map(work, range(THREADS)))


def counts_during(function) -> list[int]:
    """How often this thread came to run during each of five calls in another."""
    count, counted = 0, []

    def call():
        for _ in range(5):
            before = count
            function()
            counted.append(count - before)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(60)  # threads run by turns only where one gives up the interpreter's lock by itself
    try:
        caller = threading.Thread(target=call)
        caller.start()
        while caller.is_alive():
            count += 1
            time.sleep(0)
    finally:
        sys.setswitchinterval(interval)
    return counted


def test_other_python_threads_run_while_an_operator_does():
    input = torch.randn(8192, 2048)
    assert max(counts_during(lambda: layer_norm(input, (2048,)))) > 10
    assert max(counts_during(lambda: sum(range(10**6)))) == 0, "what keeps the lock must not pass this test"
