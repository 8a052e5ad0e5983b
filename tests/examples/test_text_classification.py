# SPDX-License-Identifier: BSD-3-Clause
from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import checkpoint
import memory
import pytest
import text_classification
import torch
import training
import variants
from progress import LossProgress
from transformers import AutoModelForSequenceClassification

VARIANTS = variants.VARIANTS


def run(arguments: list[str], folder: Path, variant: str, *more: object) -> list[float]:
    """Trains in this process, to ``folder``, and returns the losses."""
    given = [*arguments, "--only", variant, "--output", str(folder), *map(str, more)]
    assert text_classification.main(given) == 0
    return json.loads((folder / variant / "result.json").read_text())["losses"]


def stop_after(monkeypatch: pytest.MonkeyPatch, step: int, number: int = signal.SIGTERM) -> None:
    original = LossProgress.step

    def then_signal(self, losses, rate):
        original(self, losses, rate)
        if len(losses) == step:
            signal.raise_signal(number)

    monkeypatch.setattr(LossProgress, "step", then_signal)


@pytest.mark.parametrize("how", [(), ("--dtype", "bfloat16"), ("--token-budget", "80"), ("--trainer",)])
def test_variants_have_the_same_first_losses_without_dropout(arguments, tmp_path: Path, how: tuple[str, ...]):
    stock, accelerated = (run(arguments("--dropout", 0, *how), tmp_path, variant) for variant in VARIANTS)
    assert len(stock) == len(accelerated) >= 10
    tolerance = 1e-5 if "bfloat16" not in how else 1e-2
    assert accelerated[:3] == pytest.approx(stock[:3], abs=tolerance)


def test_the_trainer_takes_the_same_steps_as_the_loop(arguments, tmp_path: Path):
    loop = run(arguments(), tmp_path / "loop", "accelerated")
    assert run(arguments("--trainer"), tmp_path / "trainer", "accelerated") == pytest.approx(loop, abs=1e-6)


@pytest.mark.parametrize("how", [(), ("--token-budget", "80"), ("--trainer",)])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_stopped_training_goes_on_to_the_same_curve(arguments, tmp_path, monkeypatch, capsys, variant, how):
    whole = run(arguments(*how), tmp_path / "whole", variant)
    command = arguments("--only", variant, "--output", tmp_path / "stopped", *how)
    number = signal.SIGTERM if variant == "stock" else signal.SIGINT
    with monkeypatch.context() as patch:
        stop_after(patch, 9, number)  # in the second epoch
        assert text_classification.main(command) == 128 + number
    assert f"stopped by {number.name} after step 9" in capsys.readouterr().err
    assert run(arguments(*how), tmp_path / "stopped", variant, "--resume") == whole


@pytest.mark.parametrize(("first", "second"), [VARIANTS, VARIANTS[::-1]])
def test_a_checkpoint_of_either_variant_goes_on_as_the_other(arguments, tmp_path, monkeypatch, first, second):
    whole = run(arguments("--dropout", 0), tmp_path / "whole", second)
    with monkeypatch.context() as patch:
        stop_after(patch, 9)
        text_classification.main(arguments("--dropout", 0, "--only", first))
    losses = run(arguments("--dropout", 0), tmp_path, second, "--resume", tmp_path / first / "checkpoint.pt")
    assert losses == pytest.approx(whole, abs=1e-4)


