# SPDX-License-Identifier: BSD-3-Clause
from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
from tiny_project import Project

LOAD = "from resnorm_ext import jit; print(jit.load().answer)"
# A shell starts background jobs with Ctrl-C ignored, and so do their children: a test run may be such a job.
HEED_INTERRUPTS = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "


def logging_compiler(directory: Path) -> Path:
    """A compiler that writes a line to ``compiled`` for each unit, and hangs while a file named ``hang`` is there."""
    script = directory / "c++-wrapper"
    script.write_text(
        "#!/bin/sh\n"
        f'case "$*" in *" -c "*) echo unit >> {directory}/compiled\n'
        f"while [ -e {directory}/hang ]; do sleep 0.1; done;; esac\n"
        'exec c++ "$@"\n'
    )
    script.chmod(0o755)
    return script


def compiled_units(directory: Path) -> int:
    log = directory / "compiled"
    return len(log.read_text().splitlines()) if log.exists() else 0


def wait_for(condition) -> None:
    for _ in range(600):
        if condition():
            return
        time.sleep(0.1)
    pytest.fail("what was waited for did not happen within a minute")


def test_compiles_once_and_says_so(project: Project, tmp_path: Path):
    cxx = str(logging_compiler(tmp_path))
    cold = project.run("-c", LOAD, CXX=cxx)
    assert cold.stdout == "42\n", cold.stderr
    assert "compiling the C++ extension" in cold.stderr and "minutes" in cold.stderr and "compiled in" in cold.stderr
    warm = project.run("-c", LOAD, CXX=cxx)
    assert (warm.stdout, warm.stderr) == ("42\n", "")
    assert compiled_units(tmp_path) == 1
    assert sorted(path.name for path in project.cache.glob("*/*")) == ["_C.json", "_C.so"]


@pytest.mark.parametrize("change", ["source", "compiler"])
def test_another_configuration_is_another_library(project: Project, tmp_path: Path, change: str):
    assert project.run("-c", LOAD).returncode == 0
    variables = {}
    if change == "source":
        project.source.write_text(project.source.read_text().replace("42", "43"))
    else:
        variables["CXX"] = str(logging_compiler(tmp_path))
    again = project.run("-c", LOAD, **variables)
    assert again.stdout == ("43\n" if change == "source" else "42\n")
    assert len(list(project.cache.glob("*/_C.so"))) == 2


def test_processes_that_start_together_compile_once(project: Project, tmp_path: Path):
    cxx = str(logging_compiler(tmp_path))
    processes = [project.start("-c", LOAD, CXX=cxx) for _ in range(3)]
    results = [process.communicate(timeout=300) for process in processes]
    assert [stdout for stdout, _ in results] == ["42\n"] * 3, results
    assert compiled_units(tmp_path) == 1


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_loads_after_a_build_was_killed(project: Project, tmp_path: Path, how: signal.Signals):
    cxx = str(logging_compiler(tmp_path))
    (tmp_path / "hang").touch()
    victim = project.start("-c", HEED_INTERRUPTS + LOAD, CXX=cxx)
    try:
        wait_for(lambda: compiled_units(tmp_path) == 1)
        os.kill(victim.pid, how)
        victim.wait(timeout=60)
        assert not list(project.cache.glob("*/_C.*"))
    finally:
        (tmp_path / "hang").unlink()
    result = project.run("-c", LOAD, CXX=cxx)
    assert result.stdout == "42\n", result.stderr
    assert not list(project.cache.glob("*.build-*"))


def test_failed_compilation_shows_the_compilers_words_and_leaves_nothing(project: Project):
    project.source.write_text("#error this cannot compile\n")
    result = project.run("-c", LOAD)
    assert "BuildError: compiling resnorm_ext failed" in result.stderr and "this cannot compile" in result.stderr
    assert [path.suffix for path in project.cache.iterdir()] == [".lock"]


def test_verbose_shows_commands(project: Project):
    result = project.run("-c", "from resnorm_ext import jit; jit.load(verbose=True)")
    assert "-fvisibility=hidden" in result.stderr


def test_changed_sources_ask_for_a_restart(project: Project):
    code = (
        "from pathlib import Path; from resnorm_ext import jit; jit.load(); source = Path('csrc/python.cpp');"
        "source.write_text(source.read_text().replace('42', '43')); jit.load()"
    )
    result = project.run("-c", code)
    assert "RuntimeError" in result.stderr and "restart Python" in result.stderr


def test_cache_directory_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    from resnorm_ext import jit

    monkeypatch.delenv("RESNORM_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert jit.cache_directory() == tmp_path / "resnorm_ext"
    monkeypatch.setenv("RESNORM_CACHE_DIR", str(tmp_path / "here"))
    assert jit.cache_directory() == tmp_path / "here"
