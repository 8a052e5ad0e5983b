# SPDX-License-Identifier: BSD-3-Clause
"""What makes inference fast besides the operators: batches without padding."""

from .packing import Packing, pack, packing_of, packing_of_sequences, unpack

__all__ = ["Packing", "pack", "packing_of", "packing_of_sequences", "unpack"]
