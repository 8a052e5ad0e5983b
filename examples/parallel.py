# SPDX-License-Identifier: BSD-3-Clause
"""What a training loop asks of the other processes; in one process alone each is what it is."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.tensor import DTensor


def world() -> tuple[int, int]:
    """How many processes there are, and which of them this is."""
    return (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)


def sums(*values: float, device: torch.device) -> list[float]:
    """Each value's sum over the processes."""
    if not dist.is_initialized():
        return list(values)
    total = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(total)
    return total.tolist()


def gathered(value: Any) -> list[Any]:
    """Every process's value."""
    every = [value]
    if dist.is_initialized():
        every = [None] * dist.get_world_size()
        dist.all_gather_object(every, value)
    return every


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def state(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Whole tensors by the names that they have in one process, on the CPU of the first; the others get none."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    return dict(zip(("model", "optimizer"), get_state_dict(model, optimizer, options=options), strict=True))


def load_state(model: torch.nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """What state() gave to the first, in every process."""
    options = StateDictOptions(full_state_dict=True)
    set_state_dict(
        model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"], options=options
    )


def random_state() -> dict[str, torch.Tensor]:
    """Of the generators that dropout draws from."""
    states = {"cpu": torch.get_rng_state()}
    return {**states, "cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else states


def set_random_state(states: list[dict[str, torch.Tensor]]) -> None:
    """This process's of those that every process had.

    Raises ValueError where there were not as many.
    """
    processes, rank = world()
    if len(states) != processes:
        raise ValueError(f"it is of {len(states)} processes, and these are {processes}")
    torch.set_rng_state(states[rank]["cpu"])
    if torch.cuda.is_available() and "cuda" in states[rank]:
        torch.cuda.set_rng_state(states[rank]["cuda"])
