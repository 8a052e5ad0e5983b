# SPDX-License-Identifier: BSD-3-Clause
"""DTensor: sharded tensors through the operators, and parallel plans on accelerated modules, in two processes.

To start processes takes longer than what they do, so one pair runs all scenarios, and each test reports one of them.
"""

from __future__ import annotations

import copy
import json
import subprocess
import sys
import traceback
from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import partial
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from resnorm_ext import accelerate, functional, sharding
from resnorm_ext.modules import AddLayerNorm, LayerNorm

from .cases import CASES, FULL_CASES, SEED, Case, require_grad

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="this PyTorch has no torch.distributed")

WORLD = 2
SHAPE = (3, 5, 8)  # of which the processes' parts differ, whichever of the rows' dimensions is sharded
SCENARIOS: dict[str, Callable] = {}


def scenario(*values: object) -> Callable:
    """What both processes run with their mesh: for each of ``values``, where given."""

    def register(function: Callable) -> Callable:
        for value in values:
            SCENARIOS[f"{function.__name__}[{value}]"] = partial(function, value=value)
        if not values:
            SCENARIOS[function.__name__] = function
        return function

    return register


def process(rank: int, folder: Path) -> None:
    from torch.distributed.device_mesh import init_device_mesh

    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), WORLD)
    dist.init_process_group("gloo", rank=rank, world_size=WORLD, store=store, timeout=timedelta(seconds=60))
    mesh, failures = init_device_mesh("cpu", (WORLD,)), {}
    for name, function in SCENARIOS.items():
        torch.manual_seed(0)
        try:
            function(mesh)
        except Exception:
            failures[name] = traceback.format_exc()
    (folder / f"{rank}.json").write_text(json.dumps(failures))
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def failures(tmp_path_factory) -> list[dict[str, str]]:
    folder = tmp_path_factory.mktemp("processes")
    torch.multiprocessing.spawn(process, (folder,), WORLD)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(WORLD)]


def distribute(tensor: Tensor, mesh, placement) -> Tensor:
    """A leaf that holds ``tensor``."""
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor, mesh, [placement]).requires_grad_(tensor.requires_grad)


def is_row(name: str) -> bool:
    """Whether the argument of that name has a row for each of the input's."""
    return name in ("input", "residual")


def backward(results: Sequence[Tensor]) -> None:
    """Gradients that differ from element to element, with no sum whose parts other processes have."""
    torch.autograd.backward(results, [torch.cos(result.detach()) for result in results])


def assert_same(actual: Tensor, expected: Tensor) -> None:
    """The whole of ``actual`` is ``expected``, but for the order in which a sum was taken."""
    tolerances = {torch.float32: 1e-5, torch.float64: 1e-12}
    tolerance = tolerances.get(expected.dtype, 2e-2)
    torch.testing.assert_close(actual.full_tensor(), expected, rtol=tolerance, atol=tolerance)


@scenario()
def torchs_own_functions_where_dtensor_takes_no_rules(mesh):
    """First of all, while there are no rules."""
    from torch.distributed.tensor import DTensor, Replicate, Shard

    x = torch.randn(SHAPE)
    weight = distribute(torch.randn(8), mesh, Replicate())
    refuse = mock.Mock(side_effect=TypeError("takes rules in another way"))
    with mock.patch("torch.distributed.tensor.experimental.register_sharding", refuse):
        y, s = functional.add_layer_norm(*[distribute(x, mesh, Shard(0))] * 2, (8,), weight, prenorm=True)
    assert refuse.called and isinstance(y, DTensor)
    assert_same(y, F.layer_norm(x + x, (8,), weight.full_tensor()))
    assert_same(s, x + x)
    sharding.register_rules.cache_clear()


PLAIN_CASES = [case for case in CASES if not case.dropout_p and case.activation in (None, "gelu")]


