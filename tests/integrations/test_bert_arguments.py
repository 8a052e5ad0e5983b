# SPDX-License-Identifier: BSD-3-Clause
"""How a packed batch gets from the model's arguments to its layers, and what others see of the arguments."""

from __future__ import annotations

import copy
import gc
import re
import weakref

import pytest
import torch
import transformers
from transformers.models.bert import modeling_bert

from resnorm_ext.integrations import accelerate

from .conftest import assert_same_at_real_positions, inputs, square_masks, tiny_config


@pytest.mark.parametrize("mask", ["full", "right", "holes"])
@pytest.mark.parametrize("head", ["Model", "ForTokenClassification"])
@pytest.mark.parametrize("family", ["Bert", "Roberta", "XLMRoberta"])
@torch.no_grad()
def test_no_mask_of_length_by_length_is_made(path_of, family, head, mask):
    """It would cost more than the embeddings."""
    config = getattr(transformers, f"{family}Config")(**tiny_config(pad_token_id=0, type_vocab_size=2).to_dict())
    model = getattr(transformers, f"{family}{head}")(config).eval()
    accelerated, batch = accelerate(copy.deepcopy(model)), inputs(mask)

    assert square_masks(model, batch) == (set() if mask == "full" else {(4, 1, 9, 9)})
    assert path_of(lambda: square_masks(accelerated, batch)) == "packed"
    assert not square_masks(accelerated, batch)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("mask", ["none", "holes"])
@torch.no_grad()
def test_positions_that_restart_part_nothing(pair, path_of, mask, rows, implementation):
    """As for transformers, whose attention takes them for packed sequences only where it is causal."""
    for each in pair:
        each.set_attn_implementation(implementation)
    batch, outputs = inputs(mask), []
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 0, 1], [*range(9)], [9] * 9, [5, 6, 7, 8, 9, 3, 4, 5, 6]])[:rows]
    batch["position_ids"] = positions
    model, accelerated = pair
    assert path_of(lambda: outputs.append(accelerated(**batch).last_hidden_state)) == "packed"
    assert_same_at_real_positions(*outputs, model(**batch).last_hidden_state, batch)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("part", ["embeddings", "encoder", "encoder.layer.1", "embeddings.word_embeddings"])
@torch.no_grad()
def test_a_part_that_is_compiled_for_itself(pair, part, implementation):
    """It does not see what the model's hook has packed."""
    model, accelerated = pair
    for each in pair:
        each.set_attn_implementation(implementation)
    accelerated.get_submodule(part).compile(backend="eager")
    for mask in ("right", "holes", "left"):
        batch = inputs(mask)
        output, expected = (each(**batch).last_hidden_state for each in (accelerated, model))
        assert_same_at_real_positions(output, expected, batch)


@torch.no_grad()
def test_forward_hooks_see_the_arguments_as_they_were_given(pair, path_of):
    _, accelerated = pair
    batch, seen = inputs("right"), []
    accelerated.register_forward_hook(lambda _, args, kwargs, output: seen.append((args, kwargs)), with_kwargs=True)
    ids = batch.pop("input_ids")
    mask = batch.pop("attention_mask")
    accelerated(ids, attention_mask=mask)
    ((args, kwargs),) = seen
    assert len(args) == 1 and torch.equal(args[0], ids)
    assert kwargs.keys() == {"attention_mask"} and torch.equal(kwargs["attention_mask"], mask)


@torch.no_grad()
def test_an_argument_given_twice_is_refused(pair):
    batch = inputs("right")
    for each in pair:
        with pytest.raises(TypeError, match="multiple values for argument 'input_ids'"):
            each(batch["input_ids"], batch["attention_mask"], input_ids=batch["input_ids"])


@pytest.mark.parametrize("count", [1, 2, 3])
@torch.no_grad()
def test_positional_arguments(pair, path_of, count):
    model, accelerated = pair
    batch = inputs("right")
    values = [batch["input_ids"], batch["attention_mask"], torch.zeros_like(batch["input_ids"])]
    output, expected = (each(*values[:count]).last_hidden_state for each in (accelerated, model))
    batch = batch if count > 1 else {"input_ids": batch["input_ids"]}
    assert_same_at_real_positions(output, expected, batch)


@torch.no_grad()
def test_a_model_that_its_parameters_refer_to_goes(tiny):
    accelerated = accelerate(copy.deepcopy(tiny))
    for parameter in accelerated.parameters():
        parameter.owner = accelerated
    accelerated(**inputs())
    encoder = weakref.ref(accelerated.encoder)
    del accelerated, parameter
    gc.collect()
    assert encoder() is None


class SubclassedEncoder(modeling_bert.BertEncoder):
    pass


@pytest.mark.parametrize("kind", [modeling_bert.BertEncoder, SubclassedEncoder])
@pytest.mark.parametrize("first", [False, True])
@torch.no_grad()
def test_an_encoder_that_the_forward_does_not_call(tiny, kind, first):
    """Another one beside it, of other weights."""
    other = transformers.BertModel(tiny_config()).encoder
    tiny.encoder.__class__ = kind
    tiny._modules = {"other": other, **tiny._modules} if first else {**tiny._modules, "other": other}
    accelerated, batch = accelerate(copy.deepcopy(tiny)), inputs("right")
    expected = tiny.eval()(**batch).last_hidden_state
    assert_same_at_real_positions(accelerated.eval()(**batch).last_hidden_state, expected, batch)


@pytest.mark.parametrize("buffer", ["position_ids", "token_type_ids"])
@torch.no_grad()
def test_embeddings_without_a_buffer(tiny, buffer):
    """Their forward may do without it, or say so."""
    delattr(tiny.embeddings, buffer)
    accelerated, batch = accelerate(copy.deepcopy(tiny)), inputs("right")
    batch["position_ids"] = torch.arange(9).unsqueeze(0)
    for leave_out in ((), ("position_ids",), ("token_type_ids",)):
        given = {name: value for name, value in batch.items() if name not in leave_out}
        try:
            expected = tiny(**given).last_hidden_state
        except AttributeError as error:
            with pytest.raises(AttributeError, match=re.escape(str(error).partition(" object")[2])):
                accelerated(**given)
        else:
            assert_same_at_real_positions(accelerated(**given).last_hidden_state, expected, batch)
