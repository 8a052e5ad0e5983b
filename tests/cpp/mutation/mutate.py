#!/usr/bin/env python3
# SPDX-License-Identifier: BSD-3-Clause
"""Break the CUDA kernels one line at a time and show which mode of their tests notices.

    python tests/cpp/mutation/mutate.py [WORD ...]     (JOBS=n: compilers or tests at a time, all cores by default)

tries the mutations in whose name every WORD occurs; without words all of them, and first of all the sources as they
are. Prints a table, and ends with status 1 unless every mutation is noticed by at least one mode and the sources as
they are by none. Works on a copy of the sources in build/mutation (or MUTATION_DIR), where the next run finds again
what is built; with ccache it compiles only what was never compiled.
"""

from __future__ import annotations

import concurrent.futures
import filecmp
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

from mutations import MUTATIONS, Mutation

ROOT = Path(__file__).resolve().parents[3]
WORK = Path(os.environ.get("MUTATION_DIR", ROOT / "build" / "mutation"))
SOURCES = WORK / "sources"
JOBS = int(os.environ.get("JOBS") or os.cpu_count() or 1)
TEST = "cuda_kernels_test"
RUN_SECONDS = 300

# What the tests are built as, and the schedules they run under there. With ThreadSanitizer they have one.
BUILDS = {
    "plain": ([], ["forward", "reverse", "random1"]),
    "asan+ubsan": (["-DRESNORM_SANITIZE=ON"], ["forward"]),
    "tsan": (["-DRESNORM_THREAD_SANITIZE=ON"], ["random1"]),
}
SCHEDULES = BUILDS["plain"][1]
MODES = [(build, schedule) for build, (_, schedules) in BUILDS.items() for schedule in schedules]
NONE = Mutation("none", "", {})

# The first that occurs in what a failed run printed says how it failed.
SYMPTOMS = {
    r"(?:Address|Thread)Sanitizer: (data race|[A-Za-z-]+)": r"\1",
    r"runtime error: (.{0,40})": r"\1",
    r"SIMT: (.{0,40})": r"\1",
    r": Failure\n": "wrong values",
}


def copy_sources() -> None:
    """Only files that differ are written: the others keep their time stamps, and what was built of them stays."""
    paths = [ROOT / "CMakeLists.txt", *(ROOT / "csrc" / "kernels").rglob("*.*"), *(ROOT / "tests" / "cpp").rglob("*.*")]
    wanted = {path.relative_to(ROOT): path for path in paths if path.is_file()}
    for copy in SOURCES.rglob("*.*"):
        if copy.is_file() and copy.relative_to(SOURCES) not in wanted:
            copy.unlink()
    for name, path in wanted.items():
        copy = SOURCES / name
        if not copy.exists() or not filecmp.cmp(path, copy, shallow=False):
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, copy)


def configure() -> None:
    launcher = ["-DCMAKE_CXX_COMPILER_LAUNCHER=ccache"] if shutil.which("ccache") else []
    for name, (options, _) in BUILDS.items():
        command = ["cmake", "-S", SOURCES, "-B", WORK / name, *launcher, *options]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def broken(mutation: Mutation) -> str:
    text = (ROOT / mutation.file).read_text()
    for old, new in mutation.replacements.items():
        if text.count(old) != 1:
            sys.exit(f"{mutation.name}: {mutation.file} has this text {text.count(old)} times, not once:\n{old}")
        text = text.replace(old, new)
    return text


def build(name: str) -> str:
    """What the compiler says where it fails."""
    command = ["cmake", "--build", WORK / name, "--target", TEST, "--parallel", str(JOBS)]
    environment = {"CCACHE_BASEDIR": str(WORK), "CCACHE_NOHASHDIR": "1"}
    run = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment})
    return "" if run.returncode == 0 else "does not compile: " + run.stdout[-2000:] + run.stderr[-2000:]


def verdict(name: str, schedule: str) -> str:
    """How the tests fail: nothing where they pass."""
    others = [f"*/{other}" for other in SCHEDULES if other != schedule]
    arguments = ["--gtest_filter=-*Simt*:" + ":".join(others), "--gtest_break_on_failure", "--gtest_brief=1"]
    environment = {"TSAN_OPTIONS": "halt_on_error=1"}
    try:
        run = subprocess.run(
            [WORK / name / TEST, *arguments],
            capture_output=True,
            text=True,
            errors="replace",
            timeout=RUN_SECONDS,
            env={**os.environ, **environment},
        )
    except subprocess.TimeoutExpired:
        return "hangs"
    if run.returncode == 0:
        return ""
    output = run.stdout + run.stderr
    for pattern, symptom in SYMPTOMS.items():
        if match := re.search(pattern, output):
            return match.expand(symptom).strip()
    return signal.Signals(-run.returncode).name if run.returncode < 0 else f"ends with status {run.returncode}"


def attempt(mutation: Mutation) -> list[str]:
    copy = SOURCES / mutation.file
    if mutation is not NONE:
        copy.write_text(broken(mutation))
    try:
        errors = {name: build(name) for name in BUILDS}
        if any(errors.values()):
            sys.exit(f"{mutation.name}: {next(filter(None, errors.values()))}")
        with concurrent.futures.ThreadPoolExecutor(JOBS) as pool:
            return list(pool.map(lambda mode: verdict(*mode), MODES))
    finally:
        if mutation is not NONE:
            shutil.copy(ROOT / mutation.file, copy)


def row(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    words = sys.argv[1:]
    chosen = [mutation for mutation in MUTATIONS if all(word in mutation.name for word in words)]
    for mutation in chosen:
        broken(mutation)
    copy_sources()
    configure()
    titles = [schedule if name == "plain" else name for name, schedule in MODES]
    print(row(["mutation", *titles]), row(["---"] * (len(MODES) + 1)), sep="\n")
    wrong = []
    for mutation in chosen if words else [NONE, *chosen]:
        symptoms = attempt(mutation)
        print(row([mutation.name, *(symptom or "-" for symptom in symptoms)]), flush=True)
        if any(symptoms) == (mutation is NONE):
            wrong.append(mutation.name)
    if wrong:
        sys.exit("not as it should be: " + ", ".join(wrong))


if __name__ == "__main__":
    main()
