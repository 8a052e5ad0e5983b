# SPDX-License-Identifier: BSD-3-Clause
"""Batches for training without padding: of about as many tokens each, not of as many sequences.

What a step costs is its real tokens, so batches of equal numbers of them keep memory and time even, and sequences of
any lengths go together. What has to be padded all the same, because the model takes a padded batch, is little where
lengths are alike, as they are within a batch here.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import Sampler


class TokenBudgetSampler(Sampler[list[int]]):
    """Batches of indices for a ``DataLoader``'s ``batch_sampler``, each of at most ``max_tokens`` tokens.

    The order of all sequences is shuffled; of ``window`` of them at a time batches of similar lengths are made; and
    their order is shuffled again. A wide window wastes less on padding, a narrow one is closer to a plain shuffle.

    Among several processes each takes its share of the batches, as many as every other: the last few are left out where
    their number is not a multiple.

    Args:
        lengths: tokens of each sequence.
        max_tokens: of a batch; a longer sequence is a batch of its own.
        window: sequences that are sorted together.
        shuffle: where False, windows are taken in order, and so are the batches of each; within a window sequences are
            sorted all the same, so that results are to be put back by their indices.
        seed: of the shuffles, together with the epoch.
        num_replicas, rank: of the processes; torch.distributed's where None, if it is initialised.

    Raises ValueError for a ``max_tokens`` or ``window`` below 1, for a ``rank`` not among ``num_replicas``, and where
    there are fewer batches than processes.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        max_tokens: int,
        *,
        window: int = 1024,
        shuffle: bool = True,
        seed: int = 0,
        num_replicas: int | None = None,
        rank: int | None = None,
    ) -> None:
        for name, value in (("max_tokens", max_tokens), ("window", window)):
            if value < 1:
                raise ValueError(f"expected {name} >= 1, but got {value}")
        distributed = dist.is_available() and dist.is_initialized()
        world = (dist.get_world_size(), dist.get_rank()) if distributed else (1, 0)
        self.num_replicas = world[0] if num_replicas is None else num_replicas
        self.rank = world[1] if rank is None else rank
        if not 0 <= self.rank < self.num_replicas:
            raise ValueError(f"expected rank to be from 0 to {self.num_replicas - 1}, but got {self.rank}")
        self.lengths = [int(length) for length in lengths]
        self.max_tokens, self.window, self.shuffle, self.seed = max_tokens, window, shuffle, seed
        self.epoch = 0
        self._batches: tuple[int, list[list[int]]] | None = None

    def set_epoch(self, epoch: int) -> None:
        """Another order; the same one in every process."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self._of_this_process())

    def __len__(self) -> int:
        return len(self._of_this_process())

    def _of_this_process(self) -> list[list[int]]:
        if self._batches is None or self._batches[0] != self.epoch:
            self._batches = self.epoch, self._make_batches()
        batches = self._batches[1]
        count = len(batches) // self.num_replicas
        if batches and count == 0:
            raise ValueError(f"expected {self.num_replicas} batches or more, one for each process: {len(batches)} came")
        return batches[self.rank : count * self.num_replicas : self.num_replicas]

    def _make_batches(self) -> list[list[int]]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)

        def shuffled(count: int) -> list[int]:
            return torch.randperm(count, generator=generator).tolist() if self.shuffle else list(range(count))

        order = shuffled(len(self.lengths))
        batches: list[list[int]] = []
        for begin in range(0, len(order), self.window):
            batches += self._cut(sorted(order[begin : begin + self.window], key=self.lengths.__getitem__))
        return [batches[index] for index in shuffled(len(batches))]

    def _cut(self, indices: Iterable[int]) -> Iterator[list[int]]:
        batch, tokens = [], 0
        for index in indices:
            if batch and tokens + self.lengths[index] > self.max_tokens:
                yield batch
                batch, tokens = [], 0
            batch.append(index)
            tokens += self.lengths[index]
        if batch:
            yield batch


class PackedSequences(NamedTuple):
    """Sequences one after another, as this package's modules take them.

    Attributes:
        tokens: ``(tokens, ...)``.
        cu_seqlens: int32 ``(sequences + 1,)``; sequence i is tokens ``cu_seqlens[i]`` up to ``cu_seqlens[i + 1]``.
        max_seqlen: the longest one's length.
    """

    tokens: Tensor
    cu_seqlens: Tensor
    max_seqlen: int


def pack_sequences(sequences: Sequence[Tensor]) -> PackedSequences:
    """``sequences``, each ``(length, ...)``, in one batch without padding: a ``DataLoader``'s ``collate_fn``.

    Raises ValueError where there is none, RuntimeError, as torch.cat does, where they differ in more than the length.
    """
    if not len(sequences):
        raise ValueError("expected one sequence or more, but got none")
    lengths = torch.tensor([len(sequence) for sequence in sequences])
    bounds = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
    return PackedSequences(torch.cat(list(sequences)), bounds, int(lengths.max()))
