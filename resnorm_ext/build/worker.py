# SPDX-License-Identifier: BSD-3-Clause
"""``python -m resnorm_ext.build.worker FOLDER PARENT LOCK``: compiles in FOLDER for the process PARENT that started it,
and ends its compilers when that one is gone, however it went. LOCK is a file descriptor that they inherit.

A process of its own also because PyTorch's and setuptools' modules for building change the one that imports them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

from . import jit, ninja


def main(folder: Path, parent: int, lock: int) -> int:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    toolchain = jit.detect()
    ninja.write(toolchain, folder)
    process = subprocess.Popen(
        ninja.command(toolchain),
        cwd=folder,
        env=ninja.environment(),
        pass_fds=[lock],  # held until the last compiler is gone, also where this process is killed
        restore_signals=False,  # Python ignores SIGPIPE: ninja shall not die of a reader's death before its compilers
    )
    with process:
        try:
            while os.getppid() == parent:
                try:
                    return process.wait(timeout=0.5)
                except subprocess.TimeoutExpired:
                    continue
            return 1
        finally:
            process.terminate()  # upon which ninja ends its compilers, which have process groups of their own


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])))