@scenario(*PLAIN_CASES)
def rows_are_sharded_without_communication(mesh, value: Case):
    """Along any of their dimensions: results, and gradients but for the sum over rows, are those of one process."""
    from torch.distributed.tensor import Partial, Replicate, Shard
    from torch.distributed.tensor.debug import CommDebugMode

    single, half = torch.float32, torch.bfloat16
    for dtype, parameters, dim in [(single, single, 0), (single, single, 1), (half, half, 0), (half, single, 1)]:
        inputs = value.make_inputs(SHAPE, dtype, parameters=parameters)
        whole, place = require_grad(inputs), Shard(dim)
        parts = {n: distribute(t, mesh, place if is_row(n) else Replicate()) for n, t in whole.items()}
        with CommDebugMode() as communication:
            results = value.ours(parts)
            backward(results)
            with torch.no_grad():
                without_grad = value.ours(parts)
        assert not communication.get_total_counts()
        expected = value.ours(whole)
        backward(expected)
        for actual in (results, without_grad):
            for a, b in zip(actual, expected, strict=True):
                assert a.placements == (place,) and torch.equal(a.full_tensor(), b)
        for name, part in parts.items():
            assert part.grad.placements == (place if is_row(name) else Partial(),), name
            assert_same(part.grad, whole[name].grad)


@scenario(*PLAIN_CASES)
def other_layouts_are_redistributed(mesh, value: Case):
    from torch.distributed.tensor import Partial, Replicate, Shard

    whole = require_grad(value.make_inputs(SHAPE))
    expected = value.ours(whole)
    backward(expected)
    for placements in [(Replicate(), Replicate()), (Shard(2), Shard(2)), (Shard(0), Shard(1)), (Replicate(), Shard(1))]:
        parts = {}
        for name, tensor in whole.items():
            place = placements[name == "residual"] if is_row(name) else Shard(0)
            parts[name] = distribute(tensor.detach(), mesh, place).requires_grad_()
        results = value.ours(parts)
        backward(results)
        for result, other in zip(results, expected, strict=True):
            assert torch.equal(result.full_tensor(), other)
        for name, part in parts.items():
            assert_same(part.grad, whole[name].grad)
    pending = distribute(whole["input"].detach() / WORLD, mesh, Replicate()).to_local()
    partial_sum = torch.distributed.tensor.DTensor.from_local(pending, mesh, [Partial()])
    result = value.ours(parts | {"input": partial_sum})[0]
    assert_same(result, expected[0])


@scenario()
def columns_are_sharded_where_nothing_is_normalized(mesh):
    """As the outputs of column-wise parallel layers are."""
    from torch.distributed.tensor import Shard
    from torch.distributed.tensor.debug import CommDebugMode

    for case in PLAIN_CASES:
        if case.normalizes:
            continue
        whole = require_grad(case.make_inputs(SHAPE))
        parts = {n: distribute(t, mesh, Shard(t.dim() - 1)) for n, t in whole.items()}
        with CommDebugMode() as communication:
            (result,) = case.ours(parts)
            backward([result])
        assert not communication.get_total_counts() and result.placements == (Shard(2),)
        (expected,) = case.ours(whole)
        backward([expected])
        assert torch.equal(result.full_tensor(), expected)
        for name, part in parts.items():
            assert part.grad.placements == part.placements
            assert_same(part.grad, whole[name].grad)


@scenario()
def normalized_shapes_and_wanted_gradients_are_told_apart(mesh):
    """DTensor keeps the layout it found for a call: not for another that differs in these alone."""
    from torch.distributed.tensor import Replicate, Shard

    x = torch.randn(4, 6, 8)
    for normalized_shape in [(8,), (6, 8), (8,)]:
        y = functional.layer_norm(distribute(x, mesh, Shard(1)), normalized_shape)
        assert torch.equal(y.full_tensor(), functional.layer_norm(x, normalized_shape))
    part = distribute(x, mesh, Shard(1))
    (_, unused), (_, total) = (torch.ops.resnorm.add_layer_norm(part, part, (8,), prenorm=p) for p in (False, True))
    assert (unused.shape, unused.placements, total.placements) == ((0,), (Replicate(),), (Shard(1),))
    for case in FULL_CASES:
        inputs = case.make_inputs((4, 6, 8))
        for names in [("input",), *((name,) for name in case.optional), ("input", case.optional[0]), tuple(inputs)]:
            whole = require_grad(inputs, names)
            parts = {n: distribute(t, mesh, Shard(0) if is_row(n) else Replicate()) for n, t in whole.items()}
            for each in (parts, whole):
                backward(case.ours(each))
            for name in names:
                assert_same(parts[name].grad, whole[name].grad)


