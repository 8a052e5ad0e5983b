# SPDX-License-Identifier: BSD-3-Clause
"""What needs a GPU, in nine minutes and without a network: a build for the card found, first measurements, tests,
compute-sanitizer, benchmarks. Each stage has its time limit and its log; summary.json is rewritten as stages start and
end, so that a run that is cut keeps what it had. The folder of all that can be kept as it is, in benchmarks/results."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NEEDED = ("torch", "setuptools", "ninja", "pytest")
PEERS = ROOT / ".venv-bench-cuda"  # what `make gpu-peers` has installed, for a machine that cannot
# What is in most doubt is measured first: kernels in clusters, forward and backward, and the usual size of both.
FIRST = r"(layer_norm, bfloat16, 32768×(65536|4096)|layer_norm backward, bfloat16, 32768×(16384|4096))$"
SANITIZERS = ("memcheck", "racecheck", "initcheck", "synccheck")

# In a process of its own, because whoever asks torch about the card may keep memory on it.
PROBE = """
import json, torch
from resnorm_ext.build import toolchain
machine = {"torch": str(torch.__version__), "cuda": torch.version.cuda, "gpus": torch.cuda.device_count()}
if torch.cuda.is_available():
    machine["gpu"] = torch.cuda.get_device_name()
    machine["architecture"] = ".".join(map(str, torch.cuda.get_device_capability()))
    machine["toolkit"], machine["no_toolkit"] = (str(found or "") for found in toolchain.find_toolkit())
