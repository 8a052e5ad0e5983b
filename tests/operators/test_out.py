# SPDX-License-Identifier: BSD-3-Clause
"""What autograd must know of operators that write into their arguments."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import forward_ad

from resnorm_ext.functional import add_layer_norm, bias_activation, layer_norm, residual_add

from .cases import CASES, FULL_CASES, Case, require_grad


def outs_of(case: Case, *tensors: torch.Tensor):
    """As the `out` argument takes them."""
    return tensors[: len(case.outputs)] if case.prenorm else tensors[0]


@pytest.mark.smoke
@pytest.mark.parametrize("case", CASES, ids=str)
def test_each_written_tensor_and_no_other_has_a_new_version(case):
    inputs = case.make_inputs((3, 8))
    outs = [torch.empty(3, 8) for _ in case.outputs]
    case.ours(inputs, out=outs_of(case, *outs))
    assert [out._version for out in outs] == [1] * len(outs)
    assert [tensor._version for tensor in inputs.values()] == [0] * len(inputs)


@pytest.mark.parametrize("case", FULL_CASES, ids=str)
def test_writing_over_a_saved_tensor_is_detected(case):
    """The input of an earlier operation, which saved it for its backward pass, is overwritten."""
    inputs = case.make_inputs((3, 8))
    for name in ("input", "residual") if case.adds else ("input",):
        leaf = torch.randn(3, 8, requires_grad=True)
        saved = inputs[name].clone()
        product = leaf * saved
        targets = [torch.empty(3, 8), torch.empty(3, 8)]
        targets[-1 if name == "residual" and case.prenorm else 0] = saved
        case.ours(inputs | {name: saved}, out=outs_of(case, *targets))
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            product.sum().backward()


@pytest.mark.parametrize("case", FULL_CASES, ids=str)
def test_writing_with_grad_is_refused_and_changes_nothing(case):
    """By torch's own words for out= arguments."""
    with pytest.raises(RuntimeError) as torchs:
        torch.add(torch.ones(3, requires_grad=True), 1, out=torch.empty(3))
    inputs = case.make_inputs((3, 8))
    for name in [*inputs, "out"]:
        leaves = require_grad(inputs, (name,))
        outs = [torch.zeros(3, 8).requires_grad_(name == "out") for _ in range(2)]
        with pytest.raises(type(torchs.value), match=r"functions with out=\.\.\. arguments don't support automatic"):
            case.ours(leaves, out=outs_of(case, *outs))
        assert all((out == 0).all() and out._version == 0 for out in outs)
        with torch.no_grad():
            case.ours(leaves, out=outs_of(case, *outs))
        assert (outs[0] != 0).any()


@pytest.mark.parametrize("case", FULL_CASES, ids=str)
def test_writing_with_forward_derivatives_is_refused(case):
    """Never a result without its tangent. By torch's own words again."""
    inputs = case.make_inputs((3, 8))
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(torch.ones(3), torch.ones(3))
        with pytest.raises(NotImplementedError) as torchs:
            torch.add(dual, 1, out=torch.empty(3))
        words = str(torchs.value).partition("with ")[0]
        inputs["input"] = forward_ad.make_dual(inputs["input"], torch.ones(3, 8))
        with pytest.raises(type(torchs.value), match=words):
            case.ours(inputs, out=outs_of(case, torch.empty(3, 8), torch.empty(3, 8)))


@pytest.mark.parametrize("case", FULL_CASES, ids=str)
def test_out_is_returned(case):
    out = outs_of(case, torch.empty(3, 8), torch.empty(3, 8))
    results = case.ours(case.make_inputs((3, 8)), out=out)
    assert all(result is given for result, given in zip(results, out if case.prenorm else (out,), strict=True))


def test_no_memory_is_allocated_for_results():
    """Steady state of an inference loop: what is given is used."""
    input, residual, weight, bias = torch.randn(64, 768), torch.randn(64, 768), torch.randn(768), torch.randn(768)
    y = torch.empty(64, 768)
    calls = [
        lambda: layer_norm(input, (768,), weight, bias, out=y),
        lambda: residual_add(input, residual, out=residual),
        lambda: bias_activation(input, bias, out=input),
        lambda: add_layer_norm(input, residual, (768,), weight, bias, prenorm=True, out=(y, residual)),
    ]
    for call in calls:
        with torch.profiler.profile(profile_memory=True) as profile:
            call()
        assert sum(abs(event.self_cpu_memory_usage) for event in profile.key_averages()) == 0


