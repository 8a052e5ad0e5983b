# SPDX-License-Identifier: BSD-3-Clause
"""torch.compile, torch.export and AOTInductor of an accelerated BERT: no graph break, nothing depends on a mask's
values, and without grad the layers are one operator."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from torch import Tensor, nn

import resnorm_ext
from resnorm_ext.integrations import accelerate

from .conftest import assert_same_at_real_positions, inputs, tiny_config


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


WITHOUT_GRAD = {"layer_norm": 1, "encode": 1}  # the embeddings' norm


def compiled(model: nn.Module, **options) -> tuple[Callable, list[Counter]]:
    """And what operators of this package each graph has. Frames of their own, for torch.compile, are the hooks of the
    outermost module; those have none."""
    graphs = []

    def backend(graph: torch.fx.GraphModule, example_inputs: list) -> Callable:
        targets = [str(node.target).split(".") for node in graph.graph.nodes if node.op == "call_function"]
        names = Counter(target[1] for target in targets if target[0] == "resnorm")
        if names:
            graphs.append(names)
        return graph

    return torch.compile(model, **({"fullgraph": True, "backend": backend} | options)), graphs


def assert_same(model: nn.Module, function, masks=("right", "holes", "left", "full"), tolerance: float = 2e-5) -> None:
    """As the model's, at positions that are not padded; for each of these masks."""
    for mask in masks:
        batch = inputs(mask)
        output = function(**batch).last_hidden_state
        assert_same_at_real_positions(output, model(**batch).last_hidden_state, batch, tolerance)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("grad", [False, True])
def test_any_mask_through_one_compiled_graph(pair, grad, implementation):
    model, accelerated = pair
    for each in pair:
        each.set_attn_implementation(implementation)
    function, graphs = compiled(accelerated)
    with torch.set_grad_enabled(grad):
        assert_same(model, function)
    (graph,) = graphs
    assert graph == (WITHOUT_GRAD if not grad and implementation == "sdpa" else {"layer_norm": 1, "add_layer_norm": 4})


@torch.no_grad()
def test_a_model_within_another_module(pair):
    model, accelerated = pair
    graphs = []

    def backend(graph: torch.fx.GraphModule, example_inputs: list) -> Callable:
        graphs.append(graph)
        return graph

    function = torch.compile(LastHiddenState(accelerated), fullgraph=True, backend=backend)
    for batch in batches():
        if len(batch["input_ids"]) == 4:
            output = function(**batch)
            assert_same_at_real_positions(output, model(**batch).last_hidden_state, batch)
    assert len(graphs) == 1


@torch.no_grad()
def test_no_mask(pair):
    model, accelerated = pair
    function, graphs = compiled(accelerated)
    assert_same(model, function, ("none",))
    assert graphs == [WITHOUT_GRAD]


@torch.no_grad()
def test_dynamic_shapes(pair):
    model, accelerated = pair
    function, graphs = compiled(accelerated, dynamic=True)
    for rows, length in ((4, 9), (2, 5), (3, 30)):
        batch = {"input_ids": torch.randint(1, 100, (rows, length)), "attention_mask": torch.ones(rows, length)}
        batch["attention_mask"][1, 3:] = 0
        output = function(**batch).last_hidden_state
        assert_same_at_real_positions(output, model(**batch).last_hidden_state, batch)
    assert graphs == [WITHOUT_GRAD]


@torch.no_grad()
def test_weights_changed_after_compiling(pair):
    model, accelerated = pair
    function, graphs = compiled(accelerated)
    assert_same(model, function)

    def change(model: nn.Module, way: str) -> None:
        weight = model.encoder.layer[1].intermediate.dense.weight
        if way == "in place":
            weight.mul_(1.5)
        elif way == "data":
            weight.data[1, 1:].add_(0.5)
        else:
            model.load_state_dict({name: each * 1.2 for name, each in model.named_parameters()}, strict=False)

    for way in ("in place", "data", "load_state_dict"):
        before = model(**(batch := inputs("right"))).last_hidden_state
        for each in pair:
            change(each, way)
        assert not torch.allclose(model(**batch).last_hidden_state, before, rtol=1e-3, atol=1e-3)
        assert_same(model, function)
    assert graphs == [WITHOUT_GRAD]


