# SPDX-License-Identifier: BSD-3-Clause
"""What the norms are to reach, and how that is read off the results."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from results import OURS, Cell, Configuration, geometric_mean

BEYOND_CACHE_BYTES = 30e6
H100_COPY = 3.0e12  # bytes per second, of a large copy
K = 1024

Reading = Callable[[Configuration], "float | None"]


@dataclass(frozen=True)
class Goal:
    what: str
    target: float
    unit: str
    read: Reading
    at_most: bool = False
    scales: bool = False  # with the device's bandwidth

    def target_for(self, configuration: Configuration) -> float:
        name = str(configuration.environment.get("hardware"))
        if not self.scales or "H100 80GB HBM3" in name:
            return self.target
        return self.target * float(configuration.environment["large_copy_bytes_per_second"]) / H100_COPY

    def reached(self, configuration: Configuration) -> bool | None:
        """None where it was not measured."""
        value, target = self.read(configuration), self.target_for(configuration)
        if value is None:
            return None
        return value <= target if self.at_most else value >= target


def goals_for(configuration: Configuration) -> list[Goal]:
    environment = configuration.environment
    if environment.get("suite") != "norm":
        return []
    if environment.get("device") == "cuda":
        return CUDA
    if environment.get("allocator") != "kept":
        return []
    return CPU_AVX2 if environment.get("isa") == "avx2" else CPU


def speedup(peer: str, beyond_cache: bool | None = None, worst: bool = False, **case: object) -> Reading:
    """Geometric mean over the cells, or the worst of them."""

    def read(configuration: Configuration) -> float | None:
        cells = [
            cell
            for cell in configuration.select(**{"affine": "both"} | case)
            if beyond_cache in (None, cell.least_bytes() > BEYOND_CACHE_BYTES)
        ]
        ratios = [ratio for cell in cells if (ratio := cell.speedup(peer))]
        if not ratios:
            return None
        return min(ratios) if worst else geometric_mean(ratios)

    return read


def _lowest(value: Callable[[Cell], float | None], **case: object) -> Reading:
    def read(configuration: Configuration) -> float | None:
        values = [figure for cell in configuration.select(**case) if (figure := value(cell)) is not None]
        return min(values, default=None)

    return read


def _terabytes(cell: Cell) -> float | None:
    bandwidth = cell.bandwidth()
    return bandwidth and bandwidth / 1e12


def _of_copy(cell: Cell) -> float | None:
    return cell.speedup("copy")


def fewer_parameters(operation: str) -> Reading:
    """Time with both parameters over the time with fewer, at its worst."""

    def read(configuration: Configuration) -> float | None:
        ratios = []
        for cell in configuration.select(operation=operation, affine=("weight", "bias", "neither")):
            with_both = configuration.select(**{**cell.case, "affine": "both"})
            ratios += [b.measured(OURS) / cell.measured(OURS) for b in with_both if b.measured(OURS)]
        return min(ratios, default=None)

    return read


def row_error(configuration: Configuration) -> float | None:
    errors = [cell.measured(OURS, "rms_error") for cell in configuration.select(operation="accuracy")]
    return max(errors, default=None)


def gradient_error(configuration: Configuration) -> float | None:
    """The peer's relative error of the weight's gradient over ours, at its worst."""
    ratios = []
    for cell in configuration.select(operation="layer_norm backward", dtype="bfloat16", rows=(4 * K, 16 * K, 32 * K)):
        for run in cell.runs.values():
            if all(run.get(name, {}).get("errors") for name in ("torch", OURS)):
                ratios.append(run["torch"]["errors"]["dweight"] / run[OURS]["errors"]["dweight"])
    return min(ratios, default=None)


def awkward(configuration: Configuration) -> float | None:
    """Bandwidth over what the straight line between its neighbours' gives, at its worst."""
    curve = configuration.select(operation="layer_norm", dtype="bfloat16", rows=32 * K, affine="both")
    points = {cell.case["columns"]: bandwidth for cell in curve if (bandwidth := cell.bandwidth())}
    even = sorted(columns for columns in points if columns in (*REGULAR, 768))
    ratios = []
    for columns in AWKWARD:
        below, above = [n for n in even if n < columns], [n for n in even if n > columns]
        if columns in points and below and above:
            low, high = below[-1], above[0]
            between = points[low] + (points[high] - points[low]) * (columns - low) / (high - low)
            ratios.append(points[columns] / between)
    return min(ratios, default=None)


