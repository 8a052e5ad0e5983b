# SPDX-License-Identifier: BSD-3-Clause
from __future__ import annotations

import inspect
import json
import logging
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
import torch.nn.functional as F
from byte_data import Document, Windows
from gpt import GPT
from progress import LossProgress
from torch import Tensor, nn
from torch.profiler import profile
from transformers import GPT2Config, GPT2LMHeadModel

CONTEXT = 24
SIZES = {"context": CONTEXT, "layers": 2, "heads": 4, "width": 32}
SHAPES = [(1, 1, 8, [5]), (2, 4, 32, [CONTEXT, 1, 7]), (3, 2, 48, [CONTEXT] * 3)]  # layers, heads, width, lengths


@pytest.fixture(scope="module")
def documents() -> list[Document]:
    return byte_data.python_documentation()


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
        given = ["--text", text, "--output", tmp_path, "--batch-size", 6, "--generate", 0, *sizes, *more]
        return [str(each) for each in given]

    return command_line


def run(arguments: list[str], folder: Path, *more: object) -> list[float]:
    """Trains in this process, to ``folder``, and returns the losses."""
    assert language_model.main([*arguments, "--output", str(folder), *map(str, more)]) == 0
    return json.loads((folder / "result.json").read_text())["losses"]


def model_of(rms: bool = False, dropout: float = 0.0, **sizes: int) -> GPT:
    """With parameters far from those at which it begins, biases and norms among them."""
    torch.manual_seed(0)
    model = GPT(256, **(SIZES | sizes), dropout=dropout, rms=rms)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model


def packed(lengths: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Random ids and labels of sequences one after another, and their bounds."""
    torch.manual_seed(1)
    ids, labels = torch.randint(256, (2, sum(lengths)))
    labels[1::5] = byte_data.IGNORED
    return ids, labels, torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def gpt2_names(model: GPT) -> dict[str, str]:
    """transformers' name of each parameter. What it calls Conv1D has its weight transposed."""
    parts = {
        "norm1": "ln_1",
        "self_attn.in_proj": "attn.c_attn",
        "self_attn.out_proj": "attn.c_proj",
        "norm2": "ln_2",
        "linear1": "mlp.c_fc",
        "linear2": "mlp.c_proj",
    }
    outer = {"tokens": "wte", "positions": "wpe", "layers.norm": "ln_f"}
    names = {}
    for name, _ in model.named_parameters():
        part, kind = re.fullmatch(r"(.+)[._](weight|bias)", name).groups()
        if layer := re.fullmatch(r"layers\.layers\.(\d+)\.(.+)", part):
            names[name] = f"h.{layer[1]}.{parts[layer[2]]}.{kind}"
        else:
            names[name] = f"{outer[part]}.{kind}"
    return names


def is_transposed(name: str) -> bool:
    return ".c_" in name and name.endswith("weight")


def to_gpt2(model: GPT, dropout: float = 0.0) -> GPT2LMHeadModel:
    encoder = model.layers
    config = GPT2Config(
        vocab_size=256,
        n_positions=model.context,
        n_embd=encoder.norm.normalized_shape[0],
        n_layer=encoder.num_layers,
        n_head=encoder.layers[0].self_attn.num_heads,
        embd_pdrop=dropout,
        attn_pdrop=dropout,
        resid_pdrop=dropout,
        bos_token_id=None,
        eos_token_id=None,
    )
    gpt2, names = GPT2LMHeadModel(config), gpt2_names(model)
    state = {
        names[name]: parameter.detach().t() if is_transposed(names[name]) else parameter.detach()
        for name, parameter in model.named_parameters()
    }
    assert not gpt2.transformer.load_state_dict(state).missing_keys
    gpt2.tie_weights()
    return gpt2


@pytest.mark.parametrize(("layers", "heads", "width", "lengths"), SHAPES)
def test_hidden_states_are_those_of_gpt2(layers: int, heads: int, width: int, lengths: list[int]):
    model = model_of(layers=layers, heads=heads, width=width).eval()
    gpt2 = to_gpt2(model).eval()
    ids, _, bounds = packed(lengths)
    with torch.no_grad():
        expected = [gpt2.transformer(each.unsqueeze(0)).last_hidden_state[0] for each in ids.split(lengths)]
        torch.testing.assert_close(model.hidden_states(ids, bounds), torch.cat(expected), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("layers", "heads", "width", "lengths"), SHAPES)
def test_loss_and_gradients_are_those_of_gpt2(layers: int, heads: int, width: int, lengths: list[int]):
    model = model_of(layers=layers, heads=heads, width=width).train()
    gpt2, names = to_gpt2(model).train(), gpt2_names(model)
    ids, labels, bounds = packed(lengths)
    loss = model(ids, bounds, labels=labels).loss
    logits = torch.cat([gpt2(each.unsqueeze(0)).logits[0] for each in ids.split(lengths)])
    expected = F.cross_entropy(logits, labels, ignore_index=-100)
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-5)
    loss.backward()
    expected.backward()
    theirs = dict(gpt2.transformer.named_parameters())
    assert set(names.values()) == set(theirs)
    for name, parameter in model.named_parameters():
        grad = theirs[names[name]].grad
        grad = grad.t() if is_transposed(names[name]) else grad
        torch.testing.assert_close(parameter.grad, grad, atol=1e-5, rtol=1e-4)


