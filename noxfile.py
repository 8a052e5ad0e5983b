# SPDX-License-Identifier: BSD-3-Clause
"""Wheels, one for each line of wheels.toml: built from the source distribution in an environment with its PyTorch, made
fit for other machines, and tested in another environment. ``nox --list`` names them; ``make wheel`` builds one.

PyTorch comes from where pip looks; where that has not the one of a CUDA version, TORCH_INDEX_CU126 and the like name an
index for it. WHEEL_CUDA_ARCHITECTURES restricts the GPUs, for a trial: such a wheel goes into dist/partial.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import nox

ROOT = Path(__file__).resolve().parent
MATRIX = tomllib.loads((ROOT / "wheels.toml").read_text())
# What a wheel may need beside itself: PyTorch's libraries and CUDA's, which PyTorch has loaded by then.
EXTERNAL = ("libc10*.so", "libtorch*.so", "libcudart.so.*")

nox.options.default_venv_backend = "venv"
nox.options.error_on_missing_interpreters = True


def cells() -> Iterator[nox.param]:
    for cell in MATRIX["cell"]:
        for python in MATRIX["python"]:
            yield nox.param(python, cell["cuda"], cell["torch"], id=f"{cell['cuda']}-torch{cell['torch']}-py{python}")


@nox.session
@nox.parametrize("python,cuda,torch", cells())
def wheel(session: nox.Session, cuda: str, torch: str) -> None:
    """Builds the wheel into dist/CUDA and tests it."""
    architectures = os.environ.get("WHEEL_CUDA_ARCHITECTURES", "")
    environment = {
        "RESNORM_CUDA": "off" if cuda == "cpu" else "on",
        "TORCH_CUDA_ARCH_LIST": architectures,
        "SOURCE_DATE_EPOCH": commit_time(),
    }
    if index := os.environ.get(f"TORCH_INDEX_{cuda.upper()}"):
        environment["PIP_EXTRA_INDEX_URL"] = index
    compiler = MATRIX.get("compiler", {}).get(cuda, {}).get("packages", [])
    tools = ("-r", "requirements/build.txt", "-r", "requirements/repair.txt")
    session.install(*tools, f"torch=={torch}.*", *compiler, env=environment)
    check_torch(session, cuda)

    work = Path(session.create_tmp()).resolve()
    built, repaired, folder = work / "built", work / "repaired", ROOT / "dist" / ("partial" if architectures else cuda)
    for old in (built, repaired):
        shutil.rmtree(old, ignore_errors=True)
    session.run("python", "-m", "build", "--sdist", "--no-isolation", "--outdir", built, env=environment)
    (sdist,) = built.iterdir()
    command = ("python", "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "--wheel-dir", built, sdist)
    session.run(*command, env=environment)
    (unrepaired,) = built.glob("*.whl")
    excluded = [word for pattern in EXTERNAL for word in ("--exclude", pattern)]
    session.run("auditwheel", "repair", *excluded, "--wheel-dir", repaired, unrepaired, env=environment)
    (made,) = repaired.iterdir()

    fresh = work / "fresh"
    session.run("python", "-m", "venv", "--clear", fresh)
    python = fresh / "bin" / "python"
    session.run(python, "-m", "pip", "install", "-q", made, env=environment, external=True)
    with session.chdir(work):
        session.run(python, "-m", "resnorm_ext", "selftest", env={"RESNORM_JIT": "0"}, external=True)

    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob(f"{unrepaired.name.removesuffix('linux_x86_64.whl')}*"):  # whatever it was fit for
        old.unlink()
    shutil.move(made, folder)
    write_index(folder)
    made = folder / made.name
    session.log(f"{made.relative_to(ROOT)}: {made.stat().st_size / 1e6:.1f} MB")


def check_torch(session: nox.Session, cuda: str) -> None:
    """That pip has found the PyTorch that the wheel is to be for; without CUDA kernels any will do."""
    code = "import torch; print(torch.__version__, torch.version.cuda)"
    version, found = session.run("python", "-c", code, silent=True).split()[-2:]
    named = "cpu" if found == "None" else "cu" + found.replace(".", "")
    if cuda not in ("cpu", named):
        session.error(
            f"{cuda} needs a PyTorch of CUDA {cuda[2:-1]}.{cuda[-1]}, and pip has found {version} ({named}); name an "
            f"index that has one in TORCH_INDEX_{cuda.upper()}"
        )


def commit_time() -> str:
    """For what is built to be the same, built again."""
    if epoch := os.environ.get("SOURCE_DATE_EPOCH"):
        return epoch
    try:
        command = ["git", "log", "-1", "--format=%ct"]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):  # not from a repository
        return str(int((ROOT / "noxfile.py").stat().st_mtime))


def write_index(folder: Path) -> None:
    """A page of links to the wheels, which pip can search."""
    names = sorted(path.name for path in folder.glob("*.whl"))
    links = (f'<a href="{quote(name)}">{name}</a><br>' for name in names)
    page = ["<!DOCTYPE html>", f"<title>resnorm_ext, {folder.name}</title>", *links]
    (folder / "index.html").write_text("\n".join(page) + "\n")