def test_a_kill_of_the_program(arguments, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch):
    """As from a shell: killed in the first steps, looked at, and gone on with to the end of both variants."""
    command = arguments("--save-every", 1, "--epochs", 6)
    first = tmp_path / "stock" / "checkpoint.pt"
    script = [sys.executable, text_classification.__file__]
    process = subprocess.Popen([*script, *command], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    while not first.exists() and process.poll() is None:
        time.sleep(0.01)
    process.terminate()
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM and "Traceback" not in errors
    done = len(checkpoint.load(first)["run"]["losses"])
    assert f"stopped by SIGTERM after step {done};" in errors

    # Here, and not in processes, whose imports take longer than all else.
    monkeypatch.setattr(variants, "_run", lambda given: text_classification.main(given[len(script) :]))
    assert text_classification.main([*command, "--resume"]) == 0
    shown = capsys.readouterr().out
    assert f"after step {done}." in shown and "seconds of training" in shown
    assert (tmp_path / "loss.png").stat().st_size > 0
    for variant in VARIANTS:
        model = AutoModelForSequenceClassification.from_pretrained(tmp_path / variant / "model")
        assert model.config.id2label == {0: "negative", 1: "neutral", 2: "positive"}


@pytest.mark.parametrize("how", [(), ("--trainer",)])
def test_a_loss_that_is_not_finite_stops(arguments, tmp_path: Path, capsys, how: tuple[str, ...]):
    command = arguments("--only", "accelerated", "--lr", 1e38, "--save-every", 1, *how)
    assert text_classification.main(command) == 1
    error = capsys.readouterr().err
    assert error.startswith("text_classification: the ") and error.count("\n") == 1
    assert " is nan at step " in error or " is inf at step " in error
    assert ", on the texts " in error and ("film" in error or "product" in error)


def test_a_signal_after_the_last_step_is_heeded(arguments, monkeypatch: pytest.MonkeyPatch, capsys):
    """While the last checkpoint is written; the training is whole then."""
    original = checkpoint.save

    def save(path, state):
        original(path, state)
        if state["run"]["epoch"] == 2:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(checkpoint, "save", save)
    command = arguments("--only", "stock")
    assert text_classification.main(command) == 128 + signal.SIGTERM
    assert "stopped by SIGTERM after step 14" in capsys.readouterr().err
    assert text_classification.main([*command, "--resume"]) == 0


def test_a_finished_training_keeps_what_it_took(arguments, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    command = arguments("--only", "stock")
    results = []
    for more in ([], ["--resume"]):
        assert text_classification.main([*command, *more]) == 0
        results.append(json.loads((tmp_path / "stock" / "result.json").read_text()))
        monkeypatch.setattr(memory, "peak_memory", lambda: 2**40)
    for key in ("losses", "seconds", "tokens", "peak_mib", "predicted"):
        assert results[0][key] == results[1][key]
    assert 0 < results[0]["peak_mib"] < 2**19


def damage(path: Path, how: str) -> None:
    content = bytearray(path.read_bytes())
    if how == "flipped":
        content[len(content) // 2] ^= 1
    path.write_bytes(content[: len(content) // 2] if how == "cut" else content)


@pytest.mark.parametrize("how", ["flipped", "cut"])
@pytest.mark.parametrize("trainer", [False, True])
def test_a_damaged_checkpoint_is_named(arguments, tmp_path: Path, capsys, how: str, trainer: bool):
    more = ("--epochs", 1, "--only", "stock", *(["--trainer"] if trainer else []))
    assert text_classification.main(arguments(*more)) == 0
    capsys.readouterr()
    file = next(tmp_path.glob("stock/trainer/checkpoint-*/optimizer.pt" if trainer else "stock/checkpoint.pt"))
    damage(file, how)
    assert text_classification.main(arguments(*more, "--resume")) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"text_classification: {file} is ") and error.count("\n") == 1


def test_damaged_texts_are_named(arguments, archive: Path, tmp_path: Path, capsys):
    path = tmp_path / "few.zip"
    path.write_bytes(archive.read_bytes())
    damage(path, "cut")
    assert text_classification.main(arguments("--only", "stock", "--data", path)) == 1
    assert capsys.readouterr().err.startswith(f"text_classification: {path} is not the archive")


def test_a_checkpoint_of_another_training_is_refused(arguments, tmp_path: Path, capsys):
    run(arguments("--epochs", 1), tmp_path, "stock")
    assert text_classification.main(arguments("--epochs", 2, "--only", "stock", "--resume")) == 1
    assert "is of a training with --epochs 1, not 2" in capsys.readouterr().err
    missing = tmp_path / "missing.pt"
    assert text_classification.main(arguments("--only", "stock", "--resume", missing)) == 1
    assert f"{missing} is no checkpoint" in capsys.readouterr().err
    torch.save(torch.zeros(2), missing)
    assert text_classification.main(arguments("--only", "stock", "--resume", missing)) == 1
    assert f"{missing} does not fit this model" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("file", "reason"),
    [
        ("config.json", "model_type"),
        ("model.safetensors", "no file named"),
        ("tokenizer.json", "has no words"),
        ("", ""),
    ],
)
def test_a_model_that_cannot_be_used_is_named(
    arguments, small_model: Path, tmp_path: Path, capsys, file: str, reason: str
):
    folder = tmp_path / "model"
    if file:
        shutil.copytree(small_model, folder)
        for path in folder.glob("tokenizer*" if "tokenizer" in file else file):
            path.unlink()
    assert text_classification.main(arguments("--only", "stock", "--model", folder)) == 1
    error = capsys.readouterr().err
    begin = f"{folder} is no model that can be used: " if file else f"there is no folder {folder}"
    assert error.startswith(f"text_classification: {begin}") and error.count("\n") == 1 and reason in error


def test_texts_and_outputs_that_cannot_be_had_are_named(arguments, tmp_path: Path, capsys):
    missing = tmp_path / "missing.zip"
    assert text_classification.main(arguments("--only", "stock", "--data", missing)) == 1
    assert capsys.readouterr().err == f"text_classification: there is no file {missing}\n"
    (tmp_path / "taken").touch()
    assert text_classification.main(arguments("--only", "stock", "--output", tmp_path / "taken")) == 1
    assert "step" not in (shown := capsys.readouterr()).out and str(tmp_path / "taken") in shown.err


def test_a_checkpoint_that_is_not_finished_leaves_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "checkpoint.pt"
    checkpoint.save(path, {"step": 1})

    def half(state, file):
        file.write(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint.torch, "save", half)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.save(path, {"step": 2})
    assert checkpoint.load(path) == {"step": 1}


@pytest.mark.parametrize(
    "option",
    [
        ("--epochs", "0"),
        ("--lr", "nan"),
        ("--lr", "inf"),
        ("--seed", "9" * 20),
        ("--dropout", "2"),
        ("--limit", "some"),
    ],
)
def test_options_out_of_range(option: tuple[str, str], capsys):
    with pytest.raises(SystemExit, match="2"):
        text_classification.main(option)
    assert f"argument {option[0]}: expected a number" in capsys.readouterr().err


def test_a_batch_size_and_a_token_budget_exclude_each_other(capsys):
    with pytest.raises(SystemExit, match="2"):
        text_classification.main(["--batch-size", "8", "--token-budget", "80"])
    assert "not allowed with argument --batch-size" in capsys.readouterr().err


def test_epochs_of_a_token_budget_are_all_counted():
    sampler = training.TokenBudgetSampler([5] * 10 + [9] * 10, 20)
    lengths = []
    for epoch in range(3):
        sampler.set_epoch(epoch)
        lengths.append(len(sampler))
    assert training.count_steps(sampler, 3) == sum(lengths)
    assert sampler.epoch == 0
