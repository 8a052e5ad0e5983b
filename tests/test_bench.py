# SPDX-License-Identifier: BSD-3-Clause
"""``python -m resnorm_ext bench``, on little work."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from resnorm_ext import bench


@pytest.fixture(autouse=True)
def little_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "_ROWS", (4,))
    monkeypatch.setattr(bench, "_COLUMNS", 48)
    monkeypatch.setattr(bench, "_SHORTEST", 1e-5)


def test_figures_and_plot(tmp_path: Path, capsys: pytest.CaptureFixture):
    pytest.importorskip("matplotlib")
    plot = tmp_path / "bench.png"
    assert bench.main(["--samples", "2", "--json", "--plot", str(plot)]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["torch"] == str(torch.__version__) and len(report["results"]) == 12
    for result in report["results"]:
        assert result["ratio"] > 0 and result["ours_microseconds"] > 0 and result["device"] == "cpu"
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_both_compute_the_same():
    torch.manual_seed(0)
    for work, calls in bench.works(torch.device("cpu"), torch.float32):
        if "training" in work:  # with dropout
            continue
        ours, theirs = (call() for call in calls)
        if "inference" in work:
            real = ours.abs().sum(-1) > 0  # padded positions are zeros in ours
            assert int(real.sum()) == 128 + 90 + 70 + 64 + 50 + 40 + 30 + 20
            ours, theirs = ours[real], theirs[real]
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_text(capsys: pytest.CaptureFixture):
    assert bench.main(["--samples", "1"]) == 0
    assert capsys.readouterr().out.count("×  ") == 12


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "abacus"], "argument --device: abacus: Expected one of cpu"),
        (["--device", "cuda:77"], "argument --device: cuda:77: "),
        (["--samples", "0"], "argument --samples: expected at least 1, but got 0"),
        (["--plot", "no/such/folder/x.png"], "argument --plot: expected a .png, .svg or .pdf in a folder that exists"),
        (["--plot", "x.txt"], "argument --plot: expected a .png, .svg or .pdf in a folder that exists, but got x.txt"),
    ],
)
def test_one_line_says_what_is_wrong(arguments, message, capsys: pytest.CaptureFixture):
    with pytest.raises(SystemExit) as caught:
        bench.main(arguments)
    assert caught.value.code == 2 and message in capsys.readouterr().err.splitlines()[-1]
