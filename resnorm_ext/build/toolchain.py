# SPDX-License-Identifier: BSD-3-Clause
"""What there is to build with: torch, the C++ compiler, the CUDA toolkit; and what is chosen of it, with the reason."""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

from . import config


class BuildError(RuntimeError):
    """The extension cannot be built here; the message says what was looked for and what to type."""


@dataclass(frozen=True)
class Toolkit:
    """A CUDA toolkit: the folder that holds bin/nvcc, its version (``"13.0"``), the architectures to build for."""

    home: Path
    version: str
    architectures: tuple[str, ...]

    @property
    def nvcc(self) -> Path:
        return self.home / "bin" / "nvcc"

    @property
    def libraries(self) -> Path:
        return next((path for name in ("lib64", "lib") if (path := self.home / name).is_dir()), self.home)

    @property
    def runtime(self) -> str:
        """The linker's flag for CUDA's runtime; NVIDIA's Python packages have it under its full name alone."""
        versioned = sorted(self.libraries.glob("libcudart.so.*"))
        is_named = (self.libraries / "libcudart.so").exists() or not versioned
        return "-lcudart" if is_named else f"-l:{versioned[0].name}"


@dataclass(frozen=True)
class Toolchain:
    """What a build uses: the torch it is for, the compilers, the instruction sets, why there is or is no CUDA in it."""

    torch: str
    torch_cuda: str | None
    compiler: tuple[str, ...]
    compiler_version: str
    ninja: str
    isas: tuple[str, ...]
    toolkit: Toolkit | None
    cuda_reason: str

    @property
    def cuda(self) -> str | None:
        return self.toolkit.version if self.toolkit else None

    @property
    def kernels(self) -> str:
        """What will be built and why, in words."""
        what = "CPU kernels alone" if self.toolkit is None else f"CPU and CUDA {self.cuda} kernels"
        return f"{what} ({self.cuda_reason}), for {', '.join(self.isas)}"

    @property
    def key(self) -> str:
        return hashlib.sha256(repr(self).encode()).hexdigest()

    @property
    def local_version(self) -> str:
        return config.local_version(self.torch, self.cuda and self.torch_cuda)


def environment_choice(name: str, choices: tuple[str, ...]) -> str:
    """The value of environment variable ``name``: one of ``choices``, of which the first is the default."""
    value = os.environ.get(name) or choices[0]
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}; got {value!r}")
    return value


def detect(
    default_architectures: tuple[str, ...] = config.CUDA_ARCHITECTURES, isas: tuple[str, ...] | None = None
) -> Toolchain:
    """Finds everything that a build for ``isas`` (default: all) needs; raises BuildError naming what is missing."""
    try:
        import torch
    except ImportError as error:
        raise BuildError(
            f"building resnorm_ext needs the PyTorch that it will run with, and here it cannot be imported: {error}"
        ) from error
    compiler = find_compiler()
    check_python_headers()
    toolkit, reason = find_cuda(str(torch.__version__), torch.version.cuda, default_architectures)
    return Toolchain(
        torch=str(torch.__version__),
        torch_cuda=torch.version.cuda,
        compiler=compiler,
        compiler_version=_output(*compiler, "--version").splitlines()[0],
        ninja=find_ninja(),
        isas=isas or config.all_isas(),
        toolkit=toolkit,
        cuda_reason=reason,
    )


def check_packages() -> None:
    """Raises BuildError that names, all at once, what pip can install of what a build needs."""
    try:
        has_setuptools = int(importlib.metadata.version("setuptools").split(".")[0]) >= 77
    except importlib.metadata.PackageNotFoundError:
        has_setuptools = False
    has = {
        "torch": importlib.util.find_spec("torch"),
        "setuptools>=77": has_setuptools,
        "ninja": importlib.util.find_spec("ninja") or shutil.which("ninja"),
    }
    missing = [package for package, found in has.items() if not found]
    if not missing:
        return
    if "torch" in missing and any("build-env-" in path for path in sys.path):  # pip's name for it, and build's
        raise BuildError(
            "building resnorm_ext needs the PyTorch that it will run with, and pip builds where it cannot be seen. "
            f"With {', '.join(missing)} installed, type: pip install --no-build-isolation ."
        )
    raise BuildError(f"building resnorm_ext needs packages that are not here; type: pip install {shlex.join(missing)}")


def find_compiler() -> tuple[str, ...]:
    """The C++ compiler's command, as torch.utils.cpp_extension takes it: what CXX says, else c++."""
    command = shlex.split(os.environ.get("CXX") or "c++")
    if path := shutil.which(command[0]):
        return (path, *command[1:])
    raise BuildError(
        f"no C++ compiler: looked for {command[0]} on PATH. "
        "Install one with C++20 (Debian, Ubuntu: apt install g++), or name it in CXX."
    )


def find_ninja() -> str:
    try:
        import ninja  # pip's package, whose program may not be on PATH

        return str(Path(ninja.BIN_DIR) / "ninja")
    except ImportError:
        if path := shutil.which("ninja"):
            return path
    raise BuildError("no ninja: looked for the Python package and on PATH. Type: pip install ninja")


def check_python_headers() -> None:
    include = sysconfig.get_path("include")
    if not Path(include, "Python.h").is_file():
        raise BuildError(f"no Python headers: looked for {include}/Python.h (Debian, Ubuntu: apt install python3-dev)")


