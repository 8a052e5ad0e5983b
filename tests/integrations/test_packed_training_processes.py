# SPDX-License-Identifier: BSD-3-Clause
"""Training on packed batches in two processes, each with half of every batch: the losses are those of one process that
trains transformers' own model on whole batches."""

from __future__ import annotations

import json
import os
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from resnorm_ext.integrations import accelerate

from .families import taken
from .packed_cases import PACKED, Batch, batch_of, build, layers_of

if not (dist.is_available() and dist.is_gloo_available()):
    pytest.skip("no gloo", allow_module_level=True)

WORLD = 2


def ddp(model: nn.Module, **options) -> nn.Module:
    return nn.parallel.DistributedDataParallel(model, **options)


def ddp_checkpointed(model: nn.Module) -> nn.Module:
    model.gradient_checkpointing_enable({"use_reentrant": False})
    return ddp(model)


def fsdp(model: nn.Module, *parts: nn.Module) -> nn.Module:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for part in (*parts, model):
        fully_shard(part, mesh=mesh)
    return model


# How a model is distributed, and whether its calls are packed then.
WAYS: dict[str, tuple[Callable[[nn.Module], nn.Module], bool]] = {
    "DDP": (ddp, True),
    "DDP, static graph": (lambda model: ddp(model, static_graph=True), True),
    "DDP, checkpointed": (ddp_checkpointed, True),
    "FSDP2 of the model": (fsdp, True),
    "FSDP2 of encoder and head": (lambda model: fsdp(model, model.bert), True),
    "FSDP2 of each layer": (lambda model: fsdp(model, *layers_of(model)), False),  # their class is FSDP's own then
}


def batches() -> list[Batch]:
    """Of as many sequences for each process, of other lengths."""
    torch.manual_seed(1)
    lengths = [(9, 4, 1, 8), (1, 2, 9, 9), (5, 5, 6, 1)]
    return [batch_of(each) | {"labels": torch.randint(0, 2, (4,))} for each in lengths]


def losses(model: nn.Module, parts: list[Batch]) -> list[Tensor]:
    optimizer, values = torch.optim.SGD(model.parameters(), lr=0.1), []
    for part in parts:
        optimizer.zero_grad()
        loss = model(**part).loss
        loss.backward()
        optimizer.step()
        values.append(loss.detach())
    return values


def initial() -> nn.Module:
    torch.manual_seed(0)
    return build()


def process(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), WORLD)
    dist.init_process_group("gloo", rank=rank, world_size=WORLD, store=store, timeout=timedelta(seconds=60))
    parts = [{name: tensor.chunk(WORLD)[rank] for name, tensor in batch.items()} for batch in batches()]
    results = {}
    for name, (distribute, _) in WAYS.items():
        try:
            accelerated = accelerate(initial(), padding="skip")
            values = losses(distribute(accelerated), parts)
            results[name] = {"losses": [float(value) for value in values], "packed": taken(accelerated) == PACKED}
        except Exception:
            results[name] = {"error": traceback.format_exc()}
    (folder / f"{rank}.json").write_text(json.dumps(results))
    dist.barrier()
    dist.destroy_process_group()
    # Not by the interpreter's end, where threads of torch's process groups that are still there abort the process.
    os._exit(0)


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> list[dict]:
    folder = tmp_path_factory.mktemp("processes")
    torch.multiprocessing.spawn(process, (folder,), WORLD)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(WORLD)]


@pytest.mark.parametrize("way", WAYS)
def test_losses_are_those_of_one_process(way, results):
    ranks = [each[way] for each in results]
    for each in ranks:
        assert "error" not in each, each["error"]
        assert each["packed"] == WAYS[way][1]
    expected = [float(value) for value in losses(initial(), batches())]
    actual = [sum(each["losses"][index] for each in ranks) / WORLD for index in range(len(expected))]
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
