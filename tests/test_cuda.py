# SPDX-License-Identifier: BSD-3-Clause
from __future__ import annotations

from pathlib import Path

import pytest
import torch

from resnorm_ext import _extension, functional, reference


@pytest.mark.smoke
def test_kernels_are_registered_exactly_where_they_were_built():
    library = Path(_extension.load_extension().__file__)
    built = _extension.read_info(library)["cuda"] is not None
    assert built == (_extension.extension.build_info()["cuda"] is not None)
    for norm in ("layer_norm", "add_layer_norm"):
        for operator in (norm, f"{norm}_out", f"_{norm}_forward", f"_{norm}_backward"):
            assert torch._C._dispatch_has_kernel_for_dispatch_key(f"resnorm::{operator}", "CUDA") == built


DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
# Parts of a warp, warps, blocks, clusters, and rows beyond them; odd sizes.
SHAPES = [(0, 8), (3, 1), (5, 33), (2, 7, 768), (40, 1024), (3, 5000), (2, 20000), (1, 300001)]


def assert_close(actual: torch.Tensor, expected: torch.Tensor, roundings: float = 4.0) -> None:
    tolerance = roundings * torch.finfo(actual.dtype).eps
    scale = expected.abs().max().item() if expected.numel() else 1.0
    torch.testing.assert_close(actual.double(), expected.double(), rtol=tolerance, atol=tolerance * max(scale, 1.0))


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_layer_norm_forward(dtype: torch.dtype, shape: tuple[int, ...]):
    torch.manual_seed(0)
    wide = torch.randn(*shape[:-1], shape[-1] + 3, device="cuda").to(dtype)
    input = wide[..., 1:-2]
    weight, bias = torch.randn(2, shape[-1], device="cuda").to(dtype)
    actual = functional.layer_norm(input, shape[-1:], weight, bias)
    expected = reference.layer_norm(input.double(), shape[-1:], weight.double(), bias.double())
    torch.testing.assert_close(actual, expected.to(dtype))


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_add_layer_norm_and_its_gradients_are_the_cpus(dtype: torch.dtype, shape: tuple[int, ...], dropout_p: float):
    torch.manual_seed(0)
    names = ("input", "residual", "weight", "bias", "input_bias")
    on_cpu = [torch.randn(shape, dtype=dtype) for _ in range(2)] + [
        torch.randn(shape[-1], dtype=dtype) for _ in range(3)
    ]
    grads = [torch.randn(shape, dtype=dtype) for _ in range(2)]
    results = {}
    for device in ("cpu", "cuda"):
        leaves = [tensor.to(device).requires_grad_() for tensor in on_cpu]
        input, residual, weight, bias, input_bias = leaves
        outputs = functional.add_layer_norm(
            *(input, residual, shape[-1:], weight, bias),
            input_bias=input_bias,
            dropout_p=dropout_p,
            training=True,
            seed=torch.tensor(1234, device=device),
            prenorm=True,
        )
        gradients = torch.autograd.grad(outputs, leaves, [grad.to(device) for grad in grads])
        results[device] = [tensor.cpu() for tensor in (*outputs, *gradients)]
    for name, actual, expected in zip(("y", "s", *names), results["cuda"], results["cpu"], strict=True):
        summed = name in ("weight", "bias", "input_bias") and expected.dtype in (torch.float32, torch.float64)
        assert_close(actual, expected, roundings=64.0 if summed else 8.0)


@pytest.mark.cuda
def test_gradients_in_float64():
    x, r = torch.randn(2, 3, 40, dtype=torch.float64, device="cuda").requires_grad_().unbind()
    weight, bias = torch.randn(2, 40, dtype=torch.float64, device="cuda").requires_grad_().unbind()
    function = lambda *leaves: functional.add_layer_norm(leaves[0], leaves[1], (40,), *leaves[2:], prenorm=True)  # noqa: E731
    leaves = [tensor.detach().requires_grad_() for tensor in (x, r, weight, bias)]
    assert torch.autograd.gradcheck(function, leaves)
    assert torch.autograd.gradgradcheck(function, leaves)


@pytest.mark.cuda
def test_a_captured_graph_draws_a_new_mask_with_each_replay():
    x, r = torch.ones(2, 4096, device="cuda"), torch.zeros(2, 4096, device="cuda")
    call = lambda: functional.residual_add(x, r, dropout_p=0.5, training=True)  # noqa: E731
    call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = call()
    masks = []
    for _ in range(2):
        graph.replay()
        masks.append(output.clone())
    assert not torch.equal(*masks)