@scenario(*[case for case in CASES if case.dropout_p])
def a_seed_gives_the_mask_of_the_whole_tensor(mesh, value: Case):
    from torch.distributed.tensor import Replicate, Shard

    whole = require_grad(value.make_inputs(SHAPE))
    expected = value.ours(whole)
    backward(expected)
    for place, seed in [(Shard(0), SEED), (Shard(2), distribute(SEED, mesh, Replicate())), (Replicate(), SEED)]:
        parts = {n: distribute(t, mesh, place if is_row(n) else Replicate()) for n, t in whole.items()}
        results = value.ours(parts, seed=seed)
        backward(results)
        for result, other in zip(results, expected, strict=True):
            assert torch.equal(result.full_tensor(), other)
        for name, part in parts.items():
            assert_same(part.grad, whole[name].grad)


@scenario()
def without_a_seed_dropout_keeps_rows_sharded(mesh):
    from torch.distributed.tensor import Shard
    from torch.distributed.tensor.debug import CommDebugMode

    x, residual = torch.randn(2, 64, 64, 8).unbind()
    parts = distribute(x, mesh, Shard(0)), distribute(residual, mesh, Shard(0))
    with CommDebugMode() as communication:
        y, s = AddLayerNorm(8, dropout_p=0.25, elementwise_affine=False, prenorm=True)(*parts)
    assert not communication.get_total_counts() and y.placements == s.placements == (Shard(0),)
    update = s.full_tensor() - residual
    kept = update != 0
    assert 0.7 < kept.float().mean() < 0.8
    torch.testing.assert_close(update, torch.where(kept, x / 0.75, 0.0), rtol=1e-4, atol=1e-5)
    assert_same(y, F.layer_norm(s.full_tensor(), (8,)))


@scenario()
def meshes_of_two_dimensions(mesh):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Partial, Replicate, Shard, distribute_tensor

    x, weight = torch.randn(4, 6, 8), torch.randn(8)
    for shape in [(2, 1), (1, 2)]:
        plane = init_device_mesh("cpu", shape, mesh_dim_names=("data", "tensor"))
        part = distribute_tensor(x, plane, [Shard(0), Shard(1)]).requires_grad_()
        scale = distribute_tensor(weight, plane, [Replicate(), Replicate()]).requires_grad_()
        y = functional.layer_norm(part, (8,), scale)
        backward([y])
        leaves = x.clone().requires_grad_(), weight.clone().requires_grad_()
        expected = F.layer_norm(leaves[0], (8,), leaves[1])
        backward([expected])
        assert y.placements == (Shard(0), Shard(1)) and scale.grad.placements == (Partial(), Partial())
        for actual, other in [(y, expected), (part.grad, leaves[0].grad), (scale.grad, leaves[1].grad)]:
            assert_same(actual, other)


@scenario()
def second_derivatives(mesh):
    from torch.distributed.tensor import Replicate, Shard

    for case in [case for case in PLAIN_CASES if case.normalizes or case.activates]:
        whole = require_grad(case.make_inputs((4, 6, 8), torch.float64))
        parts = {n: distribute(t, mesh, Shard(1) if is_row(n) else Replicate()) for n, t in whole.items()}
        grads = []
        for inputs in (parts, whole):
            loss = sum(result.sin().sum() for result in case.ours(inputs))
            first = torch.autograd.grad(loss, inputs["input"], create_graph=True)[0]
            grads.append(torch.autograd.grad(first.square().sum(), inputs.values(), allow_unused=True))
        for actual, expected in zip(*grads, strict=True):
            assert (actual is None) == (expected is None)
            if expected is not None:
                assert_same(actual, expected)


