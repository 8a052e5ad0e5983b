# SPDX-License-Identifier: BSD-3-Clause
"""What the norms are to reach, and how that is read off the results."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from norm_contenders import WITH_BOTH
from results import COPY, OURS, Cell, Configuration, geometric_mean

BEYOND_CACHE_BYTES = 30e6
H100, H100_COPY = "H100 80GB HBM3", 3.0e12  # the card that figures are asked of, and its copy, bytes per second

K = 1024
REGULAR = (768, *(1 << bits for bits in range(8, 18)))
AWKWARD = (760, 1000, 1128, 3840, 5120, 12288, 20480)
ODD = (761, 1001, 4095)
F32, BF16, F16 = "float32", "bfloat16", "float16"

Reading = Callable[[Configuration], list[float]]


@dataclass(frozen=True)
class Goal:
    what: str
    target: float
    unit: str
    read: Reading  # one figure for each cell that was measured
    summary: Callable[[list[float]], float] = min
    at_most: bool = False
    scales: bool = False  # with the device's bandwidth

    def target_for(self, configuration: Configuration) -> float:
        environment = configuration.environment
        if not self.scales or H100 in environment["hardware"]:
            return self.target
        return self.target * environment["large_copy_bytes_per_second"] / H100_COPY

    def measured(self, configuration: Configuration) -> float | None:
        figures = self.read(configuration)
        return self.summary(figures) if figures else None

    def reached(self, configuration: Configuration) -> bool | None:
        """None where it was not measured."""
        measured, target = self.measured(configuration), self.target_for(configuration)
        if measured is None:
            return None
        return measured <= target if self.at_most else measured >= target


def goals_for(configuration: Configuration) -> list[Goal]:
    environment = configuration.environment
    if environment["suite"] != "norm":
        return []
    if environment["device"] == "cuda":
        return CUDA
    if environment["allocator"] == "default":  # its figures are there to be seen
        return []
    return CPU_AVX2 if environment["isa"] == "avx2" else CPU


def of_cells(figure: Callable[[Cell], float | None], beyond_cache: bool | None = None, **case: object) -> Reading:
    """A figure of every cell whose case agrees."""

    def read(configuration: Configuration) -> list[float]:
        cells = configuration.select(**{"affine": "both"} | case)
        if beyond_cache is not None:
            cells = [cell for cell in cells if (cell.least_bytes() > BEYOND_CACHE_BYTES) == beyond_cache]
        return [value for cell in cells if (value := figure(cell)) is not None]

    return read


def against_other_case(figure: Callable[[float, float], float], other: dict[str, object], **case: object) -> Reading:
    """A figure of our seconds in each case and in the one that differs from it by ``other``."""

    def read(configuration: Configuration) -> list[float]:
        pairs = [
            (cell.measured(OURS), counterpart.measured(OURS))
            for cell in configuration.select(**case)
            for counterpart in configuration.select(**{**cell.case, **other})
        ]
        return [figure(*pair) for pair in pairs if None not in pair]

    return read


def over_neighbours(configuration: Configuration) -> list[float]:
    """Bandwidth at an awkward size over that on the straight line between the regular sizes beside it."""
    points = {
        cell.case["columns"]: bandwidth
        for cell in configuration.select(operation="layer_norm", dtype=BF16, rows=32 * K, affine="both")
        if (bandwidth := cell.bandwidth())
    }
    ratios = []
    for columns in set(AWKWARD) & set(points):
        low = max((n for n in REGULAR if n < columns and n in points), default=None)
        high = min((n for n in REGULAR if n > columns and n in points), default=None)
        if low and high:
            line = points[low] + (points[high] - points[low]) * (columns - low) / (high - low)
            ratios.append(points[columns] / line)
    return ratios


def gradient_errors(configuration: Configuration) -> list[float]:
    """PyTorch's relative error of a bfloat16 weight gradient over ours."""
    return [
        run["torch"]["errors"]["dweight"] / run[OURS]["errors"]["dweight"]
        for cell in configuration.select(operation="layer_norm backward", dtype=BF16, rows=(4 * K, 16 * K, 32 * K))
        for run in cell.runs.values()
        if all("errors" in run.get(name, {}) for name in (OURS, "torch"))
    ]