def dropout_cost(columns: tuple[int, ...]) -> Reading:
    """Time with dropout over the time without, at its worst."""

    def read(configuration: Configuration) -> float | None:
        ratios = []
        for cell in configuration.select(operation="dropout_add_layer_norm", columns=columns):
            without = configuration.select(**{**cell.case, "operation": "add_layer_norm with sum"})
            ratios += [
                cell.measured(OURS) / w.measured(OURS) for w in without if w.measured(OURS) and cell.measured(OURS)
            ]
        return max(ratios, default=None)

    return read


REGULAR = tuple(1 << bits for bits in range(8, 18))
AWKWARD = (760, 1000, 1128, 3840, 5120, 12288, 20480)
ODD = (761, 1001, 4095)


def _faster(what: str, target: float, peer: str, **selection: object) -> Goal:
    return Goal(f"{what}, against {peer}", target, "×", speedup(peer, **selection))


def _cpu_goals() -> list[Goal]:
    f32, bf16 = "float32", "bfloat16"
    norm, add = {"operation": "layer_norm"}, {"operation": "add_layer_norm"}
    in_place, dropout = {"operation": "add_layer_norm in place"}, {"operation": "dropout_add_layer_norm"}
    backward, add_backward = {"operation": "layer_norm backward"}, {"operation": "add_layer_norm backward"}
    return [
        _faster("LN forward float32, in cache", 2.1, "torch", dtype=f32, beyond_cache=False, **norm),
        _faster("LN forward float32, beyond", 1.4, "torch", dtype=f32, beyond_cache=True, **norm),
        _faster("LN forward float32, worst cell", 1.0, "torch", dtype=f32, worst=True, **norm),
        _faster("LN forward float32", 1.5, "torch.compile", dtype=f32, **norm),
        _faster("LN forward float32", 1.5, "onnxruntime", dtype=f32, **norm),
        _faster("LN forward bfloat16", 2.5, "torch", dtype=bf16, **norm),
        _faster("LN forward float16", 2.5, "torch", dtype="float16", **norm),
        _faster("add + LN forward float32", 2.0, "torch", dtype=f32, **add),
        _faster("add + LN forward bfloat16", 3.0, "torch", dtype=bf16, **add),
        _faster("add + LN in place float32, in cache", 2.5, "torch", dtype=f32, beyond_cache=False, **in_place),
        _faster("add + LN in place float32, beyond", 1.7, "torch", dtype=f32, beyond_cache=True, **in_place),
        _faster("add + LN in place bfloat16", 3.0, "torch", dtype=bf16, **in_place),
        _faster("dropout + add + LN training forward", 4.0, "torch", **dropout),
        _faster("LN backward float32, in cache", 1.8, "torch", dtype=f32, beyond_cache=False, **backward),
        _faster("LN backward float32, beyond", 1.15, "torch", dtype=f32, beyond_cache=True, **backward),
        _faster("LN backward bfloat16", 3.0, "torch", dtype=bf16, **backward),
        _faster("add + LN backward", 2.0, "torch", **add_backward),
        Goal("LN forward with fewer parameters, time with both over it", 1.0, "×", fewer_parameters("layer_norm")),
        Goal("LN backward with fewer parameters", 1.0, "×", fewer_parameters("layer_norm backward")),
        Goal("RMS error of float32 rows far from zero", 1e-6, "", row_error, at_most=True),
        Goal("PyTorch's error of bfloat16 weight gradients over ours", 20, "×", gradient_error),
        _faster("whole call at 1×768 float32", 1.3, "torch", dtype=f32, rows=1, columns=768, **norm),
    ]


