# SPDX-License-Identifier: BSD-3-Clause
"""BERT by every engine: from a directory of Hugging Face's to a function of a tokenized batch.

Each engine is set up as its own documentation has it for one stream of requests on a CPU.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

Encode = Callable[[dict[str, Tensor]], Tensor]  # last_hidden_state, (texts, length, dim), of a padded batch

ORIGINAL = "Hugging Face"
INPUTS = ("input_ids", "attention_mask", "token_type_ids")


def original(path: Path, dtype: torch.dtype, threads: int) -> Encode:
    model = _model(path, dtype)
    return lambda batch: model(**batch).last_hidden_state


def ours(path: Path, dtype: torch.dtype, threads: int) -> Encode:
    import resnorm_ext

    model = resnorm_ext.accelerate(_model(path, dtype))
    return lambda batch: model(**batch).last_hidden_state


def compiled(path: Path, dtype: torch.dtype, threads: int) -> Encode:
    import torch._inductor.config

    torch._inductor.config.freezing = True
    model = torch.compile(_model(path, dtype), dynamic=True)
    return lambda batch: model(**batch).last_hidden_state


def zentorch(path: Path, dtype: torch.dtype, threads: int) -> Encode:
    import torch._inductor.config
    import zentorch  # noqa: F401  registers its backend

    torch._inductor.config.freezing = True
    model = torch.compile(_model(path, dtype), backend="zentorch", dynamic=True)
    return lambda batch: model(**batch).last_hidden_state


def openvino(path: Path, dtype: torch.dtype, threads: int) -> Encode:
    import openvino

    settings = {
        "INFERENCE_NUM_THREADS": threads,
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": {torch.float32: "f32", torch.bfloat16: "bf16"}[dtype],
    }
    converted = openvino.convert_model(_HiddenState(path), example_input=tuple(_example().values()))
    model = openvino.compile_model(converted, "CPU", settings)

    def encode(batch: dict[str, Tensor]) -> Tensor:
        outputs = model([batch[name].numpy() for name in INPUTS])
        return torch.from_numpy(outputs[0])

    return encode


def onnxruntime(path: Path, dtype: torch.dtype, threads: int) -> Encode:
    """With the graph that its own optimizer fuses."""
    import onnxruntime
    from onnxruntime.transformers import optimizer

    if dtype != torch.float32:
        raise NotImplementedError("onnxruntime's fused attention takes float32 on a CPU")
    with tempfile.TemporaryDirectory() as directory:
        exported, fused = (str(Path(directory, name)) for name in ("exported.onnx", "fused.onnx"))
        hidden_state = _HiddenState(path, attention="eager")  # whose pattern the optimizer knows
        axes = {name: {0: "texts", 1: "length"} for name in (*INPUTS, "last_hidden_state")}
        torch.onnx.export(
            hidden_state,
            tuple(_example().values()),
            exported,
            input_names=list(INPUTS),
            output_names=["last_hidden_state"],
            dynamic_axes=axes,
            opset_version=17,
            dynamo=False,
        )
        config = hidden_state.model.config
        sizes = {"num_heads": config.num_attention_heads, "hidden_size": config.hidden_size}
        model = optimizer.optimize_model(exported, "bert", opt_level=0, **sizes)
        print(model.get_fused_operator_statistics())
        model.save_model_to_file(fused)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        session = onnxruntime.InferenceSession(fused, options, providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_inputs()]

    def encode(batch: dict[str, Tensor]) -> Tensor:
        return torch.from_numpy(session.run(None, {name: batch[name].numpy() for name in names})[0])

    return encode


def ctranslate2(path: Path, dtype: torch.dtype, threads: int) -> Encode:
    import ctranslate2
    import numpy

    compute_type = {torch.float32: "float32", torch.bfloat16: "bfloat16"}[dtype]
    with tempfile.TemporaryDirectory() as directory:
        target = str(Path(directory, "model"))
        ctranslate2.converters.TransformersConverter(str(path)).convert(target)
        model = ctranslate2.Encoder(target, intra_threads=threads, compute_type=compute_type)

    def encode(batch: dict[str, Tensor]) -> Tensor:
        lengths = batch["attention_mask"].sum(1).tolist()
        ids = [row[:length] for row, length in zip(batch["input_ids"].tolist(), lengths, strict=True)]
        output = model.forward_batch(ids).last_hidden_state
        if dtype == torch.bfloat16:
            output = output.to_dtype(ctranslate2.DataType.float32)
        return torch.from_numpy(numpy.array(output))

    return encode


# Name, function, the package that it needs.
ENGINES: dict[str, tuple[Callable[[Path, torch.dtype, int], Encode], str]] = {
    "resnorm_ext": (ours, "resnorm_ext"),
    ORIGINAL: (original, "transformers"),
    "torch.compile": (compiled, "torch"),
    "OpenVINO": (openvino, "openvino"),
    "ONNX Runtime": (onnxruntime, "onnxruntime"),
    "CTranslate2": (ctranslate2, "ctranslate2"),
    "zentorch": (zentorch, "zentorch"),
}


def _model(path: Path, dtype: torch.dtype, attention: str = "sdpa") -> nn.Module:
    from transformers import AutoModel

    return AutoModel.from_pretrained(path, dtype=dtype, attn_implementation=attention).eval()


class _HiddenState(nn.Module):
    """The model as a function of tensors, for what exports it."""

    def __init__(self, path: Path, attention: str = "sdpa") -> None:
        super().__init__()
        self.model = _model(path, torch.float32, attention)
        self.eval()

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor) -> Tensor:
        return self.model(input_ids, attention_mask, token_type_ids).last_hidden_state


def _example() -> dict[str, Tensor]:
    """Two texts, of which one is padded: what all engines take for the general case."""
    mask = torch.ones(2, 8, dtype=torch.int64)
    mask[1, 5:] = 0
    return dict(zip(INPUTS, (torch.full((2, 8), 7), mask, torch.zeros(2, 8, dtype=torch.int64)), strict=True))
