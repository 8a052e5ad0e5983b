# SPDX-License-Identifier: BSD-3-Clause
from __future__ import annotations

import inspect
import json
import math
import re
import signal
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import byte_data
import language_model
import pytest
import torch
from byte_data import Document, Windows
from gpt import GPT
from progress import LossProgress
from torch import nn

from .gpt_cases import CONTEXT, SIZES, model_of, plain_rms, to_gpt2


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "few.txt"
    path.write_text(inspect.getdoc(re.compile) + inspect.getdoc(json.dumps))
    return path


@pytest.fixture
def arguments(text: Path, tmp_path: Path) -> Callable[..., list[str]]:
    """The command line of a training of 12 steps or so an epoch, with ``more`` options."""

    def command_line(*more: object) -> list[str]:
        sizes = [each for name, size in SIZES.items() for each in (f"--{name}", size)]
        batches = () if "--token-budget" in more else ("--batch-size", 6)
        given = ["--text", text, "--output", tmp_path, *batches, "--generate", 0, *sizes, *more]
        return [str(each) for each in given]

    return command_line


def run(arguments: list[str], folder: Path, *more: object) -> list[float]:
    """Trains in this process, to ``folder``, and returns the losses."""
    assert language_model.main([*arguments, "--output", str(folder), *map(str, more)]) == 0
    return json.loads((folder / "result.json").read_text())["losses"]


def test_rms_has_no_layer_norm_and_else_there_is_nothing_but(arguments, tmp_path: Path):
    for flags, kind, other in (((), nn.LayerNorm, nn.RMSNorm), (("--rms",), nn.RMSNorm, nn.LayerNorm)):
        run(arguments("--epochs", 1, *flags), tmp_path)
        modules = list(language_model.load(tmp_path / "model.pt").modules())
        norms = [module for module in modules if isinstance(module, kind)]
        assert len(norms) == 2 * SIZES["layers"] + 1
        assert all(type(norm).__module__.startswith("resnorm_ext.") for norm in norms)
        assert not any(isinstance(module, other) for module in modules)


