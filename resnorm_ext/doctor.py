# SPDX-License-Identifier: BSD-3-Clause
"""Looks for what is wrong, or slower than it need be, with this installation on this machine; with --model also for
what of a model would be accelerated, and why the rest would not."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from .build import config, jit, toolchain
from .build import extension as extensions
from .compatibility import transformers_reason


@dataclass(frozen=True)
class Finding:
    """What was looked at, how it is, what it means, and what to do about it where something is to be done."""

    what: str
    status: str  # ok; note: slower than it need be, or might surprise; wrong
    says: str
    advice: str = ""


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m resnorm_ext doctor", description=__doc__)
    parser.add_argument("--model", type=Path, metavar="FOLDER", help="a model that transformers has saved")
    parser.add_argument("--json", action="store_true", help="one JSON object")
    options = parser.parse_args(arguments)
    if options.model and not (options.model / "config.json").is_file():
        parser.error(f"argument --model: expected a folder with a config.json, but got {options.model}")
    findings = list(examine())
    report = None
    if options.model:
        try:
            report = report_of(options.model)
        except Exception as error:  # whatever a model's files raise
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            says = f"{options.model} cannot be loaded: {reason}"
            findings.append(Finding("model", "wrong", says, "mend what is named there"))
    if options.json:
        print(json.dumps({"findings": [asdict(finding) for finding in findings], "model": report}, indent=2))
    else:
        marks = {"ok": "ok   ", "note": "note ", "wrong": "WRONG"}
        for finding in findings:
            print(f"{marks[finding.status]} {finding.what}: {finding.says}")
            if finding.advice:
                print(f"      {finding.advice}")
        if report is not None:
            print(f"\n{report['text']}")
    return 1 if any(finding.status == "wrong" for finding in findings) else 0


def examine() -> Iterator[Finding]:
    """A look that fails is a finding too."""
    looks: dict[str, Callable[[], Finding]] = {
        "extension": extension,
        "compiler": compiler,
        "cache": cache,
        "instruction set": instruction_set,
        "threads": threads,
        "GPU": gpu,
        "transformers": transformers,
    }
    for what, look in looks.items():
        try:
            yield look()
        except Exception as error:
            yield Finding(what, "wrong", f"{type(error).__name__}: {error}")


def extension() -> Finding:
    what, choice = "extension", extensions.jit_choice()
    library = extensions.find_built() if choice != "1" else None
    if library is None:
        if choice == "0":
            says = "there is none, and RESNORM_JIT=0 forbids to compile one"
            return Finding(what, "wrong", says, f"{extensions.how_to_build()}, or unset RESNORM_JIT")
        if usable_library() is not None:
            return Finding(what, "ok", f"compiled at first use, kept in {jit.cache_directory()}")
        says = "not built yet: the first call compiles it, which takes minutes"
        return Finding(what, "note", says, extensions.how_to_build())
    try:
        extensions.check_built(library)
        extensions.load_extension()
    except ImportError as error:
        return Finding(what, "wrong", str(error))
    if config.source_hash() != extensions.read_info(library)["sources"]:
        return Finding(what, "note", "csrc has changed since it was built", extensions.how_to_build())
    return Finding(what, "ok", f"built ahead of time for PyTorch {torch.__version__}")


def compiler() -> Finding:
    """Only who has to compile needs one."""
    try:
        found = toolchain.find_compiler()
        toolchain.find_ninja()
        toolchain.check_python_headers()
    except toolchain.BuildError as error:
        built = extensions.jit_choice() != "1" and extensions.find_built() is not None
        if built or extensions.jit_choice() == "0":
            return Finding("compiler", "ok", f"not needed, and there is none: {error}")
        return Finding("compiler", "wrong", f"nothing can be compiled here: {error}")
    return Finding("compiler", "ok", " ".join(found))


def cache() -> Finding:
    folder = jit.cache_directory()
    if not folder.exists():
        return Finding("cache", "ok", f"{folder}, made when something is compiled")
    try:
        jit.check_writers(folder)
    except toolchain.BuildError as error:
        return Finding("cache", "wrong", str(error))
    if not os.access(folder, os.W_OK):
        return Finding("cache", "note", f"{folder} cannot be written", "name another folder in RESNORM_CACHE_DIR")
    return Finding("cache", "ok", str(folder))


def instruction_set() -> Finding:
    what, fastest = "instruction set", max(config.best_isas(), key=config.all_isas().index)
    if usable_library() is None:
        return Finding(what, "ok", f"this CPU has {fastest}")
    in_use = extensions.load_extension().cpu_isa()
    if in_use == fastest:
        return Finding(what, "ok", in_use)
    chosen = os.environ.get("RESNORM_CPU_ISA")
    says = f"{in_use} is in use, and this CPU has {fastest}"
    return Finding(what, "note", says, f"unset RESNORM_CPU_ISA={chosen}" if chosen else extensions.how_to_build())


def usable_library() -> Path | None:
    """What can be loaded now; that nothing can be, and why, other findings say."""
    try:
        library = extensions.find_usable()
        if library is not None and library == extensions.find_built():
            extensions.check_built(library)
        return library
    except (ImportError, toolchain.BuildError):
        return None


def threads() -> Finding:
    used, cores = torch.get_num_threads(), len(os.sched_getaffinity(0))
    says = f"PyTorch uses {used} on {cores} core{'s' if cores > 1 else ''} that this process may use"
    if used > cores:
        return Finding("threads", "note", says, f"more than cores only wait for one another: OMP_NUM_THREADS={cores}")
    return Finding("threads", "ok", says)


def gpu() -> Finding:
    if not torch.cuda.is_available():
        if torch.version.cuda is None:
            return Finding("GPU", "ok", "none: PyTorch is built without CUDA")
        return Finding("GPU", "ok", "none that PyTorch can use")
    library = usable_library()
    if library is None:
        return Finding("GPU", "ok", "its kernels are compiled with the extension")
    info = extensions.read_info(library)
    if info["cuda"] is None:
        says = f"the extension has no CUDA kernels ({info['cuda_reason']}): torch's operators compute there"
        return Finding("GPU", "note", says, extensions.how_to_build())
    names, built_for = [], ", ".join(info["cuda_architectures"])
    for index in range(torch.cuda.device_count()):
        name, (major, minor) = torch.cuda.get_device_name(index), torch.cuda.get_device_capability(index)
        runs = [_runs_on(entry, (major, minor)) for entry in info["cuda_architectures"]]
        if True not in runs and None not in runs:
            says = f"{name} is sm_{major}{minor}, and kernels are for {built_for}"
            return Finding("GPU", "wrong", says, "build with TORCH_CUDA_ARCH_LIST naming it")
        names.append(name)
    return Finding("GPU", "ok", f"{', '.join(names)}, with kernels for {built_for}")


def _runs_on(entry: str, capability: tuple[int, int]) -> bool | None:
    """Whether code for an ``entry`` of TORCH_CUDA_ARCH_LIST runs there; None for a name instead of a number. Code runs
    on later minor versions, its PTX on whatever is later; with an a on that version alone, with an f on its family."""
    match = re.fullmatch(r"(\d+)\.(\d+)([af]?)(\+PTX)?", entry)
    if match is None:
        return None
    version = int(match[1]), int(match[2])
    if match[3] == "a":
        return version == capability
    return (version[0] == capability[0] and version <= capability) or (
        match[4] is not None and not match[3] and version <= capability
    )


def transformers() -> Finding:
    try:
        version = importlib.metadata.version("transformers")
    except importlib.metadata.PackageNotFoundError:
        return Finding("transformers", "ok", "not installed: accelerate() knows torch.nn's encoders alone")
    if reason := transformers_reason(version):
        return Finding(
            "transformers", "note", f"its models are left as they are: {reason}", "pip install -U transformers"
        )
    return Finding("transformers", "ok", version)


def report_of(folder: Path) -> dict[str, object]:
    """What accelerate() makes of the model in ``folder``."""
    from transformers import AutoModel
    from transformers.utils import logging

    from .integrations import accelerate, report

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    model = AutoModel.from_pretrained(folder, local_files_only=True, trust_remote_code=False).eval()
    found = report(accelerate(model))
    return found.as_dict() | {"text": str(found)}
