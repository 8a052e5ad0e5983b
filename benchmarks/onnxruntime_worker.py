# SPDX-License-Identifier: BSD-3-Clause
"""onnxruntime's LayerNormalization and SkipLayerNormalization in a process of their own, started by bench_norm.py.

Its idle threads spin, and beside another library's every time doubles. It reads a case as JSON from each line of its
standard input and answers with a line of what it measured, or with null where it has no such operator for the CPU.
"""

from __future__ import annotations

import argparse
import json
import sys

import onnxruntime
import torch
from norm_operations import EPS, Case, Inputs, check, make_inputs
from onnx import TensorProto, helper
from timing import CpuTimer

_ELEMENTS = {"float32": TensorProto.FLOAT, "float16": TensorProto.FLOAT16}
_OPERATORS = {
    "layer_norm": {"op_type": "LayerNormalization", "inputs": ["x", "weight", "bias"]},
    "add_layer_norm": {
        "op_type": "SkipLayerNormalization",
        "inputs": ["x", "r", "weight", "bias"],
        "domain": "com.microsoft",
    },
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--samples", type=int, required=True)
    options = parser.parse_args()
    torch.set_num_threads(1)  # PyTorch makes the inputs and checks the outputs, and must not start threads
    timer = CpuTimer(options.samples)
    for line in sys.stdin:
        try:
            answer = measure(Case(**json.loads(line)), timer, options.threads)
        except Exception as error:  # one case less; the next may do
            answer = {"failed": f"{type(error).__name__}: {error}".splitlines()[0]}
        print(json.dumps(answer), flush=True)


def measure(case: Case, timer: CpuTimer, threads: int) -> dict[str, object] | None:
    if case.operation not in _OPERATORS or case.dtype not in _ELEMENTS or case.affine != "both":
        return None
    inputs = make_inputs(case, "cpu")
    output = torch.empty_like(inputs.x)
    session = _session(case, threads)
    binding = _bind(session, inputs, output)
    call = lambda: session.run_with_iobinding(binding)  # noqa: E731
    call()
    errors = check(case, inputs, output)
    measurement = timer.measure({"onnxruntime": call}, case.least_bytes())["onnxruntime"]
    return {**measurement.as_dict(), "errors": errors}


def _session(case: Case, threads: int) -> onnxruntime.InferenceSession:
    element, shape = _ELEMENTS[case.dtype], (case.rows, case.columns)
    operator = _OPERATORS[case.operation]
    shapes = {"weight": (case.columns,), "bias": (case.columns,)}
    values = [helper.make_tensor_value_info(name, element, shapes.get(name, shape)) for name in operator["inputs"]]
    node = helper.make_node(**operator, outputs=["y"], epsilon=EPS)
    graph = helper.make_graph([node], "norm", values, [helper.make_tensor_value_info("y", element, shape)])
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=8)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def _bind(session: onnxruntime.InferenceSession, inputs: Inputs, output: torch.Tensor) -> onnxruntime.IOBinding:
    """The tensors themselves are read and written: nothing is copied or allocated in a call."""
    binding = session.io_binding()
    for value in session.get_inputs():
        _place(binding.bind_input, value.name, getattr(inputs, value.name))
    _place(binding.bind_output, "y", output)
    return binding


def _place(bind, name: str, tensor: torch.Tensor) -> None:
    bind(name, "cpu", 0, tensor.numpy().dtype, tuple(tensor.shape), tensor.data_ptr())


if __name__ == "__main__":
    main()
