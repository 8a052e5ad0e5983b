# SPDX-License-Identifier: BSD-3-Clause
from __future__ import annotations

import copy
import os
import subprocess
import sys
import time
import weakref
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from resnorm_ext import functional
from resnorm_ext.build.extension import extension, load_extension
from resnorm_ext.engine import linear as engine
from resnorm_ext.engine.linear import LinearShape, choose_backends, prepare_linear, product_dtype
from resnorm_ext.engine.weights import forget_all_weights
from resnorm_ext.modules.linear import PREPARED, prepared_linear

from .linear_cases import ACTIVATIONS, BACKENDS, IN, OUT, ROWS, operands, reference


def needs_onednn(dtype: torch.dtype = torch.float32) -> None:
    load_extension()
    if "onednn" not in extension.linear_backends(dtype):
        pytest.skip(f"this PyTorch or CPU has no oneDNN linear for {dtype}")


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest):
    """Everything that multiplies, for the layers of these tests; the operator has oneDNN for the last."""
    shapes = [(dtype, IN, out) for dtype in (torch.float32, torch.bfloat16) for out in (OUT, 3 * OUT)]
    if request.param == "onednn":
        needs_onednn()
    for shape in shapes:
        extension.set_linear_backend(*shape, request.param)
    yield request.param
    for shape in shapes:
        extension.set_linear_backend(*shape, "aten")


# Ways to write a tensor, or the rows of it in a slice.
WRITES = [
    lambda weight, rows=slice(None): weight.detach()[rows].add_(1.0),
    lambda weight, rows=slice(None): weight.data[rows].clamp_(-0.05, 0.05),
    lambda weight, rows=slice(None): weight.data.view(weight.shape)[rows].copy_(torch.ones(1)),
    lambda weight, rows=slice(None): weight.detach().data.__setitem__(rows, 0.5),
    lambda weight, rows=slice(None): torch._foreach_add_([weight.data[rows]], 1.0),
    lambda weight, rows=slice(None): inference_mode(lambda: weight[rows].add_(1.0)),
    lambda weight, rows=slice(None): inference_mode(lambda: weight.data[rows].add_(1.0)),
]


def inference_mode(write) -> None:
    with torch.inference_mode():
        write()