def _faster(what: str, target: float, operation, peer: str = "torch", summary=geometric_mean, **case) -> Goal:
    read = of_cells(lambda cell: cell.speedup(peer), operation=operation, **case)
    return Goal(f"{what}, against {peer}", target, "×", read, summary)


def _bandwidth(what: str, target: float, **case: object) -> Goal:
    figure = lambda cell: bandwidth / 1e12 if (bandwidth := cell.bandwidth()) else None  # noqa: E731
    return Goal(what, target, "TB/s", of_cells(figure, **case), scales=True)


def _of_copy(what: str, target: float, **case: object) -> Goal:
    return Goal(what, target, "of copy", of_cells(lambda cell: cell.speedup(COPY), **case))


def _fewer_parameters(what: str, operation: str) -> Goal:
    read = of_cells(lambda cell: cell.speedup(WITH_BOTH), operation=operation, affine=("weight", "bias", "neither"))
    return Goal(f"{what}, fewer parameters against both", 1.0, "×", read)


def _dropout_cost(what: str, limit: float, columns: tuple[int, ...]) -> Goal:
    case = {"operation": "dropout_add_layer_norm", "columns": columns}
    read = against_other_case(lambda w, without: w / without, {"operation": "add_layer_norm with sum"}, **case)
    return Goal(f"dropout, time over that without, {what}", limit, "×", read, max, at_most=True)


ROW_ERROR = Goal(
    "RMS error of float32 rows far from zero",
    1e-6,
    "",
    lambda configuration: [cell.measured(OURS, "rms_error") for cell in configuration.select(operation="accuracy")],
    max,
    at_most=True,
)

CPU = [
    _faster("LN forward float32, in cache", 2.1, "layer_norm", dtype=F32, beyond_cache=False),
    _faster("LN forward float32, beyond", 1.4, "layer_norm", dtype=F32, beyond_cache=True),
    _faster("LN forward float32, worst cell", 1.0, "layer_norm", dtype=F32, summary=min),
    _faster("LN forward float32", 1.5, "layer_norm", "torch.compile", dtype=F32),
    _faster("LN forward float32", 1.5, "layer_norm", "onnxruntime", dtype=F32),
    _faster("LN forward bfloat16", 2.5, "layer_norm", dtype=BF16),
    _faster("LN forward float16", 2.5, "layer_norm", dtype=F16),
    _faster("add + LN forward float32", 2.0, "add_layer_norm", dtype=F32),
    _faster("add + LN forward bfloat16", 3.0, "add_layer_norm", dtype=BF16),
    _faster("add + LN in place float32, in cache", 2.5, "add_layer_norm in place", dtype=F32, beyond_cache=False),
    _faster("add + LN in place float32, beyond", 1.7, "add_layer_norm in place", dtype=F32, beyond_cache=True),
    _faster("add + LN in place bfloat16", 3.0, "add_layer_norm in place", dtype=BF16),
    _faster("dropout + add + LN training forward", 4.0, "dropout_add_layer_norm"),
    _faster("LN backward float32, in cache", 1.8, "layer_norm backward", dtype=F32, beyond_cache=False),
    _faster("LN backward float32, beyond", 1.15, "layer_norm backward", dtype=F32, beyond_cache=True),
    _faster("LN backward bfloat16", 3.0, "layer_norm backward", dtype=BF16),
    _faster("add + LN backward", 2.0, "add_layer_norm backward"),
    _faster("RMS forward, in cache", 2.0, "rms_norm", beyond_cache=False),
    _faster("RMS forward, beyond", 1.4, "rms_norm", beyond_cache=True),
    _faster("RMS forward, worst cell", 1.0, "rms_norm", summary=min),
    _faster("RMS backward, in cache", 2.0, "rms_norm backward", beyond_cache=False),
    _faster("RMS backward, beyond", 1.4, "rms_norm backward", beyond_cache=True),
    _faster("RMS backward, worst cell", 1.0, "rms_norm backward", summary=min),
    _faster("add + RMS forward", 2.5, "add_rms_norm"),
    _fewer_parameters("LN forward", "layer_norm"),
    _fewer_parameters("LN backward", "layer_norm backward"),
    ROW_ERROR,
    Goal("error of bfloat16 weight gradients, torch's over ours", 20, "×", gradient_errors),
    _faster("whole call at 1×768 float32", 1.3, "layer_norm", dtype=F32, rows=1, columns=768),
]