@scenario()
def linear_and_attention(mesh):
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor.debug import CommDebugMode

    x, weight, bias = torch.randn(3, 4, 8), torch.randn(6, 8), torch.randn(6)
    expected = functional.linear(x, weight, bias, activation="relu")
    for rows, outputs in [((Shard(1), Replicate(), Replicate()), Shard(1)), (None, Shard(2))]:
        places = rows or (Replicate(), Shard(0), Shard(0))
        parts = [distribute(t, mesh, place) for t, place in zip((x, weight, bias), places)]
        with torch.no_grad(), CommDebugMode() as communication:
            y = functional.linear(*parts, activation="relu")
        assert not communication.get_total_counts() and y.placements == (outputs,)
        assert_same(y, expected)
    qkv, bounds = torch.randn(7, 3, 4, 8, requires_grad=True), torch.tensor([0, 3, 7], dtype=torch.int32)
    expected = functional.packed_attention(qkv, bounds)
    backward([expected])
    part, whole_bounds = distribute(qkv, mesh, Shard(2)), distribute(bounds, mesh, Replicate())
    with CommDebugMode() as communication:
        y = functional.packed_attention(part, whole_bounds)
        backward([y])
    assert not communication.get_total_counts() and y.placements == (Shard(1),)
    assert_same(y, expected)
    assert_same(part.grad, qkv.grad)


@scenario()
def a_seed_drops_the_whole_tensors_attention_weights(mesh):
    from torch.distributed.tensor import Replicate, Shard

    qkv, bounds = torch.randn(7, 3, 4, 8, requires_grad=True), torch.tensor([0, 3, 7], dtype=torch.int32)
    expected = functional.packed_attention(qkv, bounds, dropout_p=0.3, training=True, seed=SEED)
    backward([expected])
    for place in (Shard(2), Shard(0), Replicate()):
        part, whole_bounds = distribute(qkv, mesh, place), distribute(bounds, mesh, Replicate())
        y = functional.packed_attention(part, whole_bounds, dropout_p=0.3, training=True, seed=SEED)
        backward([y])
        assert_same(y, expected)
        assert_same(part.grad, qkv.grad)


@scenario()
def refusals(mesh):
    from torch.distributed.tensor import Replicate, Shard

    x, weight = torch.randn(4, 8), torch.randn(8)
    part = distribute(x, mesh, Shard(0))
    with pytest.raises(RuntimeError, match="got mixed"):
        functional.layer_norm(part, (8,), weight)
    with pytest.raises(RuntimeError, match="normalized_shape"):
        functional.layer_norm(part, (7,))
    with pytest.raises(NotImplementedError, match="layer_norm: with out"):
        functional.layer_norm(part, (8,), distribute(weight, mesh, Replicate()), out=torch.empty_like(part))


@scenario()
def compiled(mesh):
    from torch.distributed.tensor import Partial, Replicate, Shard

    case = Case("add_layer_norm", ("weight",))
    whole = require_grad(case.make_inputs((4, 6, 8)))
    parts = {n: distribute(t, mesh, Shard(1) if is_row(n) else Replicate()) for n, t in whole.items()}
    results = torch.compile(case.ours, backend="aot_eager", fullgraph=True)(parts)
    expected = case.ours(whole)
    for each in (results, expected):
        backward(each)
    for result, other in zip(results, expected, strict=True):
        assert result.placements == (Shard(1),)
        assert_same(result, other)
    for name, part in parts.items():
        assert part.grad.placements == (Shard(1) if is_row(name) else Partial(),)
        assert_same(part.grad, whole[name].grad)


class Mlp(nn.Module):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(16, dtype=dtype)
        self.up, self.down = nn.Linear(16, 32, dtype=dtype), nn.Linear(32, 16, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(self.norm(x))))


def assert_trains_alike(model: nn.Module, others: nn.Module, x: Tensor) -> None:
    """Outputs, with and without grad, and all gradients."""
    outcomes = []
    for each in (model, others):
        leaf = x.clone().requires_grad_()
        output = each(leaf)
        output.float().sin().sum().backward()
        grads = [leaf.grad, *(parameter.grad for parameter in each.parameters())]
        with torch.no_grad():
            tensors = [output, each(leaf), *grads]
        outcomes.append([tensor.full_tensor() if sharding.is_dtensor(tensor) else tensor for tensor in tensors])
    tolerance = 1e-5 if x.dtype == torch.float32 else 5e-2
    for actual, expected in zip(*outcomes, strict=True):
        torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


