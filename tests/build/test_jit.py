# SPDX-License-Identifier: BSD-3-Clause
from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
from tiny_project import Project

LOAD = "from resnorm_ext.build import extension; print(extension.load_extension().answer)"
# A shell starts background jobs with Ctrl-C ignored, and so do their children: a test run may be such a job.
HEED_INTERRUPTS = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "


def logging_compiler(directory: Path) -> str:
    """A compiler that adds its process and source to ``compiled`` for each unit; at python.cpp it hangs while there is
    a file named ``hang``, and fails while there is one named ``fail``."""
    script = directory / "c++-wrapper"
    script.write_text(
        "#!/bin/sh\n"
        f'case "$*" in *" -c "*) echo $$ "$*" >> {directory}/compiled;; esac\n'
        'case "$*" in *" -c "*python.cpp*)\n'
        f"while [ -e {directory}/hang ]; do sleep 0.1; done\n"
        f"if [ -e {directory}/fail ]; then echo the compiler broke down; exit 1; fi;; esac\n"
        'exec c++ "$@"\n'
    )
    script.chmod(0o755)
    return str(script)


def compiled(directory: Path) -> list[tuple[int, str]]:
    """(process, source) of each unit that the logging compiler was called for."""
    log = directory / "compiled"
    lines = log.read_text().splitlines() if log.exists() else []
    return [(int(line.split()[0]), Path(line.split(" -c ")[1].split()[0]).name) for line in lines]


def sources(directory: Path) -> list[str]:
    return sorted(source for _, source in compiled(directory))


def wait_for(condition, seconds: float = 60) -> None:
    for _ in range(int(seconds * 10)):
        if condition():
            return
        time.sleep(0.1)
    pytest.fail(f"what was waited for did not happen within {seconds} s")


def is_alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def libraries(project: Project) -> list[Path]:
    return list(project.cache.glob("*/_C.so"))


@pytest.fixture
def second_source(project: Project) -> Path:
    path = project.source.with_name("second.cpp")
    path.write_text("int second() { return 2; }\n")
    return path


def test_compiles_once_and_says_so(project: Project, tmp_path: Path):
    cxx = logging_compiler(tmp_path)
    cold = project.run("-c", LOAD, CXX=cxx)
    assert cold.stdout == "42\n", cold.stderr
    assert "compiling the C++ extension" in cold.stderr and "minute" in cold.stderr and "compiled in" in cold.stderr
    warm = project.run("-c", LOAD, CXX=cxx)
    assert (warm.stdout, warm.stderr) == ("42\n", "")
    assert sources(tmp_path) == ["python.cpp"]
    (library,) = libraries(project)
    assert sorted(path.name for path in library.parent.iterdir()) == ["_C.json", "_C.so"]


@pytest.mark.parametrize("change", ["source", "compiler"])
def test_another_configuration_is_another_library(project: Project, tmp_path: Path, change: str):
    assert project.run("-c", LOAD).returncode == 0
    variables = {}
    if change == "source":
        project.source.write_text(project.source.read_text().replace("42", "43"))
    else:
        variables["CXX"] = logging_compiler(tmp_path)
    again = project.run("-c", LOAD, **variables)
    assert again.stdout == ("43\n" if change == "source" else "42\n")
    assert len(libraries(project)) == 2


def test_the_instruction_sets_are_part_of_a_librarys_name():
    from dataclasses import replace

    from resnorm_ext.build import jit

    toolchain = jit.detect()
    assert jit._cached_library(toolchain) != jit._cached_library(replace(toolchain, isas=("scalar", "other")))


