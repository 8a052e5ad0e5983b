# SPDX-License-Identifier: BSD-3-Clause
from __future__ import annotations

import json
import runpy
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

import checkpoint
import pytest
import token_classification
import torch
import variants
from progress import LossProgress
from seqeval.metrics import f1_score
from tagging_data import TAGS, Sentence
from transformers import AutoModelForTokenClassification, AutoTokenizer

from .test_tagging_data import few_articles, write_articles

VARIANTS = variants.VARIANTS


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    """What ``arguments`` name, of which an epoch has 10 steps."""
    return write_articles(tmp_path / "few.tar.gz", few_articles())


def run(arguments: list[str], folder: Path, variant: str, *more: object) -> list[float]:
    """Trains in this process, to ``folder``, and returns the losses."""
    given = [*arguments, "--only", variant, "--output", str(folder), *map(str, more)]
    assert token_classification.main(given) == 0
    return json.loads((folder / variant / "result.json").read_text())["losses"]


def spans(tags: Sequence[str]) -> set[tuple[str, int, int]]:
    """Mark, begin and end of what strict IOB2 takes for an entity."""
    found, begin = set(), None
    for place, tag in enumerate([*tags, "O"]):
        if begin is not None and tag != f"I-{tags[begin][2:]}":
            found.add((tags[begin][2:], begin, place))
            begin = None
        if tag.startswith("B-"):
            begin = place
    return found


@pytest.mark.parametrize("how", [(), ("--dtype", "bfloat16"), ("--token-budget", "160")])
def test_variants_have_the_same_first_losses_without_dropout(arguments, tmp_path: Path, how: tuple[str, ...]):
    stock, accelerated = (run(arguments("--dropout", 0, *how), tmp_path, variant) for variant in VARIANTS)
    assert len(stock) == len(accelerated) >= 18
    tolerance = 1e-5 if "bfloat16" not in how else 1e-2
    assert accelerated[:3] == pytest.approx(stock[:3], abs=tolerance)
    assert stock[-1] < stock[0]


def test_the_first_token_of_a_word_alone_has_its_label(small_model: Path):
    tokenizer = AutoTokenizer.from_pretrained(small_model)
    words = ["Orycteropus", "afer", "\u00ad", "of", "Stellenbosch"] * 20  # the third leaves no token
    tags = ["B-italic", "I-italic", "O", "O", "B-link"] * 20
    (item,) = token_classification.encode([Sentence("one", words, tags, "article")], tokenizer)
    expected = [-100]
    for word, tag in zip(words, tags):
        pieces = len(tokenizer.tokenize(word))
        expected += [TAGS.index(tag)] * (pieces > 0) + [-100] * (pieces - 1)
    assert 4 * 20 < len(expected) - 1 and 128 < len(expected)
    assert item["labels"] == [*expected[:127], -100]
    assert tokenizer.decode(item["input_ids"]).startswith("[CLS] orycteropus afer of stellenbosch orycteropus")


def test_the_loss_is_that_of_the_words(arguments, small_model: Path, tmp_path: Path):
    options = ["--dropout", 0, "--batch-size", 100, "--epochs", 1, "--only", "accelerated"]
    (first,) = run(arguments(*options), tmp_path, "accelerated")
    torch.manual_seed(0)
    model = AutoModelForTokenClassification.from_pretrained(small_model, num_labels=len(TAGS)).eval()
    tokenizer = AutoTokenizer.from_pretrained(small_model)
    losses = []
    train, _ = token_classification.tagging_data.split(token_classification.tagging_data.read(tmp_path / "few.tar.gz"))
    for sentence in train:
        encoding = tokenizer([sentence.words], is_split_into_words=True, return_tensors="pt")
        firsts = [encoding.word_to_tokens(0, word).start for word in range(len(sentence.words))]
        logits = model(**encoding).logits[0, firsts]
        labels = torch.tensor([TAGS.index(tag) for tag in sentence.tags])
        losses += torch.nn.functional.cross_entropy(logits, labels, reduction="none").tolist()
    assert first == pytest.approx(sum(losses) / len(losses), abs=1e-5)


