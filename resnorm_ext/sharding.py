# SPDX-License-Identifier: BSD-3-Clause
"""How DTensor shards the operators: one table says which axes their tensors have, and all rules follow from it.

Nothing here imports DTensor before a call meets one.
"""

from __future__ import annotations

import dataclasses
import logging
import sys
from collections.abc import Sequence
from functools import cache, partial

import torch

from .build.extension import ensure_loaded

_log = logging.getLogger(__name__)

# The axes of an operator's tensor arguments, then of its results. "*" stands for any number of leading axes, "n" for
# those of normalized_shape, another letter for one axis. A tensor argument that is not named is a scalar.
_AXES = {
    "layer_norm": "input *n, weight n, bias n -> *n",
    "rms_norm": "input *n, weight n -> *n",
    "residual_add": "input *d, residual *d, input_bias d -> *d",
    "_residual_add_backward": "grad_output *d, input_bias d -> *d, d",
    "add_layer_norm": "input *n, residual *n, weight n, bias n, input_bias n -> *n, *n",
    "add_rms_norm": "input *n, residual *n, weight n, input_bias n -> *n, *n",
    "_norm_forward": "input *n, residual *n, input_bias n, weight n, bias n -> *n, *n, *, *",
    "_norm_backward": "grad_output *n, grad_sum *n, sum *n, mean *, rstd *, input_bias n, weight n, bias n "
    "-> *n, *n, n, n, n",
    "bias_activation": "input *d, bias d -> *d",
    "_bias_activation_backward": "grad_output *d, input *d, bias d -> *d, d, *d",
    "linear": "input *i, weight oi, bias o -> *o",
    "feed_forward": "input *i, weight1 fi, bias1 f, weight2 of, bias2 o -> *o",
    "packed_attention": "qkv tqhe, cu_seqlens s -> the",
    "_packed_attention_forward": "qkv tqhe, cu_seqlens s -> the, th",
    "_packed_attention_backward": "grad_output the, qkv tqhe, output the, logsumexp th, cu_seqlens s -> tqhe",
}
# Besides the leading axes, those that a device can have a part of: along the others a result needs the whole. Where a
# result lacks such an axis, as the gradients of parameters lack the leading ones, each device has a part of the sum.
_SHARDABLE = "doh"


def is_dtensor(value: object) -> bool:
    """Whether ``value`` is a DTensor; imports nothing."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(value, module.DTensor)


@cache
def register_rules() -> bool:
    """Tells DTensor the rules: an input may be sharded along every dimension that results are independent in.

    Parameters are then replicated, or sharded along the dimension that they share with the input, and gradients of
    parameters are Partial where rows are sharded. DTensor redistributes what is laid out in another way. With dropout
    that is every sharded input: the mask is a function of the seed and of the position in the whole tensor.

    ``resnorm_ext.functional`` calls this when it meets a DTensor; call it before handing DTensors to
    ``torch.ops.resnorm`` itself.

    Returns whether it could: a PyTorch may take rules in another way.
    """
    ensure_loaded()
    try:
        from torch.distributed.tensor import DTensor
        from torch.distributed.tensor.experimental import register_sharding

        infos = DTensor._op_dispatcher.sharding_propagator.op_to_schema_info
        for name in _AXES:
            operator = getattr(torch.ops.resnorm, name).default
            register_sharding(operator)(partial(_layouts, operator._schema))
            # DTensor keeps what it finds out about a call under the call's tensors and its arguments from
            # static_argnum on. By itself it takes integers into account, but normalized_shape and output_mask matter.
            infos[operator] = dataclasses.replace(infos[operator], static_argnum=1)
    except (AttributeError, ImportError, KeyError, TypeError) as error:
        _log.warning(
            "DTensors are computed by torch's own functions, because it does not take sharding rules: %r", error
        )
        return False
    return True


def _layouts(schema: torch.FunctionSchema, *args: object) -> list[tuple[list, list]]:
    """The placements of results and of tensor arguments, on one dimension of a mesh, that need no communication.

    ``args`` are those of a call, without trailing defaults, and with DTensor's descriptions in the place of tensors.
    """
    from torch.distributed.tensor import Partial, Replicate, Shard

    given = {argument.name: argument.default_value for argument in schema.arguments}
    given |= zip(list(given), args, strict=False)
    arguments, results = _axes(schema.name.removeprefix("resnorm::"))
    tensors = [arguments.get(name, "") for name, value in given.items() if hasattr(value, "placements")]
    layouts = [([Replicate()] * len(results), [Replicate()] * len(tensors))]
    first, axes = next(iter(arguments.items()))
    trailing = len(given["normalized_shape"]) if "n" in axes else len(axes.lstrip("*"))
    if given.get("seed") is not None or given[first].ndim < trailing:
        return layouts

    wanted = _wanted(given, len(results))
    rows = range(given[first].ndim - trailing)
    for axis in (*rows, *_SHARDABLE):
        in_tensors, in_results = ([_dim(axes, axis, rows) for axes in each] for each in (tensors, results))
        if any(dim is not None for dim in in_tensors):
            computed = [
                Replicate() if not is_wanted else Partial() if dim is None else Shard(dim)
                for dim, is_wanted in zip(in_results, wanted, strict=True)
            ]
            layouts.append((computed, [Replicate() if dim is None else Shard(dim) for dim in in_tensors]))
    return layouts


@cache
def _axes(name: str) -> tuple[dict[str, str], list[str]]:
    """The axes of operator ``name``'s tensor arguments and of its results."""
    arguments, results = _AXES[name].split(" -> ")
    return dict(argument.split(" ") for argument in arguments.split(", ")), results.split(", ")


def _dim(axes: str, axis: int | str, rows: range) -> int | None:
    """Which dimension of a tensor of these ``axes``, whose leading ones are ``rows``, ``axis`` is; None if none."""
    names = [*rows, *axes[1:]] if axes.startswith("*") else [*axes]
    return names.index(axis) if axis in names else None


def _wanted(given: dict[str, object], results: int) -> Sequence[bool]:
    """Which of an operator's results are asked for: the others are empty, or none."""
    if "output_mask" in given:
        return given["output_mask"]
    if "wants_sum" in given:
        adds, centered = given["residual"] is not None, given["centered"]
        statistics = given["wants_statistics"]
        return [True, given["wants_sum"] and adds, statistics and centered, statistics]
    return [True, *[given.get("prenorm", True)] * (results - 1)]