CPU_AVX2 = [
    _faster("AVX2 forward", 1.6, ["layer_norm", "add_layer_norm", "add_layer_norm in place"]),
    _faster("AVX2 backward", 1.6, ["layer_norm backward", "add_layer_norm backward"]),
]

_NORM = {"operation": "layer_norm", "dtype": BF16, "rows": 32 * K}
_F32_NORM = {"operation": "layer_norm", "dtype": F32, "rows": 4 * K}
_BACKWARD = {"operation": "layer_norm backward"}
_ADD_BACKWARD = {"operation": "add_layer_norm backward", "dtype": F32, "rows": 2 * K}
_SMALL = {"operation": "layer_norm", "rows": (1, 16, 64), "columns": 4 * K}

CUDA = [
    *(
        _bandwidth(f"LN forward bf16, 32768×{n}", target, columns=n, **_NORM)
        for n, target in {256: 2.2, 512: 2.45, 768: 2.55, K: 2.7, 2 * K: 2.85, 4 * K: 2.9}.items()
    ),
    _of_copy("LN forward bf16, 32768×8K…128K", 0.98, columns=[8 * K, 16 * K, 32 * K, 64 * K, 128 * K], **_NORM),
    *(
        _bandwidth(f"LN forward fp32, 4096×{n}", target, columns=n, **_F32_NORM)
        for n, target in {K: 2.1, 4 * K: 2.75, 16 * K: 2.9}.items()
    ),
    _of_copy("add + LN forward with the sum, 16384 rows", 0.95, operation="add_layer_norm with sum"),
    _bandwidth("LN backward bf16, 32768×1K…8K", 2.7, dtype=BF16, rows=32 * K, **_BACKWARD),
    _bandwidth("LN backward fp32, 4096×4K…16K", 2.5, dtype=F32, rows=4 * K, **_BACKWARD),
    _faster("LN backward, worst cell", 2.0, "layer_norm backward", summary=min),
    _bandwidth("add + LN backward fp32, 2048×8K and 16K", 2.6, columns=[8 * K, 16 * K], **_ADD_BACKWARD),
    _bandwidth("add + LN backward fp32, 2048×32K", 2.4, columns=32 * K, **_ADD_BACKWARD),
    Goal("awkward sizes over their neighbours' curve", 0.95, "×", over_neighbours),
    _faster("odd sizes, worst cell", 1.5, "layer_norm", summary=min, columns=ODD),
    _dropout_cost("from 4K up", 1.05, (4 * K, 8 * K)),
    _dropout_cost("below", 1.10, (768, K)),
    Goal(
        "1…64 rows of 4096, eager call, torch's over ours",
        1.0,
        "×",
        of_cells(lambda cell: cell.speedup("torch", "host_seconds"), **_SMALL),
    ),
    Goal(
        "1…64 rows of 4096, kernel",
        4.0,
        "µs",
        of_cells(lambda cell: seconds * 1e6 if (seconds := cell.measured(OURS)) else None, **_SMALL),
        max,
        at_most=True,
    ),
    ROW_ERROR,
]
