# SPDX-License-Identifier: BSD-3-Clause
"""CUDA graphs, streams, devices, and what memory a call takes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from operators.cases import FULL_NORM_CASES, require_grad
from operators.exactness import incoming_gradients

from resnorm_ext.functional import add_layer_norm, layer_norm

from .device import DEVICE, results_and_gradients, seed_at, to_device

pytestmark = pytest.mark.cuda


def captured(function: Callable[[], list]) -> tuple[Callable[[], None], list]:
    """(replay, results): ``function`` as a CUDA graph, and what each replay writes."""
    function()  # what is made at first use is no part of a graph
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = function()
    return graph.replay, results


def step(case, leaves, grads, seed) -> Callable[[], list]:
    """A forward and a backward pass."""

    def call() -> list[torch.Tensor]:
        results = case.ours(leaves, seed=seed)
        return [*(r.detach() for r in results), *torch.autograd.grad(results, list(leaves.values()), grads)]

    return call


class TestGraphs:
    @pytest.mark.parametrize("cols", [33, 768, 1001, 4096, 20480, 140000])
    @pytest.mark.parametrize("case", FULL_NORM_CASES, ids=str)
    def test_replays_compute_from_what_is_in_the_inputs_now(self, case, cols):
        inputs = to_device(case.make_inputs((5, cols)))
        grads = to_device(incoming_gradients(case, inputs))
        replay, results = captured(step(case, require_grad(inputs), grads, seed_at(inputs)))
        for number in range(3):
            new = to_device(case.make_inputs((5, cols), seed=number))
            for name, tensor in new.items():
                inputs[name].copy_(tensor)  # shares its memory with the leaf
            replay()
            expected = step(case, require_grad(new), grads, seed_at(new))()
            assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))

    @pytest.mark.parametrize("case", FULL_NORM_CASES[1:], ids=str)
    def test_each_replay_draws_a_seed_and_the_backward_keeps_to_it(self, case):
        leaves = require_grad(to_device(case.make_inputs((64, 768))))
        zeros, ones = (torch.full((64, 768), value, device=DEVICE) for value in (0.0, 1.0))
        for name, leaf in leaves.items():
            leaf.data.copy_(ones if name == "input" else torch.zeros_like(leaf))
        grads = [zeros, ones][-len(case.outputs) :]  # of the sum alone
        replay, results = captured(step(case, leaves, grads, None))
        masks = []
        for _ in range(4):
            replay()
            s, grad_input = results[len(case.outputs) - 1], results[len(case.outputs)]
            assert torch.equal(s, grad_input)
            masks.append(s.clone())
        assert all(0.2 < (mask == 0).double().mean() < 0.4 for mask in masks)
        assert not any(torch.equal(masks[i], masks[j]) for i in range(4) for j in range(i))

    def test_two_graphs_at_once(self):
        """They share no workspace."""
        case = FULL_NORM_CASES[-1]
        inputs = [to_device(case.make_inputs((4096, 1024), seed=seed)) for seed in (1, 2)]
        grads = to_device(incoming_gradients(case, inputs[0]))
        steps = [step(case, require_grad(each), grads, seed_at(each)) for each in inputs]
        expected = [call() for call in steps]
        graphs = [captured(call) for call in steps]
        streams = [torch.cuda.Stream() for _ in graphs]
        for _ in range(20):
            for stream, (replay, _) in zip(streams, graphs, strict=True):
                with torch.cuda.stream(stream):
                    for _ in range(5):
                        replay()
            torch.cuda.synchronize()
            for (_, results), values in zip(graphs, expected, strict=True):
                assert all(torch.equal(a, b) for a, b in zip(results, values, strict=True))


@pytest.mark.parametrize("cols", [768, 1001, 20480, 140000])
@pytest.mark.parametrize("case", FULL_NORM_CASES, ids=str)
def test_kernels_run_on_the_current_stream(case, cols):
    """After what is late there: on another stream they would find zeros."""
    inputs = to_device(case.make_inputs((16, cols)))
    grads = to_device(incoming_gradients(case, inputs))
    expected = results_and_gradients(case, inputs, grads)
    late, late_grads = {n: torch.zeros_like(t) for n, t in inputs.items()}, [torch.zeros_like(g) for g in grads]
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)  # cycles, some ten milliseconds
        torch._foreach_copy_([*late.values(), *late_grads], [*inputs.values(), *grads])
        actual = results_and_gradients(case, late, late_grads)
    stream.synchronize()
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def test_kernels_run_on_their_tensors_device():
    if torch.cuda.device_count() < 2:
        pytest.skip("there is one GPU")
    for case in FULL_NORM_CASES:
        for cols in (768, 20480, 140000):
            inputs = case.make_inputs((5, cols))
            grads = incoming_gradients(case, inputs)
            outcomes = []
            for device in ("cuda:0", "cuda:1"):
                there = {name: tensor.to(device) for name, tensor in inputs.items()}
                results, gradients = results_and_gradients(case, there, [grad.to(device) for grad in grads])
                assert all(tensor.device == torch.device(device) for tensor in (*results, *gradients.values()))
                outcomes.append([tensor.cpu() for tensor in (*results, *gradients.values())])
            assert torch.cuda.current_device() == 0
            torch.testing.assert_close(*outcomes)


@pytest.mark.parametrize("cols", [33, 768, 1001, 4096, 20480, 140000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", FULL_NORM_CASES, ids=str)
def test_a_forward_into_given_tensors_allocates_nothing(case, dtype, cols):
    inputs = to_device(case.make_inputs((64, cols), dtype))
    seed = seed_at(inputs)
    outs = tuple(torch.empty_like(inputs["input"]) for _ in case.outputs)

    def call() -> None:
        case.ours(inputs, seed=seed, out=outs if case.prenorm else outs[0])

    call()
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    call()
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before


@pytest.mark.parametrize("cols", [256, 768, 1001, 4096, 20480, 65536, 140000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("input_bias", [False, True])
def test_workspace_of_the_backward(input_bias, dtype, cols):
    """At most a row of float32 sums for each parameter and multiprocessor."""
    rows = 4000 if cols < 10_000 else 600
    x, r, grad = (torch.randn(rows, cols, device=DEVICE).to(dtype) for _ in range(3))
    vectors = [torch.randn(cols, device=DEVICE).to(dtype).requires_grad_() for _ in range(2 + input_bias)]
    weight, bias = vectors[:2]
    leaves = [x.requires_grad_(), *vectors]
    if input_bias:
        y = add_layer_norm(x, r, (cols,), weight, bias, input_bias=vectors[2])
    else:
        y = layer_norm(x, (cols,), weight, bias)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_stats()["requested_bytes.all.current"]
    gradients = torch.autograd.grad(y, leaves, grad)
    peak = torch.cuda.memory_stats()["requested_bytes.all.peak"] - before
    results = sum(gradient.nbytes for gradient in gradients)
    multiprocessors = torch.cuda.get_device_properties(DEVICE).multi_processor_count
    assert peak - results <= multiprocessors * cols * (12 if input_bias else 8)
