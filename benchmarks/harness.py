# SPDX-License-Identifier: BSD-3-Clause
"""What every suite shares: options, the settings it runs under, and the description of where it ran."""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import torch

from resnorm_ext.build.extension import extension
from resnorm_ext.info import cpu

# A fresh output of a few MB costs more in page faults than the kernel that fills it, and which call pays depends on
# their order. With these the allocator keeps its pages, for every contender alike.
ALLOCATOR = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "20000000000"}

PEERS = (
    "ctranslate2",
    "flash-attn",
    "liger-kernel",
    "onnxruntime",
    "openvino",
    "quack-kernels",
    "triton",
    "zentorch",
)


def parser(description: str) -> argparse.ArgumentParser:
    """The options that all suites have."""
    options = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--threads", type=int, default=torch.get_num_threads())
    options.add_argument("--samples", type=int, default=25, help="samples of each contender in each case")
    options.add_argument(
        "--isa", choices=("avx2", "avx512"), help="holds PyTorch and resnorm_ext to these instructions"
    )
    options.add_argument(
        "--allocator",
        choices=("kept", "default"),
        default="kept",
        help="kept: malloc keeps freed pages, so that no call pays for fresh ones; default: as the system has it",
    )
    options.add_argument("--output", type=Path, help="append the results to this file")
    return options


def start(options: argparse.Namespace) -> argparse.Namespace:
    """Restarts Python where the settings asked for have to be there when it starts."""
    settings = {name: value if options.allocator == "kept" else None for name, value in ALLOCATOR.items()}
    if options.isa:
        settings |= {"ATEN_CPU_CAPABILITY": options.isa, "RESNORM_CPU_ISA": options.isa}
    if any(os.environ.get(name) != value for name, value in settings.items()):
        wanted = {name: value for name, value in {**os.environ, **settings}.items() if value is not None}
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], wanted)
    torch.set_num_threads(options.threads)
    return options


def environment(options: argparse.Namespace, device: str = "cpu") -> dict[str, object]:
    """The hardware, versions and settings that a figure belongs to."""
    described = {
        "device": device,
        "threads": torch.get_num_threads(),
        "isa": extension.cpu_isa(),
        "aten": torch.backends.cpu.get_cpu_capability(),
        "allocator": options.allocator,
        "torch": str(torch.__version__),
        "python": platform.python_version(),
        "peers": {name: version for name in PEERS if (version := _version(name))},
        "commit": _output("git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
    processor = cpu()
    if device == "cpu":
        return {"hardware": processor["model"], "cores": processor["cores"], **described}
    card = torch.cuda.get_device_properties(device)
    return {
        "hardware": card.name,
        "multiprocessors": card.multi_processor_count,
        "l2_bytes": card.L2_cache_size,
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "cuda": torch.version.cuda,
        "host": processor["model"],
        **described,
    }


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _output(*command: str) -> str | None:
    """First line of what a command prints, if it can be run."""
    try:
        lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    except (OSError, subprocess.CalledProcessError):
        return None
    return lines[0].strip() if lines else None
