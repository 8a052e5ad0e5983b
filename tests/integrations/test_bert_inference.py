# SPDX-License-Identifier: BSD-3-Clause
"""An accelerated BERT against transformers without grad: the packed path."""

from __future__ import annotations

import copy
import inspect
import logging
import threading

import pytest
import torch
import transformers

from resnorm_ext.build.extension import extension
from resnorm_ext.integrations import accelerate, report

from .conftest import MASKS, assert_same_at_real_positions, inputs, real_positions, tiny_config


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("mask", MASKS)
def test_masks(pair, path_of, mask, implementation):
    model, accelerated = pair
    batch = inputs(mask)
    for each in pair:
        each.set_attn_implementation(implementation)
    outputs = []
    way = path_of(lambda: outputs.append(accelerated(**batch)))
    expected = model(**batch)
    assert_same_at_real_positions(outputs[0].last_hidden_state, expected.last_hidden_state, batch)
    torch.testing.assert_close(outputs[0].pooler_output, expected.pooler_output, rtol=2e-5, atol=2e-5)
    if mask == "left":
        assert way == "position 0 is hidden, as by padding on the left, and may be read"
    else:
        assert way == "packed"
        assert not outputs[0].last_hidden_state[~real_positions(batch)].any()


@pytest.mark.parametrize("padding", ["auto", "skip"])
def test_position_0_is_computed_where_it_is_hidden(path_of, padding):
    """Whoever reads there, as heads do, gets what the original gives."""
    model = transformers.BertModel(tiny_config(), add_pooling_layer=False).eval()
    accelerated = accelerate(copy.deepcopy(model), padding=padding)
    batch = inputs("left")
    assert path_of(accelerated, **batch) == "position 0 is hidden, as by padding on the left, and may be read"
    outputs = [each(**batch).last_hidden_state for each in (accelerated, model)]
    torch.testing.assert_close(*outputs, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("rows", [[1], [0, 1, 2, 3]])
@pytest.mark.parametrize("padding", ["auto", "skip"])
def test_sequences_that_are_all_padding(tiny, path_of, rows, padding):
    """Are computed, as heads read their position 0 too; or zeros, where that has been asked for."""
    accelerated = accelerate(copy.deepcopy(tiny), padding=padding)
    batch = inputs("right")
    batch["attention_mask"][rows] = 0
    way = path_of(accelerated, **batch)
    actual, expected = accelerated(**batch).last_hidden_state, tiny(**batch).last_hidden_state
    if padding == "skip":
        assert way == "packed" and not actual[rows].any()
        assert_same_at_real_positions(actual, expected, batch)
    else:
        assert way == "position 0 is hidden, as by padding on the left, and may be read"
        torch.testing.assert_close(actual, expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int32, torch.float32])
def test_mask_dtypes(pair, path_of, dtype):
    batch = inputs("right")
    expected = pair[0](**batch).last_hidden_state
    batch["attention_mask"] = batch["attention_mask"].to(dtype)
    assert path_of(pair[1], **batch) == "packed"
    assert_same_at_real_positions(pair[1](**batch).last_hidden_state, expected, batch)


class TestFourDimensionalMasks:
    """They reach the encoder as they are, and may say more than which keys are padding."""

    def masks(self, batch) -> tuple[torch.Tensor, torch.Tensor]:
        keys = batch.pop("attention_mask").bool()[:, None, None, :].expand(4, 1, 9, 9)
        return keys, torch.where(keys, 0.0, torch.finfo(torch.float32).min)

    @pytest.mark.parametrize("index", [0, 1])
    def test_of_padding(self, pair, path_of, index):
        batch = inputs("right")
        real = batch["attention_mask"].bool()
        mask = self.masks(batch)[index]
        assert path_of(pair[1], **batch, attention_mask=mask) == "packed"
        ours, theirs = (model(**batch, attention_mask=mask).last_hidden_state for model in pair)
        torch.testing.assert_close(ours[real], theirs[real], rtol=2e-5, atol=2e-5)

    @pytest.mark.parametrize("kind", ["causal", "bias", "one query"])
    def test_of_something_else(self, pair, path_of, kind):
        batch = inputs("right")
        bool_mask, float_mask = (mask.clone() for mask in self.masks(batch))
        if kind == "causal":
            mask = bool_mask & torch.ones(9, 9).tril().bool()
        elif kind == "bias":
            mask = torch.where(float_mask == 0, -1.5, float_mask)
            mask[..., 0] = 0.0
        else:
            mask = bool_mask
            mask[0, 0, 4, 7] = False
        assert path_of(pair[1], **batch, attention_mask=mask) == "the attention mask does not only hide keys"
        ours, theirs = (model(**batch, attention_mask=mask).last_hidden_state for model in pair)
        torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("name", ["inputs_embeds", "position_ids", "position_ids of each", "no token_type_ids"])