class TestOverlap:
    """Results that share memory with operands in part would be computed from what was just written."""

    @pytest.mark.parametrize("shift", [1, 4, 8, 39])
    def test_shifted(self, shift):
        memory = torch.randn(100)
        input, out = memory[:40].view(5, 8), memory[shift : shift + 40].view(5, 8)
        with pytest.raises(RuntimeError) as torchs:
            torch.add(input, 1, out=out)
        for call in self.calls(input, torch.randn(5, 8), out):
            with pytest.raises(type(torchs.value), match="memory location"):
                call()

    def calls(self, input, residual, out):
        fresh = torch.empty(5, 8)
        return [
            lambda: layer_norm(input, (8,), out=out),
            lambda: bias_activation(input, out=out),
            lambda: residual_add(input, residual, out=out),
            lambda: residual_add(residual, input, out=out),
            lambda: add_layer_norm(input, residual, (8,), out=out),
            lambda: add_layer_norm(residual, input, (8,), out=out),
            lambda: add_layer_norm(input, residual, (8,), prenorm=True, out=(fresh, out)),
        ]

    @pytest.mark.parametrize("shift", [1, 7])
    def test_rows_of_a_wider_buffer_that_overlap(self, shift):
        memory = torch.randn(5, 20)
        input, out = memory[:, :8], memory[:, shift : shift + 8]
        for call in self.calls(input, torch.randn(5, 8), out):
            with pytest.raises(RuntimeError, match="memory location"):
                call()

    def test_neighbours_in_a_wider_buffer_do_not_overlap(self):
        memory = torch.randn(5, 20)
        input, out = memory[:, :8], memory[:, 8:16]
        expected = torch.nn.functional.layer_norm(input, (8,))
        torch.testing.assert_close(layer_norm(input, (8,), out=out), expected)

    @pytest.mark.parametrize(
        ("input", "out"),
        [
            (lambda m: m.view(-1)[:40].view(5, 8), lambda m: m[:, :8]),  # different strides
            (lambda m: m[:, :8], lambda m: m.view(-1)[7:47].view(5, 8)),
            (lambda m: m.view(torch.bfloat16)[:, :8], lambda m: m[:, :8]),  # different dtypes
            (lambda m: m[:1, :8].expand(5, 8), lambda m: m[:, 4:12]),  # a row for all
        ],
    )
    def test_layouts_of_one_buffer_that_share_an_element(self, input, out):
        memory = torch.randn(5, 20)
        with pytest.raises(RuntimeError, match="memory location"):
            residual_add(input(memory), torch.randn(5, 8), residual_dtype=torch.float32, out=out(memory))

    @pytest.mark.parametrize(
        ("input", "out"),
        [
            (lambda m: m[:, 8:16], lambda m: m[:, :8]),
            (lambda m: m[0, 8:16].expand(5, 8), lambda m: m[:, :8]),  # a row in the other's gaps
            (lambda m: m[:, ::2][:, :8], lambda m: m[:, 1::2][:, :8]),  # interleaved
            (lambda m: m.view(torch.bfloat16)[:, 16:24], lambda m: m[:, :8]),
            (lambda m: m[:0, :8].expand(0, 8), lambda m: m[1:2, :8].expand(0, 8)),  # nothing at all
        ],
    )
    def test_layouts_of_one_buffer_that_share_nothing(self, input, out):
        memory = torch.randn(5, 20)
        input, out = input(memory), out(memory)
        residual = torch.randn(out.shape)
        expected = residual + input.clone()
        assert torch.equal(residual_add(input, residual, residual_dtype=torch.float32, out=out), expected)

    def test_results_that_share_a_buffer(self):
        buffer = torch.zeros(5, 20)
        for s in (buffer[:, 4:12], buffer[:, :8].as_strided((5, 8), (8, 1)), buffer[:1, :8].expand(5, 8)):
            with pytest.raises(RuntimeError, match=r"memory location|more than one element"):
                add_layer_norm(torch.randn(5, 8), torch.randn(5, 8), (8,), prenorm=True, out=(buffer[:, :8], s))

    def test_sizes_of_one_may_have_any_stride(self):
        x = torch.randn(8)
        row = x.as_strided((1, 8), (99, 1))
        expected = torch.nn.functional.layer_norm(row.clone(), (8,))
        torch.testing.assert_close(layer_norm(row, (8,), out=x.as_strided((1, 8), (8, 1))), expected)

    def test_an_out_whose_rows_are_one(self):
        for call in self.calls(torch.randn(5, 8), torch.randn(5, 8), torch.zeros(8).expand(5, 8)):
            with pytest.raises(RuntimeError, match="more than one element of the written-to tensor"):
                call()

    def test_both_results_in_one_place(self):
        out = torch.empty(5, 8)
        with pytest.raises(RuntimeError, match="memory location"):
            add_layer_norm(torch.randn(5, 8), torch.randn(5, 8), (8,), prenorm=True, out=(out, out))

    @pytest.mark.parametrize("name", ["weight", "bias", "input_bias"])
    def test_a_parameter_in_the_result(self, name):
        out = torch.randn(5, 8)
        with pytest.raises(RuntimeError, match="memory location"):
            add_layer_norm(torch.randn(5, 8), torch.randn(5, 8), (8,), **{name: out[2]}, out=out)

    def test_the_bias_of_an_activation_in_the_result(self):
        out = torch.randn(5, 8)
        with pytest.raises(RuntimeError, match="memory location"):
            bias_activation(torch.randn(5, 8), out[2], out=out)