def test_a_mark_counts_only_where_it_begins_and_ends_exactly():
    right = ["B-link", "I-link", "O"]
    assert f1_score([right], [right], **token_classification.STRICT) == 1
    for wrong in (["I-link", "I-link", "O"], ["B-link", "O", "O"], ["B-link", "I-link", "I-link"], ["O", "O", "O"]):
        assert f1_score([right], [wrong], **token_classification.STRICT) == 0


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_report_is_of_the_saved_model(arguments, tmp_path: Path, capsys, variant: str):
    """Against the stock model, a sentence at a time without padding, and marks counted as sets."""
    run(arguments("--lr", 1e-2, "--epochs", 3), tmp_path, variant)
    shown = capsys.readouterr().out
    folder = tmp_path / variant / "model"
    model = AutoModelForTokenClassification.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert model.config.id2label == dict(enumerate(TAGS))
    _, test = token_classification.tagging_data.split(token_classification.tagging_data.read(tmp_path / "few.tar.gz"))
    result = json.loads((tmp_path / variant / "result.json").read_text())
    assert result["tags"] == [sentence.tags for sentence in test]

    expected, predicted = set(), set()
    for number, (sentence, tags) in enumerate(zip(test, result["predicted"])):
        encoding = tokenizer([sentence.words], is_split_into_words=True, return_tensors="pt")
        firsts = [encoding.word_to_tokens(0, word).start for word in range(len(sentence.words))]
        assert tags == [TAGS[label] for label in model(**encoding).logits[0, firsts].argmax(-1)]
        expected |= {(number, *span) for span in spans(sentence.tags)}
        predicted |= {(number, *span) for span in spans(tags)}
    precision, recall = (len(expected & predicted) / len(each) for each in (predicted, expected))
    f1 = 2 * precision * recall / (precision + recall)
    assert 0.1 < f1 < 1
    assert f"micro avg      {precision:.3f}     {recall:.3f}     {f1:.3f}" in shown
    for mark in ("italic", "link"):
        assert f"{sum(span[1] == mark for span in expected)}\n" in shown.partition(f" {mark} ")[2][:45]


def test_both_variants_and_their_comparison(arguments, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch):
    # Here, and not in processes, whose imports take longer than all else.
    monkeypatch.setattr(variants, "_run", lambda given: token_classification.main(given[2:]))
    assert token_classification.main(arguments("--limit", 64)) == 0
    shown = capsys.readouterr().out
    assert "stock: 64 sentences to train on, 16 to test on" in shown
    assert all(each in shown for each in ("F1 of all marks", "seconds of training", "tokens per second", "peak memory"))
    assert (tmp_path / "loss.png").stat().st_size > 0


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_stopped_training_goes_on_to_the_same_curve(arguments, tmp_path, monkeypatch, capsys, variant):
    whole = run(arguments(), tmp_path / "whole", variant)
    original = LossProgress.step

    def then_signal(self, losses, rate):
        original(self, losses, rate)
        if len(losses) == 12:  # in the second epoch
            signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(LossProgress, "step", then_signal)
        assert token_classification.main(arguments("--only", variant)) == 128 + signal.SIGTERM
    assert "stopped by SIGTERM after step 12" in capsys.readouterr().err
    assert len(checkpoint.load(tmp_path / variant / "checkpoint.pt")["run"]["losses"]) == 12
    assert run(arguments(), tmp_path, variant, "--resume") == whole


def test_a_loss_that_is_not_finite_stops(arguments, capsys):
    assert token_classification.main(arguments("--only", "accelerated", "--lr", 1e38)) == 1
    error = capsys.readouterr().err
    assert error.startswith("token_classification: the ") and error.count("\n") == 1
    assert ", on the texts Town " in error


def test_damaged_or_missing_data_are_named(arguments, tmp_path: Path, capsys):
    command, path = arguments("--only", "stock"), tmp_path / "few.tar.gz"
    path.write_bytes(path.read_bytes()[:-200])
    assert token_classification.main(command) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"token_classification: {path} is not the archive") and error.count("\n") == 1
    path.unlink()
    assert token_classification.main(command) == 1
    assert capsys.readouterr().err == f"token_classification: there is no file {path}\n"


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "seqeval"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "seqeval", None)
    with pytest.raises(SystemExit, match=r"needs seqeval.*: pip install 'resnorm_ext\[examples\]'"):
        runpy.run_path(token_classification.__file__)


@pytest.mark.parametrize("option", [("--epochs", "0"), ("--limit", "some")])
def test_options_out_of_range(option: tuple[str, str], capsys):
    with pytest.raises(SystemExit, match="2"):
        token_classification.main(option)
    assert f"argument {option[0]}: expected a number" in capsys.readouterr().err