def test_arguments(pair, path_of, name):
    model, accelerated = pair
    batch = inputs("holes")
    if name == "inputs_embeds":
        batch["inputs_embeds"] = torch.randn(4, 9, 32)
        del batch["input_ids"]
    elif name == "position_ids":
        batch["position_ids"] = torch.arange(9)[None] + 20
    elif name == "position_ids of each":
        batch["position_ids"] = torch.randint(0, 40, (4, 9))
    else:
        del batch["token_type_ids"]
    before = {key: value.clone() for key, value in batch.items()}
    assert path_of(accelerated, **batch) == "packed"
    output = accelerated(**batch).last_hidden_state
    assert_same_at_real_positions(output, model(**batch).last_hidden_state, batch)
    assert all(torch.equal(batch[key], value) for key, value in before.items())


def test_positional_arguments_and_tuples(pair, path_of):
    batch = inputs("right")
    arguments = (batch["input_ids"], batch["attention_mask"], batch["token_type_ids"])
    assert path_of(pair[1], *arguments) == "packed"
    ours, theirs = (each(*arguments, return_dict=False) for each in pair)
    assert isinstance(ours, tuple) and len(ours) == len(theirs)
    assert_same_at_real_positions(ours[0], theirs[0], batch)


@pytest.mark.parametrize(
    "head",
    [
        transformers.BertForSequenceClassification,
        transformers.BertForMaskedLM,
        transformers.BertForTokenClassification,
        transformers.BertForQuestionAnswering,
        transformers.BertForPreTraining,
    ],
)
def test_heads(path_of, head):
    model = head(tiny_config()).eval()
    accelerated = accelerate(copy.deepcopy(model))
    batch = inputs("right")
    assert path_of(accelerated, **batch) == "packed"
    for ours, theirs in zip(accelerated(**batch).to_tuple(), model(**batch).to_tuple(), strict=True):
        if ours.dim() > 1 and ours.shape[1] == 9:
            assert_same_at_real_positions(ours, theirs, batch)
        else:
            torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize(
    "change",
    [
        {"hidden_act": "relu"},
        {"hidden_act": "gelu_new"},
        {"hidden_act": "gelu_python"},
        {"hidden_size": 36, "num_attention_heads": 3},
        {"chunk_size_feed_forward": 3},
        {"num_hidden_layers": 1},
        {"layer_norm_eps": 0.1},
    ],
    ids=str,
)
def test_configurations(path_of, change):
    model = transformers.BertModel(tiny_config(**change)).eval()
    accelerated = accelerate(copy.deepcopy(model))
    batch = inputs("right")
    assert path_of(accelerated, **batch) == "packed"
    expected = model(**batch).last_hidden_state
    assert_same_at_real_positions(accelerated(**batch).last_hidden_state, expected, batch)


class AcrossPositions(torch.nn.Softmax):
    """An activation that does not treat each position alike."""

    def __init__(self):
        super().__init__(dim=1)


@pytest.mark.parametrize("activation", [torch.nn.SiLU, AcrossPositions])
def test_activations_that_are_not_known_see_the_whole_batch(path_of, pair, activation):
    model, accelerated = pair
    for each in pair:
        for layer in each.encoder.layer:
            layer.intermediate.intermediate_act_fn = activation()
    batch = inputs("right")
    assert "intermediate_act_fn" in path_of(accelerated, **batch)
    expected = model(**batch).last_hidden_state
    assert_same_at_real_positions(accelerated(**batch).last_hidden_state, expected, batch)
    assert "intermediate_act_fn" in str(report(accelerated))


def test_a_hook_on_an_activation_sees_the_whole_batch(pair):
    batch, shapes = inputs("right"), []
    _, accelerated = pair
    accelerated.encoder.layer[0].intermediate.intermediate_act_fn.register_forward_hook(
        lambda module, args, output: shapes.append(output.shape[:2])
    )
    accelerated(**batch)
    assert shapes == [batch["input_ids"].shape]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_dtypes(path_of, pair, dtype):
    model, accelerated = (each.to(dtype) for each in pair)
    batch = inputs("right")
    assert path_of(accelerated, **batch) == "packed"
    output, real = accelerated(**batch).last_hidden_state, real_positions(batch)
    assert output.dtype == dtype
    exact = copy.deepcopy(model).double()(**batch).last_hidden_state[real]
    error, their_error = (
        (each[real] - exact).norm() for each in (output.double(), model(**batch).last_hidden_state.double())
    )
    assert error <= 1.2 * their_error + 1e-10


@pytest.mark.parametrize("backend", ["aten", "onednn", "resnorm"])
def test_long_batches_go_through_in_chunks(pair, path_of, monkeypatch, backend):
    model, accelerated = pair
    shapes = [(torch.float32, *shape) for shape in ((32, 96), (32, 32), (32, 64), (64, 32))]
    for shape in shapes:
        extension.set_linear_backend(*shape, backend)
    monkeypatch.setattr(extension, "MAX_ROWS", 10)
    for mask in ("none", "right", "holes"):
        batch = inputs(mask)
        output = accelerated(**batch).last_hidden_state
        assert_same_at_real_positions(output, model(**batch).last_hidden_state, batch)