class TestOperator:
    @pytest.mark.parametrize("with_residual", [False, True])
    @pytest.mark.parametrize("activation", ACTIVATIONS)
    def test_every_row_count(self, backend, activation, with_residual):
        for rows in ROWS:
            x, weight, bias, residual = operands(rows)
            residual = residual if with_residual else None
            output = functional.linear(x, weight, bias, activation=activation, residual=residual)
            expected = reference(x, weight, bias, activation, residual)
            assert output.shape == expected.shape and output.is_contiguous()
            torch.testing.assert_close(output.double(), expected, rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("activation", ACTIVATIONS)
    def test_every_dtype(self, backend, dtype, activation):
        x, weight, bias, residual = operands((3, 35), dtype)
        output = functional.linear(x, weight, bias, activation=activation, residual=residual)
        expected = reference(x, weight, bias, activation, residual)
        assert output.dtype == dtype
        tolerance = 1e-12 if dtype == torch.float64 else 4 * torch.finfo(dtype).eps
        torch.testing.assert_close(output.double(), expected, rtol=tolerance, atol=8 * tolerance)

    @pytest.mark.parametrize("leading", [(), (7,), (2, 3, 5), (0, 4)])
    def test_leading_dimensions_and_no_bias(self, backend, leading):
        x, weight, _, _ = operands(leading)
        expected = reference(x, weight, None, "none", None)
        torch.testing.assert_close(functional.linear(x, weight).double(), expected, rtol=1e-5, atol=1e-5)

    def test_strides(self, backend):
        x, weight, bias, residual = operands(48)
        x, weight, residual = x.t().contiguous().t(), weight.t().contiguous().t(), residual[:, ::1].flip(0)
        expected = reference(x, weight, bias, "gelu", residual)
        output = functional.linear(x, weight, bias, activation="gelu", residual=residual)
        torch.testing.assert_close(output.double(), expected, rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("bias", [torch.randn(OUT, 2)[:, 0], torch.ones(1).expand(OUT), torch.randn(OUT).flip(0)])
    def test_strides_of_the_bias(self, backend, bias):
        x, weight, _, _ = operands(64)
        torch.testing.assert_close(functional.linear(x, weight, bias), F.linear(x, weight, bias), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(prepare_linear((weight, bias))(x), F.linear(x, weight, bias), rtol=1e-5, atol=1e-5)

    def test_nothing_is_written_and_nothing_is_shared(self, backend):
        arguments = operands(64)
        before = [tensor.clone() for tensor in arguments]
        x, weight, bias, residual = arguments
        outputs = [functional.linear(x, weight, bias, residual=residual) for _ in range(3)]
        outputs[0].zero_()
        torch.testing.assert_close(outputs[1], outputs[2], rtol=0, atol=0)
        assert all(map(torch.equal, arguments, before))

    def test_residual_of_a_wider_dtype_widens_the_result(self, backend):
        x, weight, bias, _ = operands(5, torch.bfloat16)
        residual = torch.randn(5, OUT)
        output = functional.linear(x, weight, bias, residual=residual)
        torch.testing.assert_close(output, F.linear(x, weight, bias) + residual)

    @pytest.mark.parametrize("activation", ACTIVATIONS)
    def test_gradients(self, backend, activation):
        arguments = [t.double().requires_grad_() for t in operands(4)]

        def call(x, weight, bias, residual):
            return functional.linear(x, weight, bias, activation=activation, residual=residual)

        assert torch.autograd.gradcheck(call, arguments)
        assert torch.autograd.gradgradcheck(call, arguments)

    @pytest.mark.parametrize("requires_grad", [False, True])
    def test_opcheck(self, backend, requires_grad):
        x, weight, bias, residual = (t.requires_grad_(requires_grad) for t in operands((2, 3)))
        for arguments in ((x, weight), (x, weight, bias, "gelu", residual)):
            torch.library.opcheck(torch.ops.resnorm.linear.default, arguments)

    def test_torch_func(self, backend):
        x, weight, bias, _ = operands((3, 5))

        def loss(function, weight, x):
            return function(x, weight, bias).square().sum()

        for transform in (torch.func.grad, torch.func.jacrev):
            ours = torch.func.vmap(transform(lambda w, x: loss(functional.linear, w, x)), (None, 0))(weight, x)
            theirs = torch.func.vmap(transform(lambda w, x: loss(F.linear, w, x)), (None, 0))(weight, x)
            torch.testing.assert_close(ours, theirs)
        _, ours = torch.func.jvp(lambda x: functional.linear(x, weight, bias, activation="gelu"), (x,), (x,))
        _, theirs = torch.func.jvp(lambda x: F.gelu(F.linear(x, weight, bias)), (x,), (x,))
        torch.testing.assert_close(ours, theirs)

    @pytest.mark.parametrize("requires_grad", [False, True])
    def test_compiles_without_a_graph_break(self, backend, requires_grad):
        x, weight, bias, residual = (t.requires_grad_(requires_grad) for t in operands((2, 3)))

        def call(x, weight, bias, residual):
            return functional.linear(x, weight, bias, activation="gelu", residual=residual)

        compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
        output, expected = compiled(x, weight, bias, residual), call(x, weight, bias, residual)
        torch.testing.assert_close(output, expected)
        if requires_grad:
            grads = torch.autograd.grad(output.sum(), (x, weight, bias, residual))
            torch.testing.assert_close(grads, torch.autograd.grad(expected.sum(), (x, weight, bias, residual)))

    @pytest.mark.parametrize("requires_grad", [False, True])
    def test_autocast_casts_as_torch_does(self, backend, requires_grad):
        x, weight, bias, residual = (t.requires_grad_(requires_grad) for t in operands(5))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            output = functional.linear(x, weight, bias, activation="relu")
            with_residual = functional.linear(x, weight, bias, residual=residual)
            torch.testing.assert_close(output, F.relu(F.linear(x, weight, bias)))
            torch.testing.assert_close(with_residual, F.linear(x, weight, bias) + residual)
        assert output.dtype == torch.bfloat16 and with_residual.dtype == torch.float32

    @pytest.mark.parametrize(
        ("change", "error", "message"),
        [
            ({"input": torch.ones(3, IN + 1)}, RuntimeError, rf"shape \(\*, {IN}\).*\[3, {IN + 1}\]"),
            ({"input": torch.ones(3, IN, dtype=torch.int64)}, NotImplementedError, "Long"),
            ({"weight": torch.ones(IN)}, RuntimeError, rf"2-dimensional.*\[{IN}\]"),
            ({"weight": torch.ones(OUT, IN, dtype=torch.float64)}, RuntimeError, "Float.*Double"),
            ({"weight": torch.ones(OUT, IN, device="meta")}, RuntimeError, "cpu.*meta"),
            ({"bias": torch.ones(OUT + 1)}, RuntimeError, rf"\[{OUT}\].*\[{OUT + 1}\]"),
            ({"residual": torch.ones(3, OUT + 1)}, RuntimeError, rf"\[3, {OUT}\].*\[3, {OUT + 1}\]"),
            ({"activation": "elu"}, ValueError, "gelu_tanh, but got elu"),
        ],
    )
    def test_bad_input(self, change, error, message):
        x, weight, bias, residual = operands(3)
        arguments = {"input": x, "weight": weight, "bias": bias, "residual": residual} | change
        with pytest.raises(error, match=message):
            functional.linear(**arguments)


class TestPreparedLinear:
    """Weights that are kept packed follow every change of their parameters."""

    @pytest.fixture
    def layer(self, backend) -> nn.Linear:
        torch.manual_seed(0)
        return nn.Linear(IN, OUT)

    def prepared(self, layer: nn.Linear):
        return prepared_linear(layer, layer.weight, layer.bias, layer.weight.dtype)

    def check(self, layer: nn.Linear, activation: str = "none") -> None:
        x = torch.randn(10, IN).to(layer.weight.dtype)
        with torch.no_grad():
            output, expected = self.prepared(layer)(x, activation), ACTIVATIONS[activation](layer(x))
        tolerance = 1e-5 if x.dtype == torch.float32 else 4 * torch.finfo(x.dtype).eps
        torch.testing.assert_close(output, expected, rtol=tolerance, atol=tolerance)

    @pytest.mark.parametrize("activation", ACTIVATIONS)
    def test_activation(self, layer, activation):
        self.check(layer, activation=activation)

    @pytest.mark.parametrize("bias", [False, True])
    def test_layers_side_by_side(self, backend, bias):
        layers = [nn.Linear(IN, OUT, bias=bias) for _ in range(3)]
        x = torch.randn(10, IN)
        with torch.no_grad():
            output = prepare_linear(*((layer.weight, layer.bias) for layer in layers))(x)
            torch.testing.assert_close(output, torch.cat([layer(x) for layer in layers], -1), rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @torch.no_grad()
    def test_multiplied_in_another_dtype(self, backend, dtype):
        """As under autocast, and where half-precision products are slow."""
        other = torch.bfloat16 if dtype == torch.float32 else torch.float32
        layer, x = nn.Linear(IN, OUT, dtype=dtype), torch.randn(10, IN, dtype=other)
        output = prepare_linear((layer.weight, layer.bias), dtype=other)(x)
        assert output.dtype == other
        torch.testing.assert_close(output, layer.to(other)(x), rtol=1e-2, atol=1e-2)

    def test_it_is_kept(self, layer):
        assert self.prepared(layer) is self.prepared(layer)

    @pytest.mark.parametrize("which", ["weight", "bias"])
    @pytest.mark.parametrize("change", WRITES)
    def test_writes(self, layer, change, which):
        self.check(layer)
        change(getattr(layer, which))
        self.check(layer)

    @pytest.mark.parametrize("change", WRITES)
    def test_writes_of_one_value(self, layer, change):
        """None of them is among those that are sampled."""
        self.check(layer)
        change(layer.weight, slice(7, 8))
        self.check(layer)

    def test_a_write_through_data_that_was_taken_before(self, layer):
        self.check(layer)
        alias, view = layer.weight.data, layer.weight.data.view(-1)
        self.check(layer)
        for each in (alias[3], view):
            each.mul_(2.0)
            self.check(layer)

    def test_writes_into_a_flat_buffer_that_parameters_lie_in(self, layer):
        """As optimizers keep them: the buffer counts its writes for itself."""
        flat = torch.cat([parameter.detach().flatten() for parameter in layer.parameters()])
        weight, bias = flat.split([OUT * IN, OUT])
        layer.weight.data, layer.bias.data = weight.view(OUT, IN), bias
        self.check(layer)
        for _ in range(2):
            flat[5 * IN + 3] += 1.0
            self.check(layer)

    def test_an_alias_outlives_what_was_kept(self, layer):
        alias = layer.weight.data  # before anything is
        for _ in range(2):
            self.check(layer)
            alias[7, 5] += 1.0
            self.check(layer)
            layer.__dict__.pop(PREPARED)

    def test_reading_data_changes_nothing(self, layer):
        kept = self.prepared(layer)
        for _ in range(100):
            layer.weight.data.sum()
        assert self.prepared(layer) is kept

    @pytest.mark.parametrize("assign", [False, True])
    def test_load_state_dict(self, layer, assign):
        self.check(layer)
        layer.load_state_dict(nn.Linear(IN, OUT).state_dict(), assign=assign)
        self.check(layer)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
    @pytest.mark.parametrize("swap", [False, True])
    def test_to(self, layer, dtype, swap, monkeypatch):
        monkeypatch.setattr(torch.__future__, "_swap_module_params_on_conversion", swap)
        self.check(layer)
        self.check(layer.to(dtype))
        self.check(layer.to(torch.float32))

    def test_swapped_with_another(self, layer):
        self.check(layer)
        torch.utils.swap_tensors(layer.weight, nn.Parameter(torch.randn(OUT, IN)))
        self.check(layer)

    def test_new_data(self, layer):
        self.check(layer)
        layer.weight.data = torch.randn(OUT, IN)
        self.check(layer)

    def test_what_torch_has_no_part_in_is_seen_after_forgetting(self, layer):
        self.check(layer)
        layer.weight.detach().numpy()[3, 5] = 9.0
        forget_all_weights()
        self.check(layer)

    def test_a_write_of_everything_through_numpy(self, layer):
        self.check(layer)
        layer.weight.detach().numpy()[:] *= 2
        self.check(layer)

    def test_new_data_at_an_old_address(self, layer):
        """What was freed may be handed out again: same address, same version, other values."""
        self.check(layer)
        for _ in range(20):
            layer.weight.data = torch.randn(OUT, IN)
            self.check(layer)

    def test_change_of_backend(self, layer, backend):
        self.check(layer)
        extension.set_linear_backend(torch.float32, IN, OUT, "aten")
        assert self.prepared(layer).backend == "aten"

    def test_parameters_made_in_inference_mode(self, backend):
        with torch.inference_mode():
            layer = nn.Linear(IN, OUT)
            self.check(layer)
            layer.weight.add_(1.0)
            self.check(layer)

    def test_nothing_is_kept_of_a_parameter_or_layer_that_is_gone(self, backend):
        layer = nn.Linear(IN, OUT)
        first = weakref.ref(self.prepared(layer).weight)
        layer.weight = nn.Parameter(torch.randn(OUT, IN))
        second = weakref.ref(self.prepared(layer).weight)
        assert first() is None
        del layer
        assert second() is None

    def test_layer_is_none_the_wiser(self, layer):
        self.check(layer)
        twin = copy.deepcopy(layer)
        assert twin.state_dict().keys() == layer.state_dict().keys() == {"weight", "bias"}
        assert twin.__dict__[PREPARED] is None
        self.check(twin)


@pytest.mark.parametrize("name", BACKENDS)
class TestWhatDoesNotFit:
    """The same errors whoever multiplies."""

    @pytest.fixture
    def make(self, name):
        if name not in extension.linear_backends(torch.float32):
            pytest.skip(f"this PyTorch or CPU has no {name}")
        return lambda weight, bias=None: extension.PreparedLinear(weight, bias, name)

    @pytest.mark.parametrize(
        "bias", [torch.zeros(1), torch.zeros(OUT, 1), torch.zeros(OUT).bfloat16(), torch.zeros(OUT, device="meta")]
    )
    def test_bias(self, make, bias):
        with pytest.raises(RuntimeError, match=r"Expected bias of shape .* but got bias of shape"):
            make(torch.randn(OUT, IN), bias)

    @pytest.mark.parametrize("weight", [torch.zeros(OUT), torch.zeros(OUT, IN, device="meta")])
    def test_weight(self, make, weight):
        with pytest.raises(RuntimeError, match=r"Expected a weight of shape \(out_features, in_features\) on the CPU"):
            make(weight)

    @pytest.mark.parametrize(
        "x",
        [
            torch.zeros(4, IN - 1),
            torch.zeros(4, IN).bfloat16(),
            torch.zeros(()),
            torch.zeros(4, IN, device="meta"),
            torch._efficientzerotensor(4, IN),
        ],
    )
    def test_input(self, make, x):
        with pytest.raises(RuntimeError, match=rf"Expected input of shape \(\*, {IN}\) of Float"):
            make(torch.randn(OUT, IN))(x)


def test_a_dtype_that_a_backend_does_not_multiply_is_refused():
    with pytest.raises(RuntimeError, match=r"of a dtype that resnorm multiplies, but got weight of shape .* of Half"):
        extension.PreparedLinear(torch.randn(OUT, IN).half(), None, "resnorm")


def test_an_unknown_backend_is_refused():
    with pytest.raises(ValueError, match="Expected aten, onednn or resnorm as the backend of linear layers, but got q"):
        extension.PreparedLinear(torch.randn(OUT, IN), None, "q")


def resident_mib() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_does_not_grow_with_the_number_of_row_counts(dtype):
    """oneDNN keeps half a megabyte for every row count it sees."""
    needs_onednn(dtype)
    weight = torch.randn(OUT, IN).to(dtype)
    linear = extension.PreparedLinear(weight, None, "onednn")
    row_counts = torch.randperm(4096, generator=torch.Generator().manual_seed(0))[:1300].tolist()
    x = torch.randn(4096, IN).to(dtype)
    for rows in row_counts[:300]:
        linear(x[:rows])
    before = resident_mib()
    for rows in row_counts[300:]:
        linear(x[:rows])
    assert resident_mib() - before < 50


class TestChoice:
    shape = LinearShape(torch.float32, 48, 56)

    @pytest.fixture(autouse=True)
    def unmeasured(self):
        needs_onednn()
        engine._seconds.pop(self.shape, None)
        yield
        engine._seconds.pop(self.shape, None)
        extension.set_linear_backend(*self.shape, "aten")

    @pytest.mark.parametrize("fastest", BACKENDS)
    def test_the_fastest_one_is_used_and_measured_once(self, monkeypatch, fastest):
        measured = []
        times = {backend: 1.0 + (backend != fastest) for backend in extension.linear_backends(torch.float32)}
        monkeypatch.setattr(engine, "_times", lambda shapes, _: measured.extend(shapes) or times)
        choose_backends([self.shape, self.shape])
        choose_backends([self.shape])
        assert measured == [self.shape]
        assert extension.linear_backend(*self.shape) == fastest

    def test_measurement_gives_a_backend_and_draws_no_random_number(self):
        before = torch.get_rng_state()
        backends = extension.linear_backends(torch.float32)
        assert list(engine._times([self.shape], backends)) == backends == list(BACKENDS)
        assert torch.equal(torch.get_rng_state(), before)

    def test_the_least_time_wins(self, monkeypatch):
        monkeypatch.setattr(engine, "_shortest_times", lambda *calls: [3.0, 1.0, 2.0])
        choose_backends([self.shape])
        assert extension.linear_backend(*self.shape) == "onednn"

    @pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("fastest", [torch.float32, "half"])
    def test_halves_are_multiplied_in_float32_where_that_is_faster(self, monkeypatch, half, fastest):
        fastest = half if fastest == "half" else fastest
        shape = LinearShape(half, 48, 56)
        monkeypatch.setattr(engine, "_seconds", {})
        monkeypatch.setattr(
            engine, "_times", lambda shapes, names: dict.fromkeys(names, 1.0 + (next(iter(shapes)).dtype != fastest))
        )
        assert product_dtype([shape]) == half  # not measured yet
        choose_backends([shape])
        assert product_dtype([shape]) == fastest
        assert product_dtype([shape, LinearShape(half, 1, 1)]) == half  # one of them is not measured
        assert product_dtype([self.shape]) == torch.float32

    def test_what_takes_too_long_is_measured_once(self):
        calls = []
        engine._shortest_times(lambda: calls.append(time.sleep(2 * engine._TOO_SLOW)), lambda: None)
        assert len(calls) == 1

    def test_nothing_is_measured_under_deterministic_algorithms(self, monkeypatch):
        monkeypatch.setattr(engine, "_times", lambda *_: pytest.fail("measured"))
        torch.use_deterministic_algorithms(True)
        try:
            choose_backends([self.shape])
        finally:
            torch.use_deterministic_algorithms(False)
        assert extension.linear_backend(*self.shape) == "aten"

    def test_a_dtype_that_only_aten_multiplies_is_not_measured(self, monkeypatch):
        monkeypatch.setattr(engine, "_times", lambda *_: pytest.fail("measured"))
        shape = LinearShape(torch.float64, 48, 56)
        choose_backends([shape])
        for backend in ("onednn", "resnorm"):
            extension.set_linear_backend(*shape, backend)
            assert extension.linear_backend(*shape) == "aten"

    def test_environment_variable(self):
        program = """if True:
            import torch
            from resnorm_ext.build.extension import extension
            from resnorm_ext.engine import linear
            linear._times = lambda *_: 1 / 0
            shape = linear.LinearShape(torch.float32, 48, 56)
            linear.choose_backends([shape])
            print(extension.linear_backend(*shape))
        """
        processes = {
            value: subprocess.Popen(
                [sys.executable, "-c", program],
                env=os.environ | {"RESNORM_LINEAR": value},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for value in (*BACKENDS, "mkl")
        }
        results = {value: process.communicate(timeout=300) for value, process in processes.items()}
        for value in BACKENDS:
            assert results[value][0].strip() == value, results[value][1]
        assert "ValueError: Expected RESNORM_LINEAR to be aten, onednn or resnorm, but got mkl" in results["mkl"][1]