print(json.dumps(machine))
"""


@dataclass
class Stage:
    """A command and the seconds that it may take; where ``skip`` says why, it is not run."""

    name: str
    command: list[str]
    limit: float
    environment: dict[str, str] = field(default_factory=dict)
    skip: str = ""
    needed_by_all: bool = False
    status: str = "not run"
    seconds: float = 0.0

    @property
    def is_good(self) -> bool:
        return self.status in ("passed", "skipped")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", type=Path, help="folder for logs, results and summary.json")
    out = parser.parse_args(arguments).output.resolve()
    machine = find_machine()
    out.mkdir(parents=True, exist_ok=True)
    return run(stages(out, machine), out, machine)


def find_machine() -> dict[str, object]:
    """torch, the card and the toolkit; leaves with one line where something is missing."""
    if missing := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
        sys.exit(f"gpu-check: {sys.executable} lacks {', '.join(missing)}; name another with PYTHON=...")
    probe = subprocess.run([sys.executable, "-c", PROBE], cwd=ROOT, capture_output=True, text=True)
    if probe.returncode:
        sys.exit(f"gpu-check: torch cannot be asked about GPUs: {probe.stderr.strip().splitlines()[-1]}")
    machine = json.loads(probe.stdout.splitlines()[-1])
    if machine["cuda"] is None:
        sys.exit(f"gpu-check: PyTorch {machine['torch']} in {sys.executable} is built without CUDA")
    if "gpu" not in machine:
        sys.exit(f"gpu-check: there is no GPU that PyTorch {machine['torch']} can use")
    if not machine["toolkit"]:
        sys.exit(f"gpu-check: {machine['no_toolkit']}")
    return machine


def stages(out: Path, machine: dict[str, object]) -> list[Stage]:
    """The limits add up to nine minutes."""
    python, results = sys.executable, str(out / "norm.jsonl")
    pytest = [python, "-m", "pytest", "-v", "--tb=short", "--durations=10", "-o", "faulthandler_timeout=60"]
    build = {"RESNORM_CUDA": "on", "TORCH_CUDA_ARCH_LIST": str(machine["architecture"])}
    build["NVCC_APPEND_FLAGS"] = "-lineinfo"  # for what the sanitizers report
    built = {"RESNORM_JIT": "0"}
    # Without the allocator's cache every tensor is an allocation of its own, whose ends are watched.
    watched = built | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    sanitizer = find_sanitizer(Path(str(machine["toolkit"])))
    missing = "" if sanitizer else f"no compute-sanitizer on PATH or in {machine['toolkit']}"
    # Our kernels alone, and none of the errors that PyTorch provokes and handles.
    watch = ["--kernel-name", "kns=resnorm", "--report-api-errors", "no", "--error-exitcode", "9"]
    benchmark = [python, "benchmarks/bench_norm.py", "--device", "cuda", "--output", results, "--time-limit"]
    # The second is what a .pth file of QuACK's compiler would add, if this were a folder of site-packages.
    peers = [os.environ.get("PYTHONPATH", ""), str(PEERS), str(PEERS / "nvidia_cutlass_dsl" / "dsl_packages")]
    with_peers = built | {"PYTHONPATH": os.pathsep.join(filter(None, peers))}
    return [
        Stage("build", [python, "setup.py", "build_ext", "--inplace"], 135, build, needed_by_all=True),
        Stage("first", [*benchmark, "15", "--only", FIRST], 25, with_peers),
        Stage("tests", [*pytest, "-m", "cuda", "tests/gpu"], 145, built),
        Stage("smoke", [*pytest, "-m", "smoke", "tests/operators"], 30, built),
        *(
            Stage(
                tool,
                [sanitizer or tool, "--tool", tool, *watch, *pytest, "tests/gpu/test_plans.py"],
                25,
                watched,
                missing,
            )
            for tool in SANITIZERS
        ),
        Stage("benchmark", [*benchmark, "75"], 90, with_peers),
        Stage("report", [python, "benchmarks/report.py", results, "--output", str(out)], 15, built),
    ]


def find_sanitizer(toolkit: Path) -> str | None:
    folders = [os.environ.get("PATH", ""), str(toolkit / "bin"), str(toolkit / "compute-sanitizer")]
    return shutil.which("compute-sanitizer", path=os.pathsep.join(folders))


def run(plan: list[Stage], out: Path, machine: dict[str, object]) -> int:
    """Runs the stages in turn; 0 where all of them passed or were skipped."""
    for stage in plan:
        if stage.skip:
            stage.status = "skipped"
        else:
            stage.status = "cut"  # unless it comes to its end
            write_summary(plan, out, machine)
            print(f"{stage.name}: {out / stage.name}.log", flush=True)
            run_stage(stage, out / f"{stage.name}.log")
        write_summary(plan, out, machine)
        if stage.needed_by_all and not stage.is_good:
            break
    print(f"\n{'stage':12}{'':12}{'seconds':>8}")
    for stage in plan:
        print(f"{stage.name:12}{stage.status:12}{stage.seconds:8.1f}  {stage.skip}".rstrip())
    return 0 if all(stage.is_good for stage in plan) else 1


def run_stage(stage: Stage, log: Path) -> None:
    began = time.monotonic()
    environment = os.environ | {"PYTHONUNBUFFERED": "1"} | stage.environment
    with log.open("w") as file:
        process = subprocess.Popen(
            stage.command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            stage.status = "passed" if process.wait(stage.limit) == 0 else "failed"
        except subprocess.TimeoutExpired:
            stage.status = "timed out"
        finally:
            end(process)
    stage.seconds = round(time.monotonic() - began, 1)


def end(process: subprocess.Popen[bytes]) -> None:
    """And everything that it has started: a process that is left behind would slow the next stage."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()


def write_summary(plan: list[Stage], out: Path, machine: dict[str, object]) -> None:
    """In one step, so that there is always a whole one."""
    git = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
    summary = {"commit": git.stdout.strip(), "machine": machine, "stages": [asdict(stage) for stage in plan]}
    unfinished = out / "summary.json.new"
    unfinished.write_text(json.dumps(summary, indent=2) + "\n")
    unfinished.replace(out / "summary.json")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("gpu-check: cut"))
    sys.exit(main())
