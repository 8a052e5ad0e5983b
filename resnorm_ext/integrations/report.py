# SPDX-License-Identifier: BSD-3-Clause
"""``report(model)``: what is replaced in a model, what is not and why, and which way its calls took."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import nn

from ..build.extension import extension
from ..engine.linear import LinearShape, product_dtype
from ..modules.calls import calls_of
from ..modules.padding import PaddingChoice
from .accelerate import FAMILIES, findings, linear_shapes, module_of
from .replace import Finding, is_replaced, original_class

KNOWN = f"torch.nn's encoder and transformers' models of the types {', '.join(FAMILIES)}"
_MOST_LINES = 8  # of a kind: all of it is to fit a screen


class Replaced(NamedTuple):
    """A module that ``accelerate`` has replaced.

    Attributes:
        reason: what keeps it from its fastest path at present, whatever the call.
        calls: how many of its calls took which path, by path and the reason why it was not the fastest.
        last: path and reason of the last call; None where there was none.
        padding: its choice, where it has one.
    """

    name: str
    original: type[nn.Module]
    replacement: type[nn.Module]
    reason: str | None
    calls: dict[tuple[str, str | None], int] = {}  # noqa: RUF012
    last: tuple[str, str | None] | None = None
    padding: str | None = None


class LeftAlone(NamedTuple):
    """A module that looks like what ``accelerate`` is for, and is not replaced."""

    name: str
    type: type[nn.Module]
    reason: str


class Report(NamedTuple):
    """What is replaced in a model and what is not; ``str()`` of it is for people.

    Attributes:
        linear_backends: what multiplies in inference for each shape of linear layer.
    """

    replaced: list[Replaced]
    left_alone: list[LeftAlone]
    linear_backends: dict[LinearShape, str]

    def __str__(self) -> str:
        lines = [f"replaced: {len(self.replaced)} modules"]
        lines += _grouped((item.original.__name__, item.reason, item.name) for item in self.replaced)
        if self.replaced and all(item.original is nn.LayerNorm for item in self.replaced):
            lines.append(f"  LayerNorm alone gains next to nothing; known encoders are {KNOWN}")
        lines += _section("calls:", self._call_lines())
        lines += _section("padding:", self._padding_lines())
        lines.append(f"left alone: {len(self.left_alone)} modules")
        lines += _grouped((item.type.__name__, item.reason, item.name) for item in self.left_alone)
        lines += _section("linear layers:", self._linear_lines())
        return "\n".join(lines)

    def as_dict(self) -> dict[str, list[dict[str, object]]]:
        """The same of numbers, strings, lists and dicts, which JSON holds."""

        def called(item: Replaced) -> list[dict[str, object]]:
            return [{"path": path, "reason": why, "calls": count} for (path, why), count in item.calls.items()]

        return {
            "replaced": [
                {
                    "name": item.name,
                    "original": item.original.__name__,
                    "reason": item.reason,
                    "calls": called(item),
                    "padding": item.padding,
                }
                for item in self.replaced
            ],
            "left_alone": [
                {"name": item.name, "type": item.type.__name__, "reason": item.reason} for item in self.left_alone
            ],
            "linear_layers": [
                {"in": shape.in_features, "out": shape.out_features, "dtype": _short(shape.dtype), "backend": backend}
                for shape, backend in self.linear_backends.items()
            ],
        }

    def _call_lines(self) -> list[str]:
        counts: Counter[tuple[str, str, str | None]] = Counter()
        last = set()
        called = [item for item in self.replaced if item.last is not None]
        for item in called:
            for (path, reason), count in item.calls.items():
                counts[item.original.__name__, path, reason] += count
            # A layer's own calls are those in which its encoder has called it by itself.
            if not any(_is_inside(item.name, outer.name) for outer in called):
                last.add((item.original.__name__, *item.last))
        return [
            f"{kind}: {count} {path}"
            + ("" if reason is None else f", because {reason}")
            + (" (the last call)" if (kind, path, reason) in last else "")
            for (kind, path, reason), count in sorted(counts.items(), key=lambda each: -each[1])
        ]

    def _padding_lines(self) -> list[str]:
        choices = dict.fromkeys((item.original, item.padding) for item in self.replaced if item.padding is not None)
        return [f"{original.__name__}: {_PADDING[padding](original)}" for original, padding in choices]

    def _linear_lines(self) -> list[str]:
        lines = []
        for shape, backend in self.linear_backends.items():
            multiplied = product_dtype([shape])
            backend = backend if multiplied == shape.dtype else f"{_short(multiplied)}, by {backend}"
            lines.append(f"{shape.in_features} -> {shape.out_features} {_short(shape.dtype)}: {backend}")
        return lines


def _auto(original: type[nn.Module]) -> str:
    if original is nn.TransformerEncoderLayer:
        return 'computed ("auto"), as torch.nn does; "skip" would save the time and leave zeros there'
    if original is nn.TransformerEncoder:
        return (
            'skipped in inference where torch.nn would take nested tensors ("auto"), with zeros there; else computed, '
            'which "skip" would save'
        )
    return (
        'skipped without grad, with zeros, but where a loss reads it ("auto"); "skip" trains without it too, "compute" '
        "is as the original does"
    )


_PADDING = {
    "auto": _auto,
    "skip": lambda _: 'skipped wherever that can be done ("skip"), with zeros there; "compute" is as the original does',
    "compute": lambda _: 'computed ("compute"), as the original does; "skip" would save the time and leave zeros there',
}


def report(model: object) -> Report:
    """What is replaced in ``model`` as it is now, what is not and why, and how its calls went since ``accelerate``.

    Raises TypeError as ``accelerate`` does.
    """
    module = module_of(model)
    found = findings(module)
    replaced, left_alone = [], []
    for name, each, replacement, reason in found:
        if is_replaced(each):
            calls = calls_of(each)
            counts, last = ({}, None) if calls is None else (dict(calls.counts), calls.last)
            padding = each.padding if isinstance(each, PaddingChoice) else None
            replaced.append(Replaced(name, original_class(each), type(each), reason, counts, last, padding))
        elif replacement is not None:
            left_alone.append(LeftAlone(name, type(each), "accelerate() has not been called"))
        else:
            left_alone.append(LeftAlone(name, type(each), reason))
    left_alone += _unknown_layers(module, found)
    backends = {}
    for shape in dict.fromkeys(linear_shapes(module)) if replaced else ():
        backends[shape] = extension.linear_backend(product_dtype([shape]), shape.in_features, shape.out_features)
    return Report(replaced, left_alone, backends)


def _unknown_layers(model: nn.Module, found: list[Finding]) -> list[LeftAlone]:
    """What looks like the layers of an encoder that is not known: where there is attention, and nothing is found around
    it."""
    modules = dict(model.named_modules())
    known = {finding.name for finding in found}
    layers: dict[str, nn.Module] = {}
    for name, module in modules.items():
        above = [name, *_parents(name)]
        if "Attention" in type(module).__name__ and not known.intersection(above):
            in_list = (each for each in above if isinstance(modules.get(_parent(each)), nn.ModuleList))
            layer = next(in_list, name)
            layers.setdefault(layer, modules[layer])
    return [LeftAlone(name, type(layer), f"not known; known are {KNOWN}") for name, layer in layers.items()]


def _is_inside(name: str, outer: str) -> bool:
    return name != outer and (not outer or name.startswith(f"{outer}."))


def _parent(name: str) -> str | None:
    return name.rpartition(".")[0] if name else None


def _parents(name: str) -> Iterable[str]:
    while name := name.rpartition(".")[0]:
        yield name
    yield ""


def _section(title: str, lines: list[str]) -> list[str]:
    if not lines:
        return []
    more = [f"  and {len(lines) - _MOST_LINES} more"] if len(lines) > _MOST_LINES else []
    return [title, *(f"  {line}" for line in lines[:_MOST_LINES]), *more]


def _grouped(items: Iterable[tuple[str, str | None, str]]) -> list[str]:
    """A line for each kind of module and reason, with how many and the first one's name."""
    groups: dict[tuple[str, str | None], list[str]] = {}
    for kind, reason, name in items:
        groups.setdefault((kind, reason), []).append(name or "the model")
    lines = [
        f"{kind} x {len(names)} ({names[0]}{', ...' if len(names) > 1 else ''})" + (f": {reason}" if reason else "")
        for (kind, reason), names in groups.items()
    ]
    return _section("", lines)[1:]


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