def find_cuda(torch: str, torch_cuda: str | None, architectures: tuple[str, ...]) -> tuple[Toolkit | None, str]:
    """The CUDA toolkit to build with and why, as RESNORM_CUDA (auto, on, off) asks."""
    setting = environment_choice("RESNORM_CUDA", ("auto", "on", "off"))
    if setting == "off":
        return None, "RESNORM_CUDA=off"
    home, reason = None, f"PyTorch {torch} is built without CUDA"
    major = torch_cuda and torch_cuda.split(".")[0]
    if torch_cuda is not None:
        home, reason = find_toolkit()
    if home is not None:
        version = _nvcc_version(home)
        if version.split(".")[0] != major and (packaged := packaged_toolkit(major)):
            home, version = packaged, _nvcc_version(packaged)
        if version.split(".")[0] == major:
            listed = re.findall(r"compute_(\d+)(\d)", _output(str(home / "bin/nvcc"), "--list-gpu-arch"))
            supported = sorted((f"{major}.{minor}" for major, minor in listed), key=architecture_order)
            chosen = cuda_architectures(architectures, supported)
            return Toolkit(home, version, chosen), f"PyTorch {torch} and CUDA toolkit {version} in {home}"
        reason = f"PyTorch {torch} needs a CUDA {torch_cuda} toolkit, and {home} holds {version}"
    if setting == "on":
        raise BuildError(f"RESNORM_CUDA=on, but {reason}")
    return None, reason


def architecture_order(architecture: str) -> tuple[int, ...]:
    return tuple(map(int, architecture.split(".")))


def cuda_architectures(default: tuple[str, ...], supported: list[str]) -> tuple[str, ...]:
    """Architectures as TORCH_CUDA_ARCH_LIST names them (``8.0``, ``9.0a``, ``12.0+PTX``), else those of ``default``
    that nvcc supports, with the newest one's PTX: on a GPU newer than the toolkit, that is what runs."""
    listed = [entry for entry in re.split(r"[\s;,]+", os.environ.get("TORCH_CUDA_ARCH_LIST", "")) if entry]
    if not listed:
        usable = [architecture for architecture in default if architecture in supported] or supported[-1:]
        return (*usable[:-1], usable[-1] + "+PTX")
    return tuple(listed)


def max_jobs() -> int:
    """How many compilers run at once: what MAX_JOBS says, else as many as the cores this process may use and free
    memory (2 GiB each) allow."""
    if jobs := os.environ.get("MAX_JOBS"):
        if not jobs.isdecimal() or int(jobs) == 0:
            raise ValueError(f"MAX_JOBS must be a positive integer; got {jobs!r}")
        return int(jobs)
    return max(1, min(len(os.sched_getaffinity(0)), _available_memory() // 2**31))


def _available_memory() -> int:
    """Bytes free on this machine, or in this container where it has a limit of its own."""
    meminfo = Path("/proc/meminfo").read_text()
    available = int(re.search(r"MemAvailable:\s+(\d+) kB", meminfo)[1]) * 1024
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.is_file() and limit.read_text().strip() != "max":
        available = min(available, int(limit.read_text()) - int(used.read_text()))
    return available


def find_toolkit() -> tuple[Path | None, str]:
    """(folder, "") or (None, where it was looked for)."""
    looked = []
    for name in ("CUDA_HOME", "CUDA_PATH"):
        if value := os.environ.get(name):
            if (Path(value) / "bin/nvcc").is_file():
                return Path(value), ""
            looked.append(f"{value}/bin/nvcc ({name})")
        else:
            looked.append(f"{name} (not set)")
    if nvcc := shutil.which("nvcc"):
        # What is on PATH may be a script or a link elsewhere; only nvcc itself knows where its toolkit lies.
        if top := re.search(r"^#\$ TOP=(.+)$", _output(nvcc, "--dryrun", "-x", "cu", "-c", "/dev/null"), re.MULTILINE):
            return Path(top[1].strip()).resolve(), ""
        looked.append(f"{nvcc} (which does not say where its toolkit is)")
    else:
        looked.append("nvcc on PATH")
    if Path("/usr/local/cuda/bin/nvcc").is_file():
        return Path("/usr/local/cuda"), ""
    looked.append("the Python package nvidia-cuda-nvcc")
    if packaged := packaged_toolkit():
        return packaged, ""
    return None, f"there is no CUDA toolkit; looked for: {', '.join(looked)}, /usr/local/cuda/bin/nvcc"


def packaged_toolkit(major: str = "*") -> Path | None:
    """NVIDIA's Python packages, which from CUDA 13 on share a folder that is laid out like a toolkit; those of this
    version, where all that compiles is there."""
    namespace = importlib.util.find_spec("nvidia")
    folders = [Path(folder) for folder in (namespace.submodule_search_locations or ())] if namespace else []
    compilers = [nvcc for folder in folders for nvcc in folder.glob(f"cu{major}/bin/nvcc")]
    homes = [nvcc.parents[1] for nvcc in compilers]
    return next((home for home in homes if (home / "nvvm").is_dir() and (home / "include").is_dir()), None)


def _nvcc_version(home: Path) -> str:
    return re.search(r"release (\d+\.\d+)", _output(str(home / "bin/nvcc"), "--version"))[1]


def _output(*command: str) -> str:
    """stdout and stderr of a command that must succeed."""
    try:
        return subprocess.run(
            command, check=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
        ).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        raise BuildError(f"{shlex.join(command)} failed: {getattr(error, 'stdout', None) or error}") from error
