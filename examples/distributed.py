# SPDX-License-Identifier: BSD-3-Clause
"""The training of text_classification.py in several processes, on CPUs or GPUs, each with its share of every batch:

    torchrun --nproc-per-node 2 examples/distributed.py --parallel fsdp

Without torchrun it is one process. Losses are those of one process, but for dropout's numbers, rounding, and, where the
texts are no multiple of the processes, a last batch that is filled up.
"""

from __future__ import annotations

import argparse
import copy
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

try:
    import checkpoint
    import parallel
    import text_classification
    import torch
    import training
    import variants
    from command_line import exit_code, training_parser
    from rich.console import Console
except ModuleNotFoundError as error:
    sys.exit(f"This example needs {error.name}: pip install 'resnorm_ext[examples]'")

import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

OUTPUT = Path("build/distributed")


def main(arguments: Sequence[str]) -> int:
    parser = training_parser(__doc__, OUTPUT)
    variants.add_options(parser)
    parser.add_argument(
        "--parallel", choices=("ddp", "fsdp"), default="ddp", help="all weights in every process, or a share (FSDP2)"
    )
    parser.set_defaults(only="accelerated")
    options = parser.parse_args(arguments)
    return exit_code("distributed", lambda: train_and_test(options))


def train_and_test(options: argparse.Namespace) -> int:
    with process_group() as device:
        first = parallel.world()[1] == 0
        console = Console(quiet=not first)
        task, test = text_classification.make_task(options, console)
        model = variants.prepare(task.model, options)
        trained = task.model = copy.deepcopy(model).to(device)
        if dist.is_initialized():
            task.model = DistributedDataParallel(trained) if options.parallel == "ddp" else fully_shard(trained)
        console.print(
            f"[bold]{options.only}[/bold]: {len(task.dataset):,} texts to train on, {len(test):,} to test on, "
            f"processes: {parallel.world()[0]}, on {device.type}"
        )
        run = training.train(task)
    if first:  # a checkpoint has all weights, whoever had them
        model.load_state_dict(checkpoint.load(task.folder / "checkpoint.pt")["model"])
        text_classification.keep_and_test(model, task, run, test)
    return 0


@contextmanager
def process_group() -> Iterator[torch.device]:
    """Joins the processes that torchrun started; each computes on the device that this gives."""
    gpus = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if gpus else torch.device("cpu")
    if gpus:
        torch.cuda.set_device(device)
    if not dist.is_torchelastic_launched():
        yield device
        return
    dist.init_process_group("nccl" if gpus else "gloo")
    yield device
    dist.destroy_process_group()  # not after an error: it would wait for what the others do not join in


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