def test_an_edit_compiles_what_depends_on_it(project: Project, second_source: Path, tmp_path: Path):
    cxx = logging_compiler(tmp_path)
    header = second_source.with_suffix(".h")
    header.write_text("#define SECOND 2\n")
    second_source.write_text('#include "second.h"\nint second() { return SECOND; }\n')
    assert project.run("-c", LOAD, CXX=cxx).stdout == "42\n"
    header.write_text("#define SECOND 3\n")
    assert project.run("-c", LOAD, CXX=cxx).stdout == "42\n"
    project.source.write_text(project.source.read_text().replace("42", "43"))
    assert project.run("-c", LOAD, CXX=cxx).stdout == "43\n"
    assert sources(tmp_path) == ["python.cpp"] * 2 + ["second.cpp"] * 2


def test_the_cache_does_not_grow_with_every_edit(project: Project):
    assert project.run("-c", LOAD).returncode == 0
    (library,) = libraries(project)
    for number in range(5):
        older = library.parent.with_name(f"{library.parent.name.rsplit('-', 1)[0]}-{number}") / library.name
        older.parent.mkdir()
        older.touch()
        os.utime(older, (number, number))
    project.source.write_text(project.source.read_text().replace("42", "43"))
    assert project.run("-c", LOAD).stdout == "43\n"
    assert len(left := libraries(project)) == 3 and library in left


def test_processes_that_start_together_compile_once(project: Project, tmp_path: Path):
    cxx = logging_compiler(tmp_path)
    processes = [project.start("-c", LOAD, CXX=cxx) for _ in range(3)]
    results = [process.communicate(timeout=300) for process in processes]
    assert [stdout for stdout, _ in results] == ["42\n"] * 3, results
    assert sources(tmp_path) == ["python.cpp"]


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_compilers_end_with_who_waits_and_the_next_call_goes_on(
    project: Project, second_source: Path, tmp_path: Path, how: signal.Signals
):
    cxx = logging_compiler(tmp_path)
    (tmp_path / "hang").touch()
    victim = project.start("-c", HEED_INTERRUPTS + LOAD, CXX=cxx, MAX_JOBS="2")
    try:
        wait_for(lambda: any("second.o" in log.read_text() for log in project.cache.glob("*/.ninja_log")))
        wait_for(lambda: len(compiled(tmp_path)) == 2)
        (hanging,) = (process for process, source in compiled(tmp_path) if source == "python.cpp")
        assert is_alive(hanging)
        os.kill(victim.pid, how)
        victim.wait(timeout=60)
        wait_for(lambda: not is_alive(hanging), seconds=5)
        assert not libraries(project)
    finally:
        (tmp_path / "hang").unlink()
    result = project.run("-c", LOAD, CXX=cxx)
    assert result.stdout == "42\n", result.stderr
    assert sources(tmp_path) == ["python.cpp", "python.cpp", "second.cpp"]


def test_a_compiler_that_breaks_down_leaves_nothing_and_the_next_call_goes_on(
    project: Project, second_source: Path, tmp_path: Path
):
    cxx = logging_compiler(tmp_path)
    (tmp_path / "fail").touch()
    result = project.run("-c", LOAD, CXX=cxx)
    error = result.stderr.rpartition("ImportError: ")[2]
    assert "the compiler broke down" in error and "CXX can name another compiler" in error
    assert f"pip install --no-build-isolation -e {project.root}" in error
    assert not libraries(project)
    (tmp_path / "fail").unlink()
    assert project.run("-c", LOAD, CXX=cxx).stdout == "42\n"
    assert sources(tmp_path) == ["python.cpp", "python.cpp", "second.cpp"]


def test_sources_that_are_edited_while_they_compile(project: Project, tmp_path: Path):
    """What comes of it is what the sources are then, and is never taken for what they were."""
    cxx, right = logging_compiler(tmp_path), project.source.read_text()
    (tmp_path / "hang").touch()
    process = project.start("-c", LOAD, CXX=cxx)
    wait_for(lambda: compiled(tmp_path))
    project.source.write_text(right.replace("42", "43"))
    (tmp_path / "hang").unlink()
    assert process.communicate(timeout=300)[0] == "43\n"
    project.source.write_text(right)
    assert project.run("-c", LOAD, CXX=cxx).stdout == "42\n"


