# SPDX-License-Identifier: BSD-3-Clause
"""LayerNorm and residual-add in one pass over memory, and the Transformer encoder around them, for PyTorch.

``accelerate(model)`` puts it to work in a model you have; ``restore(model)`` takes it out again; ``report(model)`` says
what was replaced. ``functional`` holds the operators, the modules below have torch.nn's signatures and checkpoints.
"""

try:
    import torch  # noqa: F401
except ModuleNotFoundError as error:
    if error.name != "torch":
        raise
    message = "resnorm_ext is an extension of PyTorch, which is not installed here; type: pip install torch"
    raise ModuleNotFoundError(message, name="torch") from None

from . import functional
from .build.config import VERSION as __version__
from .build.extension import load_if_built
from .engine.workspace import free_workspaces
from .integrations import accelerate, refresh, report, restore
from .integrations.quantization import register_for_quantization
from .modules import (
    AddLayerNorm,
    AddRMSNorm,
    FeedForward,
    LayerNorm,
    RMSNorm,
    SelfAttention,
    TransformerEncoder,
    TransformerEncoderLayer,
)

__all__ = [
    "AddLayerNorm",
    "AddRMSNorm",
    "FeedForward",
    "LayerNorm",
    "RMSNorm",
    "SelfAttention",
    "TransformerEncoder",
    "TransformerEncoderLayer",
    "__version__",
    "accelerate",
    "free_workspaces",
    "functional",
    "refresh",
    "report",
    "restore",
]

load_if_built()
register_for_quantization()