class Adapter(nn.Module):
    """As LoRA puts them in a linear layer's place."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear, self.update = linear, nn.Linear(linear.in_features, linear.out_features)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + self.update(x)


def put_adapter(model: nn.Module) -> None:
    attention = model.encoder.layer[1].attention.self
    torch.manual_seed(1)
    attention.query = Adapter(attention.query).eval()


def put_hook(model: nn.Module) -> None:
    model.encoder.layer[1].intermediate.dense.register_forward_hook(lambda module, args, output: output * 1.1)


def put_layer_hook(model: nn.Module) -> None:
    model.encoder.layer[0].register_forward_pre_hook(lambda module, args: (args[0] * 1.1, *args[1:]))


def put_eps(model: nn.Module) -> None:
    model.encoder.layer[1].output.LayerNorm.eps = 0.1


def put_eps_of_all(model: nn.Module) -> None:
    for layer in model.encoder.layer:
        layer.attention.output.LayerNorm.eps = layer.output.LayerNorm.eps = 0.1


def put_scaling(model: nn.Module) -> None:
    model.encoder.layer[1].attention.self.scaling = 0.1


@pytest.mark.parametrize("change", [put_eps, put_eps_of_all, put_scaling])
@torch.no_grad()
def test_values_changed_after_compiling(pair, change):
    model, accelerated = pair
    function, graphs = compiled(accelerated)
    assert_same(model, function)
    for each in pair:
        change(each)
    assert_same(model, function)
    assert ("encode" in graphs[-1]) == (change is put_eps_of_all) and len(graphs) == 2


@torch.no_grad()
def test_padding_and_dropout_changed_after_compiling(pair):
    model, accelerated = pair
    for each in accelerated.encoder.layer:
        each.output.dropout.p = 0.5
    function, graphs = compiled(accelerated)
    assert_same(model, function)
    accelerated.encoder.padding = "compute"
    batch = inputs("right")
    torch.testing.assert_close(
        function(**batch).last_hidden_state, model(**batch).last_hidden_state, rtol=2e-5, atol=2e-5
    )
    accelerated.encoder.padding = "auto"
    for each in accelerated.encoder.layer:
        each.output.dropout.train()
    output = function(**batch).last_hidden_state
    assert not torch.allclose(function(**batch).last_hidden_state, output)
    assert ["encode" in graph for graph in graphs] == [True, False, False]


# torch.compile does not look for hooks that come later.
@pytest.mark.parametrize(
    "change, when", [(put_adapter, "before"), (put_adapter, "after"), (put_hook, "before"), (put_layer_hook, "before")]
)
@torch.no_grad()
def test_layers_that_are_not_as_built_are_not_one_operator(pair, change, when):
    model, accelerated = pair
    function, graphs = compiled(accelerated)
    if when == "after":
        assert_same(model, function)
        assert graphs == [WITHOUT_GRAD]
    for each in pair:
        change(each)
    assert_same(model, function)
    assert "encode" not in graphs[-1]


@torch.no_grad()
def test_padding_that_is_to_be_computed(tiny):
    accelerated = accelerate(copy.deepcopy(tiny), padding="compute")
    function, graphs = compiled(accelerated)
    for mask in ("right", "holes", "left"):
        batch = inputs(mask)
        torch.testing.assert_close(
            function(**batch).last_hidden_state, tiny(**batch).last_hidden_state, rtol=2e-5, atol=2e-5
        )
    assert "encode" not in graphs[0] and len(graphs) == 1


@torch.no_grad()
def test_padding_as_eager_calls_have_it(pair):
    """Zeros, unless a first position is hidden."""
    _, accelerated = pair
    function, _ = compiled(accelerated)
    for mask in ("right", "holes", "left"):
        batch = inputs(mask)
        hidden = batch["attention_mask"] == 0
        eager, output = accelerated(**batch).last_hidden_state, function(**batch).last_hidden_state
        assert torch.equal(output[hidden] == 0, eager[hidden] == 0)
        torch.testing.assert_close(output, eager, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("head", ["ForTokenClassification", "ForMaskedLM", "ForQuestionAnswering"])
@torch.no_grad()
def test_losses_that_read_padding(head):
    model = getattr(transformers, f"Bert{head}")(tiny_config()).eval()
    labels = {"labels": torch.ones(4, 9, dtype=torch.long)}
    if head == "ForQuestionAnswering":
        labels = {"start_positions": torch.tensor([2, 1, 0, 3]), "end_positions": torch.tensor([3, 2, 0, 5])}
    function, _ = compiled(accelerate(copy.deepcopy(model)))
    batch = inputs("right") | labels
    torch.testing.assert_close(function(**batch).loss, model(**batch).loss, rtol=2e-5, atol=2e-5)


@torch.no_grad()
def test_a_decoder_is_not_one_operator():
    model = transformers.BertModel(tiny_config(is_decoder=True, use_cache=False)).eval()
    function, graphs = compiled(accelerate(copy.deepcopy(model)))
    assert_same(model, function, ("right", "full"))
    assert all("encode" not in graph for graph in graphs)


@pytest.mark.parametrize("first", [False, True])
@torch.no_grad()
def test_hidden_states(pair, first):
    """Whether they are asked for at the first call or later. transformers' lock keeps them out of one graph."""
    model, accelerated = pair
    function, graphs = compiled(accelerated, fullgraph=False)
    for collects in (first, not first, first):
        batch = inputs("right")
        outputs = [each(**batch, output_hidden_states=collects) for each in (function, model)]
        assert_same_at_real_positions(*(each.last_hidden_state for each in outputs), batch)
        if collects:
            torch.testing.assert_close(*(each.hidden_states for each in outputs), rtol=2e-5, atol=2e-5)
    assert any("encode" in graph for graph in graphs)