def test_a_source_that_does_not_compile(project: Project):
    right = project.source.read_text()
    project.source.write_text("#error this cannot compile\n")
    result = project.run("-c", LOAD)
    assert "ImportError" in result.stderr and "this cannot compile" in result.stderr and not libraries(project)
    project.source.write_text(right)
    assert project.run("-c", LOAD).stdout == "42\n"


@pytest.mark.parametrize("obstacle", ["a file", "no writing"])
def test_a_cache_that_cannot_be_written(project: Project, obstacle: str):
    project.cache.touch()
    cache = str(project.cache) if obstacle == "a file" else "/proc/resnorm"  # where root cannot write either
    result = project.run("-c", LOAD, RESNORM_CACHE_DIR=cache)
    error = result.stderr.splitlines()[-1]
    assert error.startswith("ImportError") and f"cannot be compiled in {cache}" in error
    assert "Name a folder that can be written in RESNORM_CACHE_DIR" in error
    assert project.run("-c", LOAD, RESNORM_CACHE_DIR=str(project.root / "elsewhere")).stdout == "42\n"


@pytest.fixture
def group_may_write():
    """The umask that many distributions give their users."""
    before = os.umask(0o002)
    yield
    os.umask(before)


@pytest.mark.usefixtures("group_may_write")
@pytest.mark.parametrize("where", ["the cache", "a library's folder", "a library"])
@pytest.mark.parametrize("how", ["written by others", "somebody else's"])
def test_what_others_can_change_is_not_loaded(project: Project, where: str, how: str):
    if how == "somebody else's" and os.geteuid() != 0:
        pytest.skip("only root can give files away")
    assert project.run("-c", LOAD).stdout == "42\n"
    (library,) = libraries(project)
    path = {"the cache": project.cache, "a library's folder": library.parent, "a library": library}[where]
    assert path.stat().st_mode & 0o022 == 0
    if how == "written by others":
        path.chmod(path.stat().st_mode | 0o002)
    else:
        os.chown(path, 65534, -1)
    result = project.run("-c", LOAD)
    error = result.stderr.splitlines()[-1]
    assert error.startswith("ImportError") and f"{path} holds code that would run as you" in error
    assert "RESNORM_CACHE_DIR" in error and result.stdout == ""


def test_nothing_is_compiled_where_others_can_change_it(project: Project, tmp_path: Path):
    cxx = logging_compiler(tmp_path)
    project.cache.mkdir()
    project.cache.chmod(0o777)
    result = project.run("-c", LOAD, CXX=cxx)
    assert "got user" in result.stderr and "mode 0777" in result.stderr
    assert not compiled(tmp_path) and not list(project.cache.iterdir())

    project.cache.chmod(0o755)
    assert project.run("-c", LOAD, CXX=cxx).stdout == "42\n"
    (objects,) = project.cache.glob("*-objects")
    objects.chmod(0o777)
    project.source.write_text("int other;\n")
    result = project.run("-c", LOAD, CXX=cxx)
    assert f"{objects} holds code that would run as you" in result.stderr
    assert sources(tmp_path) == ["python.cpp"]


def test_changed_sources_ask_for_a_restart(project: Project):
    code = (
        "from pathlib import Path; from resnorm_ext.build import extension, jit; extension.load_extension();"
        "source = Path('csrc/python.cpp'); source.write_text(source.read_text().replace('42', '43'));"
        "extension.load_library(jit.compiled_library())"
    )
    result = project.run("-c", code)
    assert "RuntimeError" in result.stderr and "restart Python" in result.stderr


def test_cache_directory_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    from resnorm_ext.build import jit

    monkeypatch.delenv("RESNORM_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert jit.cache_directory() == tmp_path / "resnorm_ext"
    monkeypatch.setenv("RESNORM_CACHE_DIR", str(tmp_path / "here"))
    assert jit.cache_directory() == tmp_path / "here"
