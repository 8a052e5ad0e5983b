# SPDX-License-Identifier: BSD-3-Clause
"""``python -m resnorm_ext doctor``: every fault that it knows, brought about."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny_project import Project

import resnorm_ext
from resnorm_ext import doctor
from resnorm_ext.build import jit
from resnorm_ext.doctor import Finding


def of(what: str) -> Finding:
    (finding,) = (finding for finding in doctor.examine() if finding.what == what)
    return finding


def in_project(project: Project, **variables: str) -> tuple[int, dict[str, dict[str, str]]]:
    """(exit code, findings by what was looked at)."""
    result = project.run("-m", "resnorm_ext", "doctor", "--json", **variables)
    findings = json.loads(result.stdout)["findings"]
    return result.returncode, {finding["what"]: finding for finding in findings}


def test_nothing_is_wrong_here(capsys: pytest.CaptureFixture):
    assert doctor.main([]) == 0
    printed = capsys.readouterr().out
    assert "extension: " in printed and "WRONG" not in printed


def test_built_for_another_torch(project: Project):
    project.build_in_place()
    code, findings = in_project(project, STUB_TORCH="2.14.1")
    assert code == 1 and findings["extension"]["status"] == "wrong"
    assert "built for PyTorch 2.13.0 (CPU), you have PyTorch 2.14.1" in findings["extension"]["says"]


def test_not_built(project: Project):
    code, findings = in_project(project, RESNORM_JIT="0")
    assert code == 1 and "RESNORM_JIT=0 forbids" in findings["extension"]["says"]
    assert "pip install" in findings["extension"]["advice"]
    code, findings = in_project(project)
    assert code == 0 and findings["extension"]["status"] == "note" and "minutes" in findings["extension"]["says"]


def test_no_compiler(project: Project):
    code, findings = in_project(project, CXX="no-such-compiler")
    assert code == 1 and [name for name, each in findings.items() if each["status"] == "wrong"] == ["compiler"]
    assert findings["compiler"]["says"].startswith("nothing can be compiled here: no C++ compiler: looked for no-such-")
    project.build_in_place()
    _, findings = in_project(project, CXX="no-such-compiler")
    assert findings["compiler"]["status"] == "ok"  # nobody needs one then


def test_changed_sources(project: Project):
    project.build_in_place()
    project.source.write_text(project.source.read_text() + "// more")
    _, findings = in_project(project)
    assert findings["extension"]["status"] == "note" and "csrc has changed" in findings["extension"]["says"]


def test_a_cache_that_others_can_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(jit, "cache_directory", lambda: tmp_path)
    tmp_path.chmod(0o777)
    assert of("cache").status == "wrong" and "writable by nobody else" in of("cache").says


def test_more_threads_than_cores(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(doctor.torch, "get_num_threads", lambda: 10_000)
    assert of("threads").status == "note" and "OMP_NUM_THREADS=" in of("threads").advice


def test_slower_instruction_set(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(doctor.config, "best_isas", lambda: ("scalar", "avx9"))
    monkeypatch.setattr(doctor.config, "all_isas", lambda: ("scalar", "avx9"))
    monkeypatch.setenv("RESNORM_CPU_ISA", "scalar")
    finding = of("instruction set")
    assert finding.status == "note" and "this CPU has avx9" in finding.says
    assert finding.advice == "unset RESNORM_CPU_ISA=scalar"


@pytest.mark.parametrize(
    ("info", "status", "says"),
    [
        ({"cuda": None, "cuda_reason": "RESNORM_CUDA=off"}, "note", "no CUDA kernels (RESNORM_CUDA=off)"),
        ({"cuda": "13.0", "cuda_architectures": ["8.0", "10.0"]}, "wrong", "X is sm_90, and kernels are for 8.0, 10.0"),
        ({"cuda": "13.0", "cuda_architectures": ["8.0", "9.0a"]}, "ok", "with kernels for 8.0, 9.0a"),
        ({"cuda": "13.0", "cuda_architectures": ["Hopper"]}, "ok", "with kernels for Hopper"),
        ({"cuda": "13.0", "cuda_architectures": ["8.0", "9.0"]}, "ok", "with kernels for 8.0, 9.0"),
        ({"cuda": "13.0", "cuda_architectures": ["8.0+PTX"]}, "ok", "with kernels for 8.0+PTX"),
    ],
)
def test_gpu(info, status, says, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    gpu = SimpleNamespace(
        is_available=lambda: True,
        device_count=lambda: 1,
        get_device_name=lambda index: "X",
        get_device_capability=lambda index: (9, 0),
    )
    monkeypatch.setattr(doctor.torch, "cuda", gpu)
    monkeypatch.setattr(doctor, "usable_library", lambda: tmp_path)
    monkeypatch.setattr(doctor.extensions, "read_info", lambda library: info)
    finding = doctor.gpu()
    assert finding.status == status and says in finding.says


@pytest.mark.parametrize(("version", "status"), [("4.57.1", "note"), ("5.2.0", "ok"), ("5.23.0", "ok")])
def test_transformers(version, status, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(doctor.importlib.metadata, "version", lambda name: version)
    assert doctor.transformers().status == status


def test_a_look_that_fails_is_a_finding(monkeypatch: pytest.MonkeyPatch):
    def broken() -> Finding:
        raise OSError("disk on fire")

    monkeypatch.setattr(doctor, "threads", broken)
    assert of("threads") == Finding("threads", "wrong", "OSError: disk on fire")


def test_model(tmp_path: Path, capsys: pytest.CaptureFixture):
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    transformers.BertModel(transformers.BertConfig(**sizes, vocab_size=50)).save_pretrained(tmp_path)
    capsys.readouterr()
    assert doctor.main(["--model", str(tmp_path), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)["model"]
    assert {item["original"] for item in report["replaced"]} >= {"BertEmbeddings", "BertEncoder"}
    assert report["linear_layers"] and report["text"].startswith("replaced: ")
    assert doctor.main(["--model", str(tmp_path)]) == 0 and "replaced: " in capsys.readouterr().out

    (tmp_path / "model.safetensors").write_bytes(b"no weights")
    assert doctor.main(["--model", str(tmp_path)]) == 1
    assert f"WRONG model: {tmp_path} cannot be loaded" in capsys.readouterr().out


def test_a_models_code_is_not_run(tmp_path: Path, capsys: pytest.CaptureFixture):
    pytest.importorskip("transformers")
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    auto_map = {"AutoConfig": "evil.Config", "AutoModel": "evil.Model"}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "evil", "auto_map": auto_map}))
    assert doctor.main(["--model", str(tmp_path), "--json"]) == 1 and not (tmp_path / "ran").exists()
    assert json.loads(capsys.readouterr().out)["findings"][-1]["what"] == "model"


def test_one_line_says_that_there_is_no_model(tmp_path: Path, capsys: pytest.CaptureFixture):
    with pytest.raises(SystemExit) as caught:
        doctor.main(["--model", str(tmp_path)])
    assert caught.value.code == 2
    assert f"expected a folder with a config.json, but got {tmp_path}" in capsys.readouterr().err


def test_report_as_json():
    model = resnorm_ext.accelerate(torch.nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval())
    with torch.no_grad():
        model(torch.randn(1, 2, 8))
    report = json.loads(json.dumps(resnorm_ext.report(model).as_dict()))
    assert report["replaced"][0]["original"] == "TransformerEncoderLayer"
    assert sum(call["calls"] for call in report["replaced"][0]["calls"]) == 1