@scenario(torch.float32, torch.bfloat16)
def sequence_and_tensor_parallel_mlp(mesh, value: torch.dtype):
    """Accelerated before or after it is made parallel, it trains as torch.nn's does."""
    from torch.distributed.tensor import Shard
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        PrepareModuleInput,
        RowwiseParallel,
        SequenceParallel,
        parallelize_module,
    )

    def parallelize(model: nn.Module) -> nn.Module:
        plan = {
            "": PrepareModuleInput(input_layouts=Shard(1), desired_input_layouts=Shard(1)),
            "norm": SequenceParallel(),
            "up": ColwiseParallel(input_layouts=Shard(1)),
            "down": RowwiseParallel(output_layouts=Shard(1), use_local_output=False),
        }
        return parallelize_module(model, mesh, plan)

    base, x = Mlp(value), torch.randn(2, 3, 16, dtype=value)
    with torch.no_grad():
        base.norm.weight.normal_()
    for make in (lambda m: parallelize(accelerate(m)), lambda m: accelerate(parallelize(m))):
        ours = make(copy.deepcopy(base))
        assert type(ours.norm) is LayerNorm
        assert_trains_alike(ours, parallelize(copy.deepcopy(base)), x)


@scenario(False, True)
def tensor_parallel_encoder_layer(mesh, value: bool):
    """A plan for the feed-forward block, and for a norm, of an encoder layer that is ``norm_first`` or not."""
    from torch.distributed.tensor import Shard
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        RowwiseParallel,
        SequenceParallel,
        parallelize_module,
    )

    base = nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, batch_first=True, norm_first=value)
    feed_forward = {"linear1": ColwiseParallel(), "linear2": RowwiseParallel()}
    with_norm = {
        "norm2": SequenceParallel(use_local_output=True),
        "linear1": ColwiseParallel(input_layouts=Shard(1)),
        "linear2": RowwiseParallel(output_layouts=Shard(1)),
    }
    for plan in [feed_forward, *([with_norm] if value else [])]:
        stock = parallelize_module(copy.deepcopy(base), mesh, plan)
        assert_trains_alike(
            parallelize_module(accelerate(copy.deepcopy(base)), mesh, plan), stock, torch.randn(2, 6, 16)
        )


@scenario()
def fully_sharded_encoder(mesh):
    from torch.distributed.fsdp import fully_shard

    def shard(model: nn.Module) -> nn.Module:
        for layer in model.layers:
            fully_shard(layer, mesh=mesh)
        return fully_shard(model, mesh=mesh)

    layer = nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, batch_first=True)
    base = nn.TransformerEncoder(layer, 2, nn.LayerNorm(16), enable_nested_tensor=False)
    torch.manual_seed(dist.get_rank())
    x = torch.randn(2, 6, 16)
    assert_trains_alike(shard(accelerate(copy.deepcopy(base))), shard(copy.deepcopy(base)), x)


@pytest.mark.parametrize("name", SCENARIOS)
def test_in_two_processes(name, failures):
    for rank, failed in enumerate(failures):
        assert name not in failed, f"in process {rank}:\n{failed[name]}"


def test_the_table_names_every_operator_that_does_not_write():
    operators = [each for each in torch._C._dispatch_get_all_op_names() if each.startswith("resnorm::")]
    operators.remove("resnorm::encode")  # layers with DTensors for parameters do not become one operator
    assert {name.removeprefix("resnorm::") for name in operators if not name.endswith("_out")} == set(sharding._AXES)
    for name in sharding._AXES:
        schema = getattr(torch.ops.resnorm, name).default._schema
        arguments, results = sharding._axes(name)
        tensors = {each.name for each in schema.arguments if "Tensor" in str(each.type)}
        assert tensors - {"seed"} == set(arguments) and len(results) == len(schema.returns)


def test_dtensor_is_imported_by_nobody_but_its_users():
    script = """
import sys, torch, resnorm_ext
model = resnorm_ext.accelerate(torch.nn.TransformerEncoderLayer(8, 2, 16, batch_first=True))
model(torch.randn(1, 2, 8)).sum().backward()
assert "torch.distributed.tensor" not in sys.modules and "torch._dynamo" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", script], check=True)
