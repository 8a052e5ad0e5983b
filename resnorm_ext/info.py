# SPDX-License-Identifier: BSD-3-Clause
"""What this installation is built for, what the machine offers and what is in use; it also runs where parts of that are
broken, and then says what is."""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
from collections.abc import Callable
from pathlib import Path

import torch

from .build import config
from .build import extension as extensions

_SETTINGS = ("RESNORM_CPU_ISA", "RESNORM_JIT", "RESNORM_CACHE_DIR", "RESNORM_CUDA", "RESNORM_LINEAR")


def collect() -> dict[str, object]:
    """The whole report. A part that cannot be found out is ``{"error": why}``."""
    return {
        "version": config.VERSION,
        "extension": _guarded(extension),
        "kernels": _guarded(kernels),
        "cpu": _guarded(cpu),
        "torch": _guarded(torch_build),
        "cuda": _guarded(cuda),
        "environment": {name: os.environ[name] for name in _SETTINGS if name in os.environ},
    }


def extension() -> dict[str, object]:
    """How and with what the extension was built; one that is not there yet is not compiled for this."""
    if (library := extensions.find_usable()) is None:
        return {"built": "no" if extensions.jit_choice() == "0" else "not yet: the first call compiles it"}
    info = extensions.read_info(library)
    report = {"built": "ahead of time" if library == extensions.find_built() else "at first use", "path": str(library)}
    report |= {key: value for key, value in info.items() if key not in ("sources", "version")}
    if config.source_hash() != info["sources"]:
        report["stale"] = f"csrc has changed since. {extensions.how_to_build()}"
    return report


def kernels() -> dict[str, object]:
    """Instruction sets whose kernels can run here, the one whose kernels do, and what multiplies in linear layers."""
    if extensions.find_usable() is None:
        return {"in_use": None}
    module = extensions.load_extension()
    backends = module.linear_backends(torch.float32)
    return {
        "cpu_isas": module.supported_cpu_isas(),
        "in_use": module.cpu_isa(),
        "linear": module.linear_backend_override() or f"the fastest of {', '.join(backends)}, measured at first use",
        "compiled": module.build_info(),
    }


def cpu() -> dict[str, object]:
    """The processor and those of its features that kernels are built for."""
    model = re.search(r"^model name\s*:\s*(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    used = set().union(*map(config.features_of, config.ISA_FLAGS))
    return {
        "model": model[1] if model else platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "features": sorted(used & config.cpu_features()),
    }


def torch_build() -> dict[str, object]:
    return {"version": str(torch.__version__), "cuda": torch.version.cuda, "threads": torch.get_num_threads()}


def cuda() -> dict[str, object]:
    """The GPUs that torch sees."""
    return {
        "available": torch.cuda.is_available(),
        "devices": [
            f"{torch.cuda.get_device_name(i)}, sm_{''.join(map(str, torch.cuda.get_device_capability(i)))}"
            for i in range(torch.cuda.device_count())
        ],
    }


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m resnorm_ext info", description=__doc__)
    parser.add_argument("--json", action="store_true", help="one JSON object, for programs and bug reports")
    report = collect()
    if parser.parse_args(arguments).json:
        print(json.dumps(report, indent=2))
    else:
        print(f"resnorm_ext {report.pop('version')}")
        for part, entries in report.items():
            if entries:
                print(f"\n{part}")
            for key, value in entries.items():
                label = key if key.isupper() else key.replace("_", " ")
                print(f"  {label + ':':<20} {_readable(value)}")
    return 0


def _guarded(probe: Callable[[], dict[str, object]]) -> dict[str, object]:
    try:
        return probe()
    except Exception as error:  # a report of what is broken must not break
        return {"error": f"{type(error).__name__}: {error}"}


def _readable(value: object) -> str:
    if isinstance(value, list):
        return " ".join(map(str, value)) or "-"
    if isinstance(value, dict):
        return "; ".join(f"{key}: {_readable(entry)}" for key, entry in value.items())
    return "-" if value is None else str(value)