def test_no_output_is_written_again(pair, path_of):
    """Ten calls from each of two threads; then all their outputs are still what they were."""
    model, accelerated = pair
    batches = [inputs(mask) for mask in ("right", "full", "holes", "none", "left")] * 2
    expected = [model(**batch).last_hidden_state for batch in batches]
    outputs, hidden = {}, {}

    def run(name: int) -> None:
        with torch.inference_mode(name == 1):
            outputs[name] = [accelerated(**batch).last_hidden_state for batch in batches]
            hidden[name] = accelerated(**batches[0], output_hidden_states=True).hidden_states

    threads = [threading.Thread(target=run, args=(name,)) for name in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for name in range(2):
        for output, wanted, batch in zip(outputs[name], expected, batches, strict=True):
            assert_same_at_real_positions(output, wanted, batch)
        for ours, theirs in zip(
            hidden[name], model(**batches[0], output_hidden_states=True).hidden_states, strict=True
        ):
            assert_same_at_real_positions(ours, theirs, batches[0])
    storages = [output.untyped_storage().data_ptr() for name in range(2) for output in outputs[name]]
    assert len(set(storages)) == len(storages)


def test_inference_mode(pair, path_of):
    model, accelerated = pair
    batch = inputs("right")
    with torch.inference_mode():
        assert path_of(accelerated, **batch) == "packed"
        output = accelerated(**batch).last_hidden_state
    assert_same_at_real_positions(output, model(**batch).last_hidden_state, batch)


def test_parameters_that_change(pair, path_of):
    model, accelerated = pair
    batch = inputs("right")
    accelerated(**batch)
    for change in (
        lambda weight: weight.mul_(1.5),
        lambda weight: weight.data.add_(0.1),
        lambda weight: setattr(weight, "data", weight.data.flip(0)),
    ):
        for each in pair:
            change(each.encoder.layer[1].attention.self.key.weight)
            change(each.encoder.layer[0].output.dense.bias)
        assert path_of(accelerated, **batch) == "packed"
        expected = model(**batch).last_hidden_state
        assert_same_at_real_positions(accelerated(**batch).last_hidden_state, expected, batch)


def test_empty_batch(pair):
    output = pair[1](torch.zeros(0, 5, dtype=torch.int64))
    assert output.last_hidden_state.shape == (0, 5, 32) and output.pooler_output.shape == (0, 32)


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"input_ids": torch.ones(1, 3, dtype=torch.int64), "inputs_embeds": torch.ones(1, 3, 32)},
        {"input_ids": torch.ones(1, 41, dtype=torch.int64)},
        {"input_ids": torch.full((1, 3), 100)},
        {"input_ids": torch.ones(1, 3, dtype=torch.int64), "attention_mask": torch.tensor([[1, 1, 1, 0]])},
        {"input_ids": torch.ones(1, 3, dtype=torch.int64), "token_type_ids": torch.full((1, 3), 2)},
    ],
)
def test_bad_input_raises_what_transformers_raises(pair, arguments):
    errors = []
    for each in pair:
        with pytest.raises(Exception) as caught:
            each(**arguments)
        errors.append(caught.type)
    assert errors[0] is errors[1]


def test_bert_base(path_of):
    config = transformers.BertConfig(num_hidden_layers=2)
    model = transformers.BertModel(config).eval()
    accelerated = accelerate(copy.deepcopy(model))
    mask = torch.ones(3, 40, dtype=torch.int64)
    mask[1, 10:] = mask[2, 33:] = 0
    batch = {"input_ids": torch.randint(0, config.vocab_size, (3, 40)), "attention_mask": mask}
    assert path_of(accelerated, **batch) == "packed"
    expected = model(**batch).last_hidden_state
    assert_same_at_real_positions(accelerated(**batch).last_hidden_state, expected, batch)


def real_texts() -> list[str]:
    modules = (logging, threading, inspect, copy)
    docs = (inspect.getdoc(member) for module in modules for _, member in inspect.getmembers(module))
    return [" ".join(doc.split()) for doc in dict.fromkeys(docs) if doc and len(doc) > 40][:24]


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_minilm_on_real_text(minilm_path, side, implementation):
    tokenizer = transformers.AutoTokenizer.from_pretrained(minilm_path, padding_side=side)
    model = transformers.AutoModel.from_pretrained(minilm_path, attn_implementation=implementation).eval()
    accelerated = accelerate(copy.deepcopy(model))
    texts = real_texts()
    assert len(texts) == 24
    for start in (0, 12):
        batch = tokenizer(texts[start : start + 12], padding=True, truncation=True, max_length=128, return_tensors="pt")
        expected, actual = model(**batch), accelerated(**batch)
        assert_same_at_real_positions(actual.last_hidden_state, expected.last_hidden_state, batch)
        torch.testing.assert_close(actual.pooler_output, expected.pooler_output, rtol=2e-5, atol=2e-5)
        mask = batch["attention_mask"].unsqueeze(-1)
        ours, theirs = (
            torch.nn.functional.normalize((output.last_hidden_state * mask).sum(1) / mask.sum(1))
            for output in (actual, expected)
        )
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
