# SPDX-License-Identifier: BSD-3-Clause
"""Every kernel once, with few rows and all that it takes: quick enough to run under compute-sanitizer."""

from __future__ import annotations

import pytest
import torch
from operators.cases import ADD_LAYER_NORM, FULL_NORM_CASES
from operators.exactness import check_gradients, check_results, incoming_gradients
from operators.layouts import lay_out

from .device import ONE_OF_EACH, results_and_gradients, seed_at, to_cpu, to_device

pytestmark = pytest.mark.cuda

F32, BF16 = torch.float32, torch.bfloat16
CASES = [*FULL_NORM_CASES, ADD_LAYER_NORM[4]]  # the last with neither dropout nor input bias
TYPES = {  # the input's, and the stream's and parameters'
    "float32": (F32, F32, "contiguous"),
    "bfloat16": (BF16, BF16, "contiguous"),
    "bfloat16 in a float32 stream": (BF16, F32, "contiguous"),
    "bfloat16, offset": (BF16, BF16, "offset"),
}


@pytest.mark.parametrize("cols", [*ONE_OF_EACH, 768])
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("types", TYPES.values(), ids=TYPES.keys())
def test_forward_and_backward(types, case, cols):
    input_dtype, stream_dtype, layout = types
    inputs = case.make_inputs((3, cols), input_dtype, residual=stream_dtype, parameters=stream_dtype)
    grads = incoming_gradients(case, inputs)
    there = {name: lay_out(to_device(tensor), layout) for name, tensor in inputs.items()}
    grads_there = [lay_out(to_device(grad), layout) for grad in grads]
    results, gradients = to_cpu(results_and_gradients(case, there, grads_there))
    check_results(case, inputs, results)
    check_gradients(case, inputs, gradients, grads)
    with torch.no_grad():
        alone = case.ours(there, seed=seed_at(there))
    assert all(torch.equal(a.cpu(), b) for a, b in zip(alone, results, strict=True))
