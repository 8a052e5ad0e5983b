# SPDX-License-Identifier: BSD-3-Clause
from __future__ import annotations

from pathlib import Path

import pytest
from goals import goals_for
from norm_operations import Case
from results import OURS, Configuration, Results, load

CARD = {"device": "cuda", "hardware": "NVIDIA H100 80GB HBM3", "threads": 1, "isa": "avx2", "allocator": "kept"}
CARD |= {"torch": "2.14.1", "commit": "abc", "large_copy_bytes_per_second": 3.0e12}


def write(path: Path, environment: dict, *bandwidths: tuple[Case, dict[str, float]]) -> None:
    """One run, with each contender's bandwidth in TB/s."""
    results = Results(path, "norm", environment)
    for case, contenders in bandwidths:
        for contender, terabytes in contenders.items():
            seconds = case.least_bytes() / (terabytes * 1e12)
            figures = {"seconds": seconds, "host_seconds": 1e-5, "least_bytes": case.least_bytes()}
            results.write(case.as_dict(), contender, **figures)


def verdicts(configuration: Configuration) -> dict[str, bool]:
    measured = {goal.what: goal.reached(configuration) for goal in goals_for(configuration)}
    return {what: reached for what, reached in measured.items() if reached is not None}


def test_goals_of_a_card(tmp_path: Path, capsys: pytest.CaptureFixture):
    path = tmp_path / "cuda.jsonl"
    write(
        path,
        CARD,
        (Case("layer_norm", "bfloat16", 32768, 768), {OURS: 2.6, "torch": 1.3, "copy": 2.7}),
        (Case("layer_norm", "bfloat16", 32768, 1024), {OURS: 2.6, "torch": 1.3, "copy": 2.7}),
        (Case("layer_norm", "bfloat16", 32768, 1000), {OURS: 2.4, "torch": 1.3, "copy": 2.7}),
        (Case("layer_norm", "bfloat16", 32768, 16384), {OURS: 2.9, "copy": 2.95}),
        (Case("layer_norm", "bfloat16", 32768, 32768), {OURS: 2.8, "copy": 2.95}),
        (Case("layer_norm backward", "bfloat16", 32768, 1024), {OURS: 2.75, "torch": 1.4}),
        (Case("dropout_add_layer_norm", "bfloat16", 16384, 4096), {OURS: 2.0, "copy": 2.95}),
        (Case("add_layer_norm with sum", "bfloat16", 16384, 4096), {OURS: 2.06, "copy": 2.1}),
    )
    (configuration,) = load([path])
    assert verdicts(configuration) == {
        "LN forward bf16, 32768×768": True,
        "LN forward bf16, 32768×1024": False,
        "LN forward bf16, 32768×8K…128K": False,  # the worse of the two
        "add + LN forward with the sum, 16384 rows": True,
        "LN backward bf16, 32768×1K…8K": True,
        "LN backward, worst cell, against torch": False,
        "awkward sizes over their neighbours' curve": False,  # 1000 lies 7.7% below 768 and 1024
        "dropout, time over that without, from 4K up": True,
    }

    import report

    report.main([str(path), "--output", str(tmp_path / "report")])
    printed = capsys.readouterr().out
    assert "NVIDIA H100 80GB HBM3" in printed and "≥ 2.70 TB/s" in printed
    (picture,) = (tmp_path / "report").glob("norm-cuda-*.png")
    summary = picture.with_suffix(".svg").read_text()
    assert "layer_norm, bfloat16" in summary and "1.95×" in summary and "torch" in summary
    document = (tmp_path / "report" / "report.md").read_text()
    assert (
        picture.name in document
        and "| layer_norm, bfloat16, 32768×1024 | 134 | 51.6 | 2600 | 96% | 2.00× |" in document
    )


def test_without_rich_and_matplotlib_there_are_tables(tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch):
    import report

    monkeypatch.setattr(report, "find_spec", lambda name: None)
    path = tmp_path / "cuda.jsonl"
    write(path, CARD, (Case("layer_norm", "bfloat16", 32768, 1024), {OURS: 2.6, "torch": 1.3, "copy": 2.7}))
    report.main([str(path), "--output", str(tmp_path / "report"), "--cases"])
    row = "| layer_norm, bfloat16, 32768×1024 | 134 | 51.6 | 2600 | 96% | 2.00× |"
    assert row in capsys.readouterr().out
    assert [file.name for file in (tmp_path / "report").iterdir()] == ["report.md"]
    assert row in (tmp_path / "report" / "report.md").read_text()


def test_goals_scale_with_the_cards_bandwidth(tmp_path: Path):
    path = tmp_path / "cuda.jsonl"
    case = Case("layer_norm", "bfloat16", 32768, 1024)  # 2.7 TB/s asked of an H100
    write(path, CARD | {"hardware": "A", "large_copy_bytes_per_second": 1.5e12}, (case, {OURS: 1.4}))
    write(path, CARD | {"hardware": "B", "large_copy_bytes_per_second": 4.5e12}, (case, {OURS: 2.8}))
    small, large = load([path])
    assert verdicts(small) == {"LN forward bf16, 32768×1024": True}
    assert verdicts(large) == {"LN forward bf16, 32768×1024": False}


def test_figures_are_medians_over_runs_and_ratios_are_taken_within_each(tmp_path: Path):
    case = Case("layer_norm", "float32", 1, 768)
    path = tmp_path / "cpu.jsonl"
    for ours, theirs in ((1.0, 0.5), (10.0, 2.0), (3.0, 1.0)):
        write(path, CARD | {"device": "cpu", "aten": "AVX2", "isa": "avx512"}, (case, {OURS: ours, "torch": theirs}))
    (configuration,) = load([path])
    (cell,) = configuration.select(operation="layer_norm")
    assert cell.speedup("torch") == pytest.approx(3.0)
    assert cell.bandwidth() == pytest.approx(3e12)
    assert verdicts(configuration)["LN forward float32, worst cell, against torch"]