def test_bits_per_byte_are_a_plain_computation():
    context, overlap = CONTEXT, CONTEXT // 2
    contents = [bytes(torch.randint(256, (length,)).tolist()) for length in (1, 20, CONTEXT, CONTEXT + 1, 131)]
    windows = Windows([Document("", each) for each in contents], context, overlap)
    model = model_of().eval()
    gpt2 = to_gpt2(model).double().eval()
    bits = []
    for content in contents:
        for place, byte in enumerate(content):
            begin = max(0, (place - overlap) // (context - overlap)) * (context - overlap)
            assert place - begin >= overlap or begin == 0
            ids = torch.tensor([[byte_data.START, *content][begin : place + 1]])
            with torch.no_grad():
                bits.append(-torch.log_softmax(gpt2(ids).logits[0, -1], -1)[byte].item() / math.log(2))
    expected = sum(bits) / len(bits)
    assert language_model.bits_per_byte(model, windows, "float32") == pytest.approx(expected, rel=1e-6)
    assert language_model.bits_per_byte(model, windows, "bfloat16") == pytest.approx(expected, rel=1e-2)


@pytest.mark.parametrize("rms", [False, True])
def test_an_untrained_model_needs_eight_bits(documents: list[Document], rms: bool):
    torch.manual_seed(0)
    model = GPT(256, **SIZES, rms=rms).eval()
    windows = Windows(documents[:5], CONTEXT, CONTEXT // 2, limit=100)
    assert language_model.bits_per_byte(model, windows, "float32") == pytest.approx(8, abs=0.1)


def test_the_loss_falls(arguments, tmp_path: Path, text: Path, capsys):
    how = ("--epochs", 30, "--batch-size", 2, "--lr", 5e-3, "--dropout", 0.02, "--generate", 30, "--prompt", "If ")
    losses = run(arguments(*how), tmp_path)
    shares = [count / text.stat().st_size for count in Counter(text.read_bytes()).values()]
    of_single_bytes = -sum(share * math.log(share) for share in shares)
    assert losses[0] == pytest.approx(math.log(256), abs=0.1)
    assert sum(losses[-20:]) / 20 < 0.8 * of_single_bytes
    shown, result = capsys.readouterr().out, json.loads((tmp_path / "result.json").read_text())
    assert result["tokens"] == 30 * round(0.9 * text.stat().st_size)
    held_out = text.read_bytes()[round(0.9 * text.stat().st_size) :]
    assert f"{len(held_out):,} to test on" in shown
    model = language_model.load(tmp_path / "model.pt")
    windows = Windows([Document("", held_out)], CONTEXT, CONTEXT // 2)
    bits = language_model.bits_per_byte(model, windows, "float32")
    assert result["bits_per_byte"] == pytest.approx(bits) and f" {bits:.3f} " in shown and f" {2**bits:.3f} " in shown
    assert set(result["compressed"]) == {"xz -9e", "bzip2 -9"} and result["peak_mib"] > 100
    assert (tmp_path / "loss.png").stat().st_size > 0
    written = language_model.write(model, b"If ", 30, 0.7, 0)
    assert len(written) == 33 and shown.endswith(f"\n{written.decode(errors='replace')}\n")


@pytest.mark.parametrize("how", [(), ("--rms",), ("--token-budget", 100), ("--dtype", "bfloat16")])
def test_a_stopped_training_goes_on_to_the_same_curve(arguments, tmp_path: Path, monkeypatch, capsys, how):
    command = arguments("--epochs", 2, "--dropout", 0.1, *how)
    whole = run(command, tmp_path / "whole")
    original, stop = LossProgress.step, len(whole) // 2 + 2  # in the second epoch

    def then_signal(self, losses, rate):
        original(self, losses, rate)
        if len(losses) == stop:
            signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(LossProgress, "step", then_signal)
        assert language_model.main([*command, "--output", str(tmp_path / "stopped")]) == 128 + signal.SIGINT
    assert f"stopped by SIGINT after step {stop}" in capsys.readouterr().err
    writing = ("--generate", 5, "--prompt", "a", "--temperature", 0)  # which the training does not depend on
    assert run(command, tmp_path / "stopped", "--resume", *writing) == whole


def test_a_checkpoint_of_another_training_is_refused(arguments, text: Path, tmp_path: Path, capsys):
    run(arguments("--epochs", 1), tmp_path)
    other = tmp_path / "other.txt"
    other.write_bytes(text.read_bytes())
    for more, said in ((("--width", 64), "--width 32, not 64"), (("--text", other), f"--text {text}, not {other}")):
        assert language_model.main(arguments("--epochs", 1, "--resume", *more)) == 1
        assert said in capsys.readouterr().err


@pytest.mark.parametrize("rms", [False, True])
def test_bfloat16_and_a_limit(arguments, documents, tmp_path: Path, monkeypatch, capsys, rms: bool):
    monkeypatch.setattr(byte_data, "python_documentation", lambda: documents)
    command = [each for each in arguments("--limit", 20, "--epochs", 1, *(["--rms"] if rms else []))]
    del command[:2]  # the text
    losses = run(command, tmp_path)
    assert f" {20 * CONTEXT:,} bytes to train on" in capsys.readouterr().out
    assert run(command, tmp_path, "--dtype", "bfloat16") == pytest.approx(losses, abs=2e-2)
    assert len(losses) == 4


@pytest.mark.parametrize("rms", [False, True])
def test_writing_repeats_and_slides(rms: bool):
    model = model_of(rms=rms).eval()
    count = 2 * CONTEXT
    written = language_model.write(model, b"ab", count, 0.7, 0)
    assert len(written) == 2 + count and written.startswith(b"ab")
    assert written == language_model.write(model, b"ab", count, 0.7, 0)
    assert written != language_model.write(model, b"ab", count, 0.7, 1)
    greedy = language_model.write(model, b"ab", count, 0.0, 0)
    assert language_model.write(model, b"ab", count, 1e-320, 3) == greedy
    ids = [byte_data.START, *b"ab"]
    reference = None if rms else to_gpt2(model).eval()
    for _ in range(count):
        window = torch.tensor(ids[-CONTEXT:])
        with torch.no_grad():
            logits = plain_rms(model, window) @ model.tokens.weight.t() if rms else reference(window[None]).logits[0]
        ids.append(int(logits[-1].argmax()))
    assert greedy == bytes(ids[1:])


def test_temperature_is_what_the_logits_are_divided_by():
    class Fixed(nn.Module):
        context = 8

        def forward(self, ids, bounds):
            logits = torch.full((len(ids), 256), -torch.inf)
            logits[:, :2] = torch.tensor([math.log(4.0), 0.0])
            return type("Output", (), {"logits": logits})

    for temperature, share in ((1.0, 4 / 5), (0.5, 16 / 17), (2.0, 2 / 3)):
        written = language_model.write(Fixed(), b"", 3000, temperature, 0)
        assert written.count(0) / 3000 == pytest.approx(share, abs=0.04)


def test_a_model_file_writes_without_a_text(arguments, tmp_path: Path, monkeypatch, capsys):
    run(arguments("--epochs", 1, "--rms"), tmp_path)
    file = tmp_path / "model.pt"
    monkeypatch.setattr(byte_data, "python_documentation", lambda: pytest.fail("read"))
    capsys.readouterr()
    given = ["--model", str(file), "--generate", "20", "--prompt", "[red]\udcff", "--seed"]
    assert language_model.main([*given, "3"]) == language_model.main([*given, "3"]) == 0
    one, other = capsys.readouterr().out[:-1].split("\n[red]")
    expected = language_model.write(language_model.load(file), b"[red]\xff", 20, 0.7, 3).decode(errors="replace")
    assert one == f"[red]{other}" == expected

    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / "damaged.pt").write_bytes(content)
    cases = {
        "damaged.pt": "is damaged: ",
        "checkpoint.pt": "is not a model of this example: 'sizes'",
        "missing.pt": "is no checkpoint, or not a whole one: ",
    }
    for name, said in cases.items():
        assert language_model.main(["--model", str(tmp_path / name)]) == 1
        error = capsys.readouterr().err
        assert error.startswith(f"language_model: {tmp_path / name} {said}") and error.count("\n") == 1


@pytest.mark.parametrize("content", [None, b"", b"x" * (10 * CONTEXT - 1)])
def test_a_text_that_cannot_be_used_is_named(arguments, tmp_path: Path, capsys, content: bytes | None):
    path = tmp_path / "odd.txt"
    if content is not None:
        path.write_bytes(content)
    assert language_model.main(arguments("--text", path)) == 1
    error = capsys.readouterr().err
    assert error.startswith("language_model: ") and error.count("\n") == 1 and str(path) in error
    assert ("No such file" if content is None else f"{10 * CONTEXT} bytes or more, but it has {len(content)}") in error


def test_a_text_may_be_any_bytes(arguments, tmp_path: Path):
    path = tmp_path / "odd.txt"
    path.write_bytes(bytes(range(256)) * 2)
    assert run(arguments("--epochs", 1, "--text", path, "--generate", 20), tmp_path)


def test_a_loss_that_is_not_finite_stops(arguments, text: Path, capsys):
    assert language_model.main(arguments("--lr", 1e38)) == 1
    error = capsys.readouterr().err
    assert re.fullmatch(
        rf"language_model: the [a-z ]+ is (nan|inf) at step \d+, on the texts {text} from byte .*\n", error
    )


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--context", 1),
        ("--layers", 0),
        ("--heads", 0),
        ("--heads", 3),
        ("--width", "many"),
        ("--dropout", 1.5),
        ("--generate", -1),
        ("--temperature", -0.1),
        ("--temperature", "nan"),
        ("--batch-size", 0),
    ],
)
def test_options_out_of_range(arguments, capsys, option: str, value: object):
    with pytest.raises(SystemExit) as ended:
        language_model.main(arguments(option, value))
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert option in error and "expected" in error and "Traceback" not in error
