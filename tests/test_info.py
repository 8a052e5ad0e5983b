# SPDX-License-Identifier: BSD-3-Clause
from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from tiny_project import Project, installed


def info(project: Project, **variables: str) -> dict:
    result = project.run("-m", "resnorm_ext", "info", "--json", **variables)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


@pytest.mark.smoke
def test_reports_this_installation():
    command = [sys.executable, "-m", "resnorm_ext", "info", "--json"]
    environment = installed() | {"RESNORM_CPU_ISA": "scalar"}
    report = json.loads(subprocess.run(command, cwd="/", env=environment, check=True, capture_output=True).stdout)
    assert report["torch"]["version"] == str(torch.__version__)
    assert report["kernels"]["in_use"] == "scalar" and "scalar" in report["kernels"]["cpu_isas"]
    assert report["extension"]["torch"].split(".")[:2] == str(torch.__version__).split(".")[:2]
    assert report["environment"]["RESNORM_CPU_ISA"] == "scalar"
    assert not [part for part in report.values() if "error" in part]


def test_reads_as_text(project: Project):
    project.build_in_place()
    result = project.run("-m", "resnorm_ext", "info")
    assert result.stdout.startswith("resnorm_ext 0.1.0\n") and "ahead of time" in result.stdout


def test_does_not_compile(project: Project):
    report = info(project)
    assert report["extension"]["built"].startswith("not yet") and not project.cache.exists()
    assert info(project, RESNORM_JIT="0")["extension"]["built"] == "no"


def test_finds_what_the_jit_has_compiled(project: Project):
    assert project.run("-c", "from resnorm_ext.build import jit; jit.compiled_library()").returncode == 0
    assert info(project)["extension"]["built"] == "at first use"


def test_runs_with_a_broken_extension(project: Project):
    library = project.build_in_place()
    library.write_bytes(b"not a library")
    report = info(project)
    assert report["extension"]["path"] == str(library) and report["extension"]["torch"] == "2.13.0+cpu"
    assert "cannot be loaded" in report["kernels"]["error"]
    library.with_suffix(".json").write_text("{")
    assert "ImportError" in info(project)["extension"]["error"]


def test_runs_with_an_extension_for_another_torch(project: Project):
    project.build_in_place()
    report = info(project, STUB_TORCH="2.14.1")
    assert report["extension"]["built_for"] == "cpu.torch2.13"
    assert "was built for PyTorch 2.13.0 (CPU), you have PyTorch 2.14.1 (CPU)" in report["kernels"]["error"]


def test_says_that_the_sources_changed_since_the_build(project: Project):
    project.build_in_place()
    assert "stale" not in info(project)["extension"]
    project.source.write_text(project.source.read_text() + "\n")
    assert "csrc has changed since" in info(project)["extension"]["stale"]


def test_unknown_command_names_the_known_ones(project: Project):
    result = project.run("-m", "resnorm_ext", "inform")
    assert result.returncode == 2 and "info" in result.stderr and "demo" in result.stderr


def test_output_that_nobody_reads(project: Project):
    project.build_in_place()
    process = project.start("-m", "resnorm_ext", "info")
    process.stdout.close()
    assert process.stderr.read() == "" and process.wait() == 141