def assert_as_exact_as(output: Tensor, other: Tensor, exact: Tensor, batch: dict[str, Tensor]) -> None:
    real = batch["attention_mask"].bool()
    assert output.dtype == other.dtype and output.shape == exact.shape
    ours, theirs = ((each.float() - exact)[real].abs().mean() for each in (output, other))
    assert ours < 1.2 * theirs < 0.1


@torch.no_grad()
def test_bfloat16(pair):
    model, accelerated = (each.to(torch.bfloat16) for each in pair)
    function, graphs = compiled(accelerated)
    exact = copy.deepcopy(model).float()
    for mask in ("right", "holes", "left"):
        batch = inputs(mask)
        outputs = (each(**batch).last_hidden_state for each in (function, model, exact))
        assert_as_exact_as(*outputs, batch)
    assert graphs == [WITHOUT_GRAD]


@torch.no_grad()
def test_autocast(pair):
    model, accelerated = pair
    function, graphs = compiled(accelerated)
    for _ in range(2):
        assert_same(model, function)
        for mask in ("right", "holes", "left"):
            batch = inputs(mask)
            exact = model(**batch).last_hidden_state
            with torch.autocast("cpu", torch.bfloat16):
                outputs = [each(**batch).last_hidden_state for each in (function, model)]
            assert_as_exact_as(*outputs, exact, batch)
    assert graphs == [WITHOUT_GRAD] * 2


@pytest.mark.parametrize("grad", [False, True])
def test_inductor(pair, grad):
    model, accelerated = pair
    batch = inputs("right")
    real = batch["attention_mask"].bool()
    compiled = torch.compile(accelerated, fullgraph=True)
    with torch.set_grad_enabled(grad):
        output, expected = compiled(**batch).last_hidden_state, model(**batch).last_hidden_state
        assert_same_at_real_positions(output, expected, batch)
        if grad:
            for result in (output, expected):
                result[real].square().sum().backward()
            for ours, theirs in zip(accelerated.parameters(), model.parameters(), strict=True):
                if theirs.grad is not None:
                    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-4)
        else:
            assert_same(model, compiled)


def test_eager_calls_after_compiling_are_packed(pair, path_of):
    batch = inputs("right")
    with torch.no_grad():
        torch.compile(pair[1], fullgraph=True, backend="eager")(**batch)
        assert path_of(pair[1], **batch) == "packed"


