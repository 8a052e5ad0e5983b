# SPDX-License-Identifier: BSD-3-Clause
"""Calls from several Python threads at once."""

from __future__ import annotations

import threading
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


def test_other_python_threads_run_while_an_operator_does():
    """Were the interpreter's lock held, this thread could not count while the operator runs."""
    input = torch.randn(8192, 4096)
    done = threading.Event()

    def call():
        layer_norm(input, (4096,))
        done.set()

    caller = threading.Thread(target=call)
    switches = 0
    caller.start()
    while not done.is_set():
        switches += 1
    caller.join()
    assert switches > 100
