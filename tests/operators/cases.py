# SPDX-License-Identifier: BSD-3-Clause
"""The norm operators, bias_activation and their options, as one table that the tests are parametrised over.

A case knows how to make its inputs, how to call the operator and how to call the formula of ``resnorm_ext.reference``.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from resnorm_ext import functional, reference

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
HALVES = (torch.bfloat16, torch.float16)
TORCH_ACTIVATIONS = {"relu": F.relu, "gelu": F.gelu, "gelu_tanh": partial(F.gelu, approximate="tanh")}
SEED = torch.tensor(0x1234_5678_9ABC_DEF)
EPS = 1e-5

Inputs = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    operator: str
    optional: tuple[str, ...] = ()  # which of weight, bias, input_bias are there
    dropout_p: float = 0.0
    prenorm: bool = False
    activation: str | None = None

    def __str__(self) -> str:
        dropout = ["dropout"] if self.dropout_p else []
        activation = [self.activation] if self.activates else []
        prenorm = ["prenorm"] if self.prenorm else []
        return "-".join([self.operator, *activation, *self.optional, *dropout, *prenorm])

    @property
    def normalizes(self) -> bool:
        return self.operator.endswith("_norm")

    @property
    def centered(self) -> bool:
        """Whether a norm takes the mean off."""
        return self.operator.endswith("layer_norm")

    @property
    def adds(self) -> bool:
        return self.operator == "residual_add" or self.operator.startswith("add_")

    @property
    def activates(self) -> bool:
        return self.operator == "bias_activation"

    @property
    def drops(self) -> bool:
        """Whether it has dropout."""
        return self.adds or self.activates

    @property
    def outputs(self) -> tuple[str, ...]:
        if self.operator == "residual_add":
            return ("s",)
        return ("y", "s") if self.prenorm else ("y",)

    def make_inputs(
        self,
        shape: tuple[int, ...],
        dtype: torch.dtype = torch.float32,
        *,
        normalized_dims: int = 1,
        residual: torch.dtype | None = None,
        parameters: torch.dtype | None = None,
        seed: int = 0,
    ) -> Inputs:
        """Random tensors by argument name; ``residual`` and ``parameters`` are dtypes, ``dtype`` where None."""
        generator = torch.Generator().manual_seed(seed)
        row = shape[len(shape) - (normalized_dims if self.normalizes else 1) :]

        def random(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
            return torch.randn(shape, dtype=torch.float64, generator=generator).to(dtype)

        inputs = {"input": random(shape, dtype)}
        if self.adds:
            inputs["residual"] = random(shape, residual or dtype)
        return inputs | {name: random(row, parameters or dtype) for name in self.optional}

    def ours(self, inputs: Inputs, *, normalized_dims: int = 1, seed: Tensor = SEED, **options) -> tuple[Tensor, ...]:
        """The operator's results, ``self.outputs``; ``options`` are more keyword arguments, as ``eps`` or ``out``."""
        if self.drops:
            options |= {"dropout_p": self.dropout_p, "training": True, "seed": seed}
        if self.adds and self.normalizes:
            options |= {"prenorm": self.prenorm}
        options = self._fixed_options(inputs, normalized_dims) | options
        result = getattr(functional, self.operator)(**inputs, **options)
        return result if isinstance(result, tuple) else (result,)

    def reference(
        self, inputs: Inputs, *, normalized_dims: int = 1, seed: Tensor = SEED, **options
    ) -> tuple[Tensor, ...]:
        """What ``ours`` should give, in the dtype of ``inputs``."""
        if self.drops:
            options |= {"dropout_p": self.dropout_p, "seed": seed}
        options = self._fixed_options(inputs, normalized_dims) | options
        result = getattr(reference, self.operator)(**inputs, **options)
        return result[: len(self.outputs)] if isinstance(result, tuple) else (result,)

    def _fixed_options(self, inputs: Inputs, normalized_dims: int) -> dict:
        """Those that operator and formula have in common."""
        if self.activates:
            return {"activation": self.activation}
        if not self.normalizes:
            return {}
        # The default eps of an RMS norm is that of the dtype, in which operator and formula differ.
        eps = {} if self.centered else {"eps": EPS}
        return {"normalized_shape": inputs["input"].shape[inputs["input"].dim() - normalized_dims :], **eps}


LAYER_NORM = [Case("layer_norm", optional) for optional in [(), ("weight",), ("bias",), ("weight", "bias")]]
RESIDUAL_ADD = [Case("residual_add", optional, p) for optional in [(), ("input_bias",)] for p in (0.0, 0.3)]
ADD_LAYER_NORM = [
    Case("add_layer_norm", optional, p, prenorm)
    for optional, p, prenorm in [
        ((), 0.0, False),
        (("weight",), 0.0, True),
        (("bias",), 0.3, False),
        (("weight", "bias"), 0.0, False),
        (("weight", "bias"), 0.0, True),
        (("weight", "bias"), 0.3, True),
        (("input_bias",), 0.0, True),
        (("weight", "bias", "input_bias"), 0.0, False),
        (("weight", "bias", "input_bias"), 0.3, False),
        (("weight", "bias", "input_bias"), 0.3, True),
    ]
]
RMS_NORM = [Case("rms_norm", optional) for optional in [(), ("weight",)]]
ADD_RMS_NORM = [
    Case("add_rms_norm", optional, p, prenorm)
    for optional, p, prenorm in [
        ((), 0.0, True),
        (("weight",), 0.0, False),
        (("weight",), 0.3, True),
        (("weight", "input_bias"), 0.0, True),
        (("weight", "input_bias"), 0.3, True),
    ]
]
BIAS_ACTIVATION = [
    Case("bias_activation", optional, p, activation=activation)
    for optional, p in [((), 0.0), ((), 0.3), (("bias",), 0.0), (("bias",), 0.3)]
    for activation in ("relu", "gelu_tanh", "gelu")
]
NORM_CASES = LAYER_NORM + RESIDUAL_ADD + ADD_LAYER_NORM + RMS_NORM + ADD_RMS_NORM
CASES = NORM_CASES + BIAS_ACTIVATION
# One case for each operator, with all that it takes.
FULL_NORM_CASES = [LAYER_NORM[-1], RESIDUAL_ADD[-1], ADD_LAYER_NORM[-1], RMS_NORM[-1], ADD_RMS_NORM[-1]]
FULL_CASES = [*FULL_NORM_CASES, BIAS_ACTIVATION[-1]]


def to_double(inputs: Inputs) -> Inputs:
    return {name: tensor.detach().double() for name, tensor in inputs.items()}


def require_grad(inputs: Inputs, names: tuple[str, ...] | None = None) -> Inputs:
    """Leaves of the same strides, of which ``names`` (all where None) require grad."""
    return {name: t.detach().requires_grad_(names is None or name in names) for name, t in inputs.items()}


def accumulation(*dtypes: torch.dtype) -> torch.dtype:
    return torch.float64 if torch.float64 in dtypes else torch.float32


def eps_of(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps
