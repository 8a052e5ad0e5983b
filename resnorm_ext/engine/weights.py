# SPDX-License-Identifier: BSD-3-Clause
"""Whether weights are still what a copy of them was made from.

Seen are: other tensors or memory, whatever torch counts in a tensor's version (every write of it and of its views), and
writes through ``.data``, which has a count of its own (csrc/data_writes.h). What torch has no part in, writes through
numpy, DLPack, a storage or a pointer, shows only where one of a few sampled values changes.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from ..build.extension import extension

_generation = 0


def forget_all_weights() -> None:
    """Makes every ``WeightState`` stale, and forgets what operators have prepared."""
    global _generation
    _generation += 1
    extension.clear_layer_cache()


class WeightState:
    """What ``tensors`` are at present. To be made before they are read."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        # Parameters themselves, held in Python alone: torch.utils.swap_tensors refuses tensors that C++ or a weak
        # reference holds.
        self.tensors = list(tensors)
        self._generation = _generation
        self._watch = extension.DataWatch(self.tensors)
        self._now = self._look()

    def is_current(self) -> bool:
        return self._generation == _generation and self._look() == self._now

    def requires_grad(self) -> bool:
        """Whether any of the tensors does now."""
        return extension.any_requires_grad(self.tensors)

    def is_watchable(self) -> bool:
        """Whether changes are seen: tensors made in inference mode count no versions."""
        return not any(tensor.is_inference() for tensor in self.tensors)

    def _look(self) -> tuple[int, int]:
        return self._watch.writes(), extension.weight_fingerprint(self.tensors)