class LastHiddenState(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state


def exported(model: nn.Module, strict: bool = False) -> torch.export.ExportedProgram:
    batch, rows, length = inputs("right"), torch.export.Dim("rows", min=2), torch.export.Dim("length", min=2, max=40)
    arguments = batch["input_ids"], batch["attention_mask"]
    shapes = ({0: rows, 1: length}, {0: rows, 1: length})
    return torch.export.export(LastHiddenState(model), arguments, dynamic_shapes=shapes, strict=strict)


def batches() -> list[dict[str, Tensor]]:
    result = [inputs(mask) for mask in ("right", "holes", "left", "full")]
    result.append({name: each[:2, :6].contiguous() for name, each in result[1].items()})
    return [{name: each for name, each in batch.items() if name != "token_type_ids"} for batch in result]


def in_another_process(load: str, path: Path) -> None:
    """Has a process that imports no more than torch and this package ``load`` a program from ``path`` beside whose
    batches lie what it is to give for them."""
    program = f"""
import sys, torch, resnorm_ext
assert "transformers" not in sys.modules
function = {load}
for batch, expected in torch.load({str(path.with_suffix(".batches"))!r}):
    real, output = batch["attention_mask"].bool(), function(batch["input_ids"], batch["attention_mask"])
    torch.testing.assert_close(output[real], expected[real], rtol=2e-5, atol=2e-5)
"""
    root = str(Path(resnorm_ext.__file__).parents[1])
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))}
    result = subprocess.run([sys.executable, "-c", program], env=variables, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def save_batches(model: nn.Module, path: Path) -> None:
    torch.save([(batch, model(**batch).last_hidden_state) for batch in batches()], path.with_suffix(".batches"))


@pytest.mark.parametrize("strict", [False, True])
@torch.no_grad()
def test_export(pair, strict, tmp_path):
    model, accelerated = pair
    program = exported(accelerated, strict)
    targets = [str(node.target) for node in program.graph.nodes if "resnorm" in str(node.target)]
    assert targets == ["resnorm.layer_norm.default", "resnorm.encode.default"]
    function = program.module()
    for batch in batches():
        output = function(batch["input_ids"], batch["attention_mask"])
        assert_same_at_real_positions(output, model(**batch).last_hidden_state, batch)
    path = tmp_path / "program.pt2"
    torch.export.save(program, path)
    save_batches(model, path)
    in_another_process(f"torch.export.load({str(path)!r}).module()", path)


@torch.no_grad()
def test_ahead_of_time(pair, tmp_path):
    model, accelerated = pair
    path = tmp_path / "package.pt2"
    torch._inductor.aoti_compile_and_package(exported(accelerated), package_path=str(path))
    save_batches(model, path)
    in_another_process(f"torch._inductor.aoti_load_package({str(path)!r})", path)


class Pooled(transformers.BertModel):
    """Reads the mask itself."""

    def forward(self, input_ids, attention_mask, **kwargs):
        hidden = super().forward(input_ids, attention_mask, **kwargs).last_hidden_state
        return (hidden * attention_mask[..., None]).sum(1)


@torch.no_grad()
def test_who_reads_the_mask_gets_it_as_it_was_given():
    model = Pooled(tiny_config()).eval()
    accelerated, batch = accelerate(copy.deepcopy(model)), inputs("right")
    compiled = torch.compile(accelerated, backend="eager")
    torch.testing.assert_close(compiled(**batch), model(**batch), rtol=2e-5, atol=2e-5)
    seen = []
    model = accelerate(transformers.BertModel(tiny_config()).eval())
    model.register_forward_pre_hook(lambda *call: seen.append(call[2]["attention_mask"].shape), with_kwargs=True)
    torch.compile(model, backend="eager")(**batch)
    assert seen == [batch["attention_mask"].shape]


@torch.no_grad()
def test_hooks_of_all_modules_are_called(pair):
    model, accelerated = pair
    handle = nn.modules.module.register_module_forward_hook(
        lambda module, args, output: output * 2 if isinstance(module, nn.Linear) else None
    )
    try:
        batch = inputs("right")
        output = torch.compile(accelerated, backend="eager")(**batch).last_hidden_state
        assert_same_at_real_positions(output, model(**batch).last_hidden_state, batch)
    finally:
        handle.remove()


@pytest.mark.parametrize("name", ["attention.self.dropout", "output.dropout", "output.LayerNorm", "output"])
@torch.no_grad()
def test_parts_of_another_kind(pair, name):
    """As those who deploy models take dropouts out."""

    class First(nn.Identity):
        def forward(self, x, *_):
            return x if x.size(-1) == 32 else x[..., :32]

    for each in pair:
        parent, _, child = name.rpartition(".")
        setattr(each.encoder.layer[0].get_submodule(parent), child, First())
    model, accelerated = pair
    batch = inputs("right")
    output = torch.compile(accelerated, fullgraph=True, backend="eager")(**batch).last_hidden_state
    assert_same_at_real_positions(output, model(**batch).last_hidden_state, batch)


@torch.no_grad()
def test_another_activation_takes_effect(pair):
    model, accelerated = pair
    compiled, batch = torch.compile(accelerated, backend="eager"), inputs("right")
    compiled(**batch)
    for each in pair:
        each.encoder.layer[0].intermediate.intermediate_act_fn = nn.ReLU()
    assert_same_at_real_positions(compiled(**batch).last_hidden_state, model(**batch).last_hidden_state, batch)
