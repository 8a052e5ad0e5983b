# SPDX-License-Identifier: BSD-3-Clause
"""How models are trained on a GPU, each against torch.nn's own encoder: the same losses, step by step."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from resnorm_ext.integrations import accelerate

from .device import DEVICE

pytestmark = pytest.mark.cuda

STEPS = 6


def encoder(dropout: float = 0.0) -> nn.Module:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(256, 4, 1024, dropout, "gelu", batch_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).to(DEVICE).train()


def batches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(4, 32, 256, generator=generator).to(DEVICE) for _ in range(STEPS)]


def loss_of(model: nn.Module, x: Tensor) -> Tensor:
    """Of telling some numbers of each token, which are among those it is told by."""
    return (model(x)[..., :8].float() - x[..., 8:16]).square().mean()


def losses(model: nn.Module, take_step: Callable[[nn.Module, Tensor], Tensor]) -> list[float]:
    return [take_step(model, x).item() for x in batches()]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_with_a_scaler(dtype):
    """A step whose gradients overflow is left out, by either model, and scales follow each other."""
    runs = []
    for model in (encoder(), accelerate(encoder())):
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
        scaler = torch.amp.GradScaler(DEVICE.type, init_scale=2.0**10, growth_interval=2)

        def take_step(model: nn.Module, x: Tensor) -> Tensor:
            with torch.autocast(DEVICE.type, dtype):
                loss = loss_of(model, x)
            scaler.scale(loss).backward()  # noqa: B023
            scaler.step(optimizer)  # noqa: B023
            scaler.update()  # noqa: B023
            optimizer.zero_grad()  # noqa: B023
            return loss

        before = losses(model, take_step)
        weights = copy.deepcopy(model.state_dict())
        scale = scaler.get_scale()
        take_step(model, batches()[0] * torch.inf)
        assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
        assert scaler.get_scale() == scale / 2
        runs.append((before, losses(model, take_step), scaler.get_scale()))
    assert runs[1][2] == runs[0][2] and runs[0][0][-1] < runs[0][0][0]
    for ours, theirs in zip(runs[1][:2], runs[0][:2]):
        torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=2e-2)


def in_a_graph(model: nn.Module, optimizer: torch.optim.Optimizer) -> Callable[[nn.Module, Tensor], Tensor]:
    """A step, forward to optimizer, as one CUDA graph; capture leaves weights as they were."""
    x, before = batches()[0].clone(), copy.deepcopy(model.state_dict())
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            optimizer.zero_grad()
            loss_of(model, x).backward()
            optimizer.step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    optimizer.zero_grad()
    with torch.cuda.graph(graph):
        loss = loss_of(model, x)
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        for name, value in model.state_dict().items():
            value.copy_(before[name])

    def take_step(model: nn.Module, other: Tensor) -> Tensor:
        x.copy_(other)
        graph.replay()
        return loss

    return take_step


def test_a_captured_step():
    """The curve of a step that is not captured; SGD has no state that the capture would leave changed."""
    eager = encoder()
    optimizer = torch.optim.SGD(eager.parameters(), lr=0.5)

    def take_step(model: nn.Module, x: Tensor) -> Tensor:
        optimizer.zero_grad()
        loss = loss_of(model, x)
        loss.backward()
        optimizer.step()
        return loss

    model = accelerate(encoder())
    captured = in_a_graph(model, torch.optim.SGD(model.parameters(), lr=0.5))
    torch.testing.assert_close(losses(model, captured), losses(eager, take_step), rtol=1e-3, atol=1e-3)


def test_each_replay_of_a_captured_step_drops_others():
    model = accelerate(encoder(dropout=0.3))
    take_step = in_a_graph(model, torch.optim.SGD(model.parameters(), lr=0.0))
    x = batches()[0]
    values = [take_step(model, x).item() for _ in range(4)]
    assert len(set(values)) == 4
