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
    for operator in ("resnorm::layer_norm", "resnorm::_layer_norm_forward"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(operator, "CUDA") == built


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(0, 8), (3, 1), (5, 33), (2, 7, 768), (1, 5000)])
def test_layer_norm_forward(dtype: torch.dtype, shape: tuple[int, ...]):
    torch.manual_seed(0)
    wide = torch.randn(*shape[:-1], shape[-1] + 3, device="cuda").to(dtype)
    input = wide[..., 1:-2]
    weight, bias = torch.randn(2, shape[-1], device="cuda").to(dtype)
    actual = functional.layer_norm(input, shape[-1:], weight, bias)
    expected = reference.layer_norm(input.double(), shape[-1:], weight.double(), bias.double())
    torch.testing.assert_close(actual, expected.to(dtype))
