# SPDX-License-Identifier: BSD-3-Clause
from __future__ import annotations

import copy
import os
import weakref
from pathlib import Path

import pytest
import torch
from torch import nn

from resnorm_ext.build.extension import extension
from resnorm_ext.engine.linear import prepare_linear
from resnorm_ext.engine.prepared import PREPARED
from resnorm_ext.engine.weights import forget_all_weights
from resnorm_ext.modules.linear import prepared_linear

from .linear_cases import ACTIVATIONS, BACKENDS, IN, OUT, needs_onednn

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


class TestPreparedLinear:
    """Weights that are kept packed follow every change of their parameters."""

    @pytest.fixture
    def layer(self, backend) -> nn.Linear:
        torch.manual_seed(0)
        return nn.Linear(IN, OUT)

    def prepared(self, layer: nn.Linear):
        return prepared_linear(layer, layer.weight, layer.bias)

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

    def test_what_is_not_kept_is_not_prepacked(self, backend):
        """Parameters made in inference mode are multiplied as they are, by ATen only where it is chosen or alone."""
        with torch.inference_mode():
            layer = nn.Linear(IN, OUT)
            prepared = self.prepared(layer)
        has_onednn = "onednn" in extension.linear_backends(torch.float32)
        assert prepared.backend == ("onednn" if has_onednn and backend != "aten" else "aten")
        assert prepared.weight.data_ptr() == layer.weight.data_ptr()

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