def _cpu_avx2_goals() -> list[Goal]:
    forward = ("layer_norm", "add_layer_norm", "add_layer_norm in place", "dropout_add_layer_norm")
    backward = ("layer_norm backward", "add_layer_norm backward")
    return [
        _faster("AVX2 forward, all", 1.6, "torch", operation=forward),
        _faster("AVX2 backward, all", 1.6, "torch", operation=backward),
    ]


def _cuda_goals() -> list[Goal]:
    f32, bf16 = "float32", "bfloat16"
    norm, backward = {"operation": "layer_norm"}, {"operation": "layer_norm backward"}
    add_backward = {"operation": "add_layer_norm backward", "dtype": f32, "rows": 2 * K}

    def bandwidth(what: str, target: float, **case: object) -> Goal:
        return Goal(what, target, "TB/s", _lowest(_terabytes, **case), scales=True)

    forward = {256: 2.2, 512: 2.45, 768: 2.55, K: 2.7, 2 * K: 2.85, 4 * K: 2.9}
    long = tuple(n for n in REGULAR if n >= 8 * K)
    return [
        *(
            bandwidth(f"LN forward bf16, 32768×{n}", target, dtype=bf16, rows=32 * K, columns=n, **norm)
            for n, target in forward.items()
        ),
        Goal(
            "LN forward bf16, 32768×8K…128K",
            0.98,
            "of copy",
            _lowest(_of_copy, dtype=bf16, rows=32 * K, columns=long, **norm),
        ),
        *(
            bandwidth(f"LN forward fp32, 4096×{n}", target, dtype=f32, rows=4 * K, columns=n, **norm)
            for n, target in {K: 2.1, 4 * K: 2.75, 16 * K: 2.9}.items()
        ),
        Goal(
            "add + LN forward with the sum, 16384 rows",
            0.95,
            "of copy",
            _lowest(_of_copy, operation="add_layer_norm with sum"),
        ),
        bandwidth("LN backward bf16, 32768×1K…8K", 2.7, dtype=bf16, rows=32 * K, **backward),
        bandwidth("LN backward fp32, 4096×4K…16K", 2.5, dtype=f32, rows=4 * K, **backward),
        Goal("LN backward, worst cell against torch", 2.0, "×", speedup("torch", worst=True, **backward)),
        bandwidth("add + LN backward fp32, 2048×8K, 16K", 2.6, columns=(8 * K, 16 * K), **add_backward),
        bandwidth("add + LN backward fp32, 2048×32K", 2.4, columns=32 * K, **add_backward),
        Goal("awkward sizes over their neighbours' curve", 0.95, "×", awkward),
        Goal("odd sizes, worst against torch", 1.5, "×", speedup("torch", worst=True, columns=ODD, **norm)),
        Goal("dropout, time over that without, from 4K up", 1.05, "×", dropout_cost((4 * K, 8 * K)), at_most=True),
        Goal("dropout, time over that without, below", 1.10, "×", dropout_cost((768, K)), at_most=True),
        Goal(
            "M ≤ 64, N = 4096: torch's eager call over ours",
            1.0,
            "×",
            _lowest(lambda cell: cell.speedup("torch", "host_seconds"), rows=(1, 16, 64), **norm),
        ),
        Goal(
            "M ≤ 64, N = 4096: kernel",
            4.0,
            "µs",
            lambda configuration: max(
                (
                    seconds * 1e6
                    for cell in configuration.select(rows=(1, 16, 64), **norm)
                    if (seconds := cell.measured(OURS))
                ),
                default=None,
            ),
            at_most=True,
        ),
        Goal("RMS error of float32 rows far from zero", 1e-6, "", row_error, at_most=True),
    ]


CPU, CPU_AVX2, CUDA = _cpu_goals(), _cpu_avx2_goals(), _cuda_goals()