def plain_rms(model: GPT, ids: Tensor, dropout: float = 0.0) -> Tensor:
    """The hidden states of one sequence by torch's functions alone."""
    drop = nn.Dropout(dropout)

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        return x * (x.pow(2).mean(-1, keepdim=True) + 1e-5).rsqrt() * weight

    x = drop(model.tokens.weight[ids] + model.positions.weight[: len(ids)])
    weight = model.layers.norm.weight
    for layer in model.layers.layers:
        query, key, value = (
            part.unflatten(-1, (layer.heads, -1)).transpose(0, 1)
            for part in F.linear(norm(x, weight), layer.in_proj.weight, layer.in_proj.bias).chunk(3, -1)
        )
        hidden = torch.ones(len(ids), len(ids), dtype=torch.bool).triu(1)
        scores = (query @ key.transpose(1, 2) / math.sqrt(query.size(-1))).masked_fill(hidden, -torch.inf)
        context = (drop(torch.softmax(scores, -1)) @ value).transpose(0, 1).flatten(1)
        x = x + drop(F.linear(context, layer.out_proj.weight, layer.out_proj.bias))
        first, second = layer.feed_forward.linear1, layer.feed_forward.linear2
        update = F.linear(norm(x, layer.attention_norm.weight), first.weight, first.bias)
        x = x + drop(F.linear(F.gelu(update, approximate="tanh"), second.weight, second.bias))
        weight = layer.feed_forward_norm.weight
    return norm(x, weight)


@pytest.mark.parametrize(("layers", "heads", "width", "lengths"), SHAPES)
def test_rms_is_a_plain_torch_model(layers: int, heads: int, width: int, lengths: list[int]):
    model = model_of(rms=True, layers=layers, heads=heads, width=width)
    ids, _, bounds = packed(lengths)
    with torch.no_grad():
        inferred = model.eval().hidden_states(ids, bounds)
    ours = model.train().hidden_states(ids, bounds)
    expected = torch.cat([plain_rms(model, each) for each in ids.split(lengths)])
    for output in (inferred, ours):
        torch.testing.assert_close(output, expected, atol=1e-5, rtol=1e-5)
    names, parameters = zip(*model.named_parameters())
    weights = torch.randn_like(ours)
    grads = [torch.autograd.grad((output * weights).sum(), parameters) for output in (ours, expected)]
    for name, one, other in zip(names, *grads):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4, msg=lambda text, name=name: f"{name}: {text}")


def test_rms_has_no_layer_norm_and_else_there_is_nothing_but(arguments, tmp_path: Path):
    for flags, kind, other in (((), nn.LayerNorm, nn.RMSNorm), (("--rms",), nn.RMSNorm, nn.LayerNorm)):
        run(arguments("--epochs", 1, *flags), tmp_path)
        modules = list(language_model.load(tmp_path / "model.pt").modules())
        norms = [module for module in modules if isinstance(module, kind)]
        assert len(norms) == 2 * SIZES["layers"] + 1
        assert all(type(norm).__module__.startswith("resnorm_ext.") for norm in norms)
        assert not any(isinstance(module, other) for module in modules)


@pytest.mark.parametrize("rms", [False, True])
def test_training_takes_the_fast_paths(rms: bool, caplog: pytest.LogCaptureFixture):
    model = model_of(rms=rms, dropout=0.1).train()
    ids, labels, bounds = packed([CONTEXT, 7, CONTEXT])
    with profile() as profiler, caplog.at_level(logging.DEBUG, "resnorm_ext"):
        model(ids, bounds, labels=labels).loss.backward()
    assert caplog.messages == ([] if rms else ["TransformerEncoder: packed"])
    calls = {event.key: event.count for event in profiler.key_averages()}
    norm, layers = "add_rms_norm" if rms else "add_layer_norm", SIZES["layers"]
    for name, count in (("packed_attention", layers), ("feed_forward", layers), (norm, 2 * layers)):
        assert calls[f"resnorm::{name}"] == count, name
    assert calls["aten::bernoulli_"] == 1  # of the embeddings' dropout
    assert not any("softmax" in name and "log" not in name for name in calls)


@pytest.mark.parametrize("rms", [False, True])
def test_dropout_is_where_gpt2_has_it(rms: bool):
    """By how far hidden states scatter, which any other place of it changes."""
    draws, length, dropout = 3000, 4, 0.3
    model = model_of(rms=rms, dropout=dropout, layers=1).train()
    ids = torch.tensor([3, 1, 4, 1])
    bounds = torch.arange(draws + 1, dtype=torch.int32) * length
    with torch.no_grad():
        ours = model.hidden_states(ids.repeat(draws), bounds).unflatten(0, (draws, length))
        if rms:
            theirs = torch.stack([plain_rms(model, ids, dropout) for _ in range(draws)])
        else:
            theirs = to_gpt2(model, dropout).train().transformer(ids.expand(draws, -1)).last_hidden_state
    assert (ours.std(0) / theirs.std(0)).mean().item() == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("rms", [False, True])
def test_it_begins_as_gpt2_does(rms: bool):
    torch.manual_seed(0)
    model, layers = GPT(256, context=128, layers=8, heads=4, width=192, rms=rms), 8
    seen = set()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            assert not parameter.any(), name
        elif "norm" in name:
            assert (parameter == 1).all(), name
        else:
            scaled = name.endswith(("out_proj.weight", "linear2.weight"))
            seen.add((name.rpartition(".layers.")[2].partition(".")[2] if "layers" in name else name, scaled))
            std = 0.02 / math.sqrt(2 * layers) if scaled else 0.02
            assert parameter.std().item() == pytest.approx(std, rel=0.03), name
            assert abs(parameter.mean().item()) < std / 20, name
    assert len(seen) == 6 and sum(scaled for _, scaled in seen) == 2


@pytest.mark.parametrize(("context", "overlap"), [(8, 0), (8, 4), (8, 7), (5, 2), (2, 1)])
def test_every_byte_is_a_label_once(context: int, overlap: int):
    contents = [bytes(range(1, 1 + length)) for length in range(1, 30)]
    windows = Windows([Document(str(len(each)), each) for each in contents], context, overlap)
    assert windows.labelled() == b"".join(contents)
    assert len(windows.names) == len(windows)
    for name, item in zip(windows.names, windows):
        length, begin = map(int, re.fullmatch(r"(\d+) from byte (\d+)", name).groups())
        content = contents[length - 1]
        ids, labels = item["input_ids"].tolist(), item["labels"].tolist()
        assert bytes(ids) == (bytes([byte_data.START]) + content)[begin : begin + len(ids)]
        assert len(ids) == len(labels) == min(context, length - begin) and labels[-1] != byte_data.IGNORED
        assert labels == [
            byte_data.IGNORED if begin and place < overlap else content[begin + place] for place in range(len(ids))
        ]
    assert len(Windows([Document("", contents[-1])], context, overlap, limit=2)) == 2


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


def test_what_compression_adds():
    text = bytes(torch.randint(256, (4000,)).tolist())
    for compress in language_model.COMPRESSORS.values():
        assert 8 < byte_data.compressed_bits_per_byte(text, b"", compress) < 9
        assert byte_data.compressed_bits_per_byte(text, 3 * text, compress) < 1
    assert byte_data.compressed_bits_per_byte(b"12", b"345", lambda content: content[::2]) == 8 * (3 - 2) / 2


def test_pythons_documentation(documents: list[Document]):
    assert 1e6 < sum(len(document.content) for document in documents) < 1e7
    names = [document.name for document in documents]
    assert len(set(names)) == len(names) and "topic for" in names and "json/__init__.py" in names
    assert not any("test" in name.split("/") or name.startswith("_py") for name in names)
    known = " ".join(inspect.getdoc(json.dumps).partition("\n\n")[2].partition("\n\n")[0].split()).encode()
    assert b"skipkeys" in known
    found = [document.name for document in documents if known in b" ".join(document.content.split())]
    assert found == ["json/__init__.py"]

    train, test = byte_data.split(documents)
    assert sorted(train + test, key=documents.index) == documents and (train, test) == byte_data.split(documents)
    assert 0.07 < sum(len(document.content) for document in test) / sum(map(len, (d.content for d in documents))) < 0.13

    def paragraphs(part: list[Document]) -> set[bytes]:
        every = (paragraph for document in part for paragraph in re.split(rb"\n\s*\n", document.content))
        return {b" ".join(paragraph.split()) for paragraph in every}

    assert len(paragraphs(test)) > 500 and not paragraphs(train) & paragraphs(test)


def test_sources_are_read_in_their_order_and_do_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    source = (
        '"""One."""\nraise SystemExit\nclass A:\n    """Two."""\n    def f(): "Three."\nasync def g(): "Fo\\u00fcr."\n'
    )
    for name in ("a.py", "b/__init__.py", "b/_c.py", "_d.py", "_e/f.py", "test/g.py", "b/tests/h.py"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True, parents=True)
        path.write_text(source.replace("One", f"One of {name}") if name != "b/__init__.py" else "")
    monkeypatch.setattr(byte_data.sysconfig, "get_path", lambda _: str(tmp_path))
    monkeypatch.setattr(byte_data, "topics", {"if": "The if statement."})
    assert byte_data.python_documentation() == [
        Document("topic if", b"The if statement."),
        Document("a.py", "One of a.py.\n\nTwo.\n\nThree.\n\nFoür.".encode()),
    ]


def test_repeated_paragraphs_are_left_out():
    texts = {"one": "A  b.\n\n  C\n  d.\n", "two": "\nA\nb.\n \nNew.", "three": "C d.\n\n\nA b."}
    assert byte_data.without_repeats(texts) == [Document("one", b"A  b.\n\n  C\n  d."), Document("two", b"New.")]


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
