# SPDX-License-Identifier: BSD-3-Clause
"""The faults that mutate.py puts into the CUDA kernels. Add what a new kernel could do wrong."""

from __future__ import annotations

from typing import NamedTuple


class Mutation(NamedTuple):
    name: str
    file: str
    replacements: dict[str, str]  # each text occurs once in the file


KERNELS = "csrc/kernels/cuda/"
ROW_SUM = KERNELS + "row_sum.cuh"
ROW_ACCESS = KERNELS + "row_access.cuh"
DROPOUT = KERNELS + "dropout.cuh"
PLAN = KERNELS + "plan.h"
FORWARD = KERNELS + "norm_forward.cuh"
FORWARD_ANY = KERNELS + "norm_forward_any.cuh"
FORWARD_LAUNCH = KERNELS + "norm_forward.cu"
BACKWARD = KERNELS + "norm_backward.cuh"
BACKWARD_LAUNCH = KERNELS + "norm_backward.cu"
BACKWARD_ANY = KERNELS + "norm_backward_any.cuh"
RESIDUAL_FORWARD = KERNELS + "residual_add_forward.cuh"
RESIDUAL_BACKWARD = KERNELS + "residual_add_backward.cuh"
RESIDUAL_ANY = KERNELS + "residual_add_any.cuh"
COLUMN_SUMS = KERNELS + "column_sums.cuh"
FINISH = KERNELS + "column_sums_finish.cuh"

SUMS = [
    Mutation("row sum without its barrier", ROW_SUM, {"        barrier(barrier_id, threads);\n": ""}),
    Mutation(
        "row sum without its cluster barrier", ROW_SUM, {"        cluster_arrive();\n        cluster_wait();\n": ""}
    ),
    Mutation("row sum: one slot for all warps", ROW_SUM, {"slot[warp * kCount + i] =": "slot[i] ="}),
    Mutation("row sum: the last block of a cluster is not told", ROW_SUM, {"lane < blocks)": "lane + 1 < blocks)"}),
    Mutation("row sum: slots beyond one a lane skipped", ROW_SUM, {"lane + 32; other": "lane + 64; other"}),
    Mutation("row sum: a step of the shuffles skipped", ROW_SUM, {"distance > 0": "distance > 1"}),
]

VECTORS = [
    Mutation(
        "shifted load beyond the row's end",
        ROW_ACCESS,
        {"if (column < 0 || column + kVector > cols) {\n      Vector": "if (column < 0) {\n      Vector"},
    ),
    Mutation(
        "shifted load skips the row's first element",
        ROW_ACCESS,
        {
            "if (column + i < 0 || column + i >= cols) continue;\n        const auto": (
                "if (column + i <= 0 || column + i >= cols) continue;\n        const auto"
            )
        },
    ),
    Mutation(
        "shifted store beyond the row's end",
        ROW_ACCESS,
        {"if (column < 0 || column + kVector > cols) {\n#pragma": "if (column < 0) {\n#pragma"},
    ),
    Mutation("shifted weight skips the first element", ROW_ACCESS, {"if (column + i >= 0 &&": "if (column + i > 0 &&"}),
]

MASK = [
    Mutation("mask: 32-bit index", DROPOUT, {"fill(0, first >> 3)": "fill(0, static_cast<std::uint32_t>(first) >> 3)"}),
    Mutation(
        "mask: a vector's second block of draws skipped",
        DROPOUT,
        {"  if (!kAligned && skipped + kCount > kPerBlock) fill(1, (first >> 3) + 1);\n": ""},
    ),
    Mutation("mask: an odd element's draws not shifted", DROPOUT, {"(skipped & 1) != 0": "(skipped & 8) != 0"}),
    Mutation("mask: low and high half swapped", DROPOUT, {"i % 2 == 0 ?": "i % 2 != 0 ?"}),
    Mutation("mask: a draw at the threshold dropped", DROPOUT, {"draw >= threshold": "draw > threshold"}),
    Mutation(
        "mask: zero times infinity",
        DROPOUT,
        {"draw >= threshold ? values[i] * scale : 0.0F": "values[i] * (draw >= threshold ? scale : 0.0F)"},
    ),
]

PLANS = [
    Mutation("plan: a row one vector too long", PLAN, {"if (vectors <= 8) return": "if (vectors <= 9) return"}),
    Mutation("plan: no room for the shift", PLAN, {"(shifted ? vector - 1 : 0)": "0"}),
    Mutation(
        "plan: clusters of 2 for rows of 4 blocks", PLAN, {"kBlockVectors * cluster)": "kBlockVectors * 2 * cluster)"}
    ),
    Mutation(
        "launch: the last rows have no block (forward)",
        FORWARD_LAUNCH,
        {"(a.rows + plan.groups() - 1) / plan.groups()": "(a.rows + plan.groups() / 2) / plan.groups()"},
    ),
]

NORM_FORWARD = [
    Mutation(
        "one slot for both sums (forward)",
        FORWARD,
        {"slot + RowGroup<kLanes, kCluster>::slot_size(row_threads, kCluster ? cluster_blocks() : 1, 1)": "slot"},
    ),
    Mutation(
        "bound one vector too far (forward)",
        FORWARD,
        {"column < cols : column < cols;": "column < cols : column <= cols;"},
    ),
    Mutation(
        "tail of the row skipped (forward)",
        FORWARD,
        {"column < cols : column < cols;": "column < cols : column + kVector < cols;"},
    ),
    Mutation(
        "elements beside a shifted row count (forward)",
        FORWARD,
        {"is_element(i, k) ? x[i][k] - rounded_mean : 0.0F": "x[i][k] - rounded_mean"},
    ),
    Mutation(
        "threads of no row return early (forward)",
        FORWARD,
        {"  const int step = row_threads": "  if (!live) return;\n  const int step = row_threads"},
    ),
    Mutation(
        "no wait for the cluster's start (forward)",
        FORWARD,
        {"  if constexpr (kCluster) cluster_wait();\n": ""},
    ),
    Mutation(
        "neither arrival nor wait at the cluster's start (forward)",
        FORWARD,
        {"  if constexpr (kCluster) cluster_wait();\n": "", "  if constexpr (kCluster) cluster_arrive();": ""},
    ),
    Mutation(
        "blocks of a cluster take the same columns (forward)",
        FORWARD,
        {"int base = rank * step": "int base = 0 * step"},
    ),
    Mutation(
        "32-bit row offset (forward, input)",
        FORWARD,
        {"(a.input) + row * a.input_stride": "(a.input) + static_cast<int>(row * a.input_stride)"},
    ),
    Mutation(
        "32-bit row offset (forward, residual)",
        FORWARD,
        {"row * a.residual_stride": "static_cast<std::uint32_t>(row * a.residual_stride)"},
    ),
    Mutation(
        "32-bit row offset (forward, sum)",
        FORWARD,
        {"(a.sum) + row * a.sum_stride": "(a.sum) + static_cast<std::uint32_t>(row * a.sum_stride)"},
    ),
    Mutation(
        "32-bit row offset (forward, output)",
        FORWARD,
        {"(a.output) + row * a.output_stride": "(a.output) + static_cast<int>(row * a.output_stride)"},
    ),
    Mutation("row stride ignored (forward)", FORWARD, {"(a.input) + row * a.input_stride": "(a.input) + row * a.cols"}),
    Mutation(
        "shift of the first row for all (forward)",
        FORWARD,
        {"a.first_element + row * a.input_stride": "a.first_element"},
    ),
    Mutation(
        "32-bit shift (forward)",
        FORWARD,
        {"(a.first_element + row * a.input_stride)": "static_cast<int>(a.first_element + row * a.input_stride)"},
    ),
    Mutation(
        "shift of the wrong sign (forward)",
        FORWARD,
        {"if constexpr (kShifted) base -=": "if constexpr (kShifted) base +="},
    ),
    Mutation(
        "32-bit mask index (forward)",
        FORWARD,
        {"(x[i], row * a.cols + column": "(x[i], static_cast<std::uint32_t>(row * a.cols + column)"},
    ),
    Mutation("mask without the row (forward)", FORWARD, {"(x[i], row * a.cols + column": "(x[i], column"}),
    Mutation(
        "mask of the next vector (forward)",
        FORWARD,
        {"(x[i], row * a.cols + column": "(x[i], row * a.cols + column + kVector"},
    ),
    Mutation(
        "E[x^2] - mean^2 (forward)",
        FORWARD,
        {
            "      moments[1] += sum_of_squares(x[i]);\n": "",
            "#pragma unroll\n      for (int k = 0; k < kVector; ++k) x[i][k] = is_element": (
                "      moments[1] += sum_of_squares(x[i]);\n"
                "#pragma unroll\n      for (int k = 0; k < kVector; ++k) x[i][k] = is_element"
            ),
            "- delta * delta;": "- rounded_mean * rounded_mean;",
        },
    ),
    Mutation(
        "mean not corrected (forward)", FORWARD, {"delta = moments[0] / static_cast<float>(a.cols)": "delta = 0.0F"}
    ),
    Mutation(
        "constant rows not exact (forward)",
        FORWARD,
        {"moments[0] / static_cast<float>(a.cols)": "moments[0] * a.reciprocal_cols"},
    ),
    Mutation(
        "residual read twice (forward)",
        FORWARD,
        {
            "    if constexpr (kAdds) residual_words[i] =": (
                "    if constexpr (kAdds) load_vector<Residual, kVector, kShifted>(residual, base + i * step, cols);\n"
                "    if constexpr (kAdds) residual_words[i] ="
            )
        },
    ),
    Mutation(
        "32-bit row offset (forward, any)",
        FORWARD_ANY,
        {"row * a.input.row_stride + column": "static_cast<int>(row * a.input.row_stride) + column"},
    ),
    Mutation(
        "32-bit mask index (forward, any)",
        FORWARD_ANY,
        {"dropped(value, row * a.cols + column": "dropped(value, static_cast<std::uint32_t>(row * a.cols + column)"},
    ),
    Mutation("rows beyond the grid skipped (forward, any)", FORWARD_ANY, {"row += grid_blocks()": "row += a.rows"}),
    Mutation("one slot for all row sums (forward, any)", FORWARD_ANY, {"slot + turn * slot_size": "slot"}),
    Mutation(
        "not centered: the sum for that of squares (forward)",
        FORWARD,
        {"kCentered ? sum_of<kVector>(x[i]) : sum_of_squares(x[i])": "sum_of<kVector>(x[i])"},
    ),
    Mutation("not centered: about the mean (forward, any)", FORWARD_ANY, {"if (a.centered) {": "if (true) {"}),
    Mutation(
        "not centered: mean corrected (forward, any)",
        FORWARD_ANY,
        {"a.centered ? moments[0] / count : Value(0)": "moments[0] / count"},
    ),
]

NORM_BACKWARD = [
    Mutation("no wait for the copies (backward)", BACKWARD, {"async_wait<kBackwardStages - 1>();": ""}),
    Mutation(
        "wait for the copies too weak (backward)",
        BACKWARD,
        {"async_wait<kBackwardStages - 1>": "async_wait<kBackwardStages>"},
    ),
    Mutation(
        "stage refilled before its use (backward)",
        BACKWARD,
        {
            "      if (live && column < a.cols) {": (
                "      fetch(row + kBackwardStages * row_step, stage, i);\n      if (live && column < a.cols) {"
            )
        },
    ),
    Mutation(
        "refilled with the next row (backward)",
        BACKWARD,
        {"fetch(row + kBackwardStages * row_step": "fetch(row + row_step"},
    ),
    Mutation(
        "stages share memory (backward)",
        BACKWARD,
        {"shared_memory() + stage * a.stage_bytes": "shared_memory() + 0 * stage"},
    ),
    Mutation(
        "staged matrices share memory (backward)",
        BACKWARD,
        {"staged_x(stage) + StagedX::kBytes * block_threads()": "staged_x(stage)"},
    ),
    Mutation(
        "fetch one vector too far (backward)", BACKWARD, {"column >= a.cols) return;": "column > a.cols) return;"}
    ),
    Mutation("fetch one row too far (backward)", BACKWARD, {"if (row >= a.rows ||": "if (row > a.rows ||"}),
    Mutation(
        "tail of the row skipped (backward)",
        BACKWARD,
        {"if (!live || column_of(i) >= a.cols)": "if (!live || column_of(i) + kVector >= a.cols)"},
    ),
    Mutation("one slot for all row sums (backward)", BACKWARD, {"slots + stage * slot_size": "slots"}),
    Mutation("groups share their slots (backward)", BACKWARD, {" + group_index * 2 * slot_size": ""}),
    Mutation("groups share a barrier (backward)", BACKWARD, {"group_index + 1};": "1};"}),
    Mutation(
        "no wait for the cluster's start (backward)", BACKWARD, {"  if constexpr (kCluster) cluster_wait();\n": ""}
    ),
    Mutation(
        "neither arrival nor wait at the cluster's start (backward)",
        BACKWARD,
        {"  if constexpr (kCluster) cluster_wait();\n": "", "  if constexpr (kCluster) cluster_arrive();": ""},
    ),
    Mutation(
        "32-bit row offset (backward, x)",
        BACKWARD,
        {"(a.x) + row * a.x_stride": "(a.x) + static_cast<int>(row * a.x_stride)"},
    ),
    Mutation(
        "32-bit row offset (backward, grad_output)",
        BACKWARD,
        {"row * a.grad_output_stride": "static_cast<std::uint32_t>(row * a.grad_output_stride)"},
    ),
    Mutation(
        "32-bit row offset (backward, grad_sum)",
        BACKWARD,
        {"row * a.grad_sum_stride": "static_cast<std::uint32_t>(row * a.grad_sum_stride)"},
    ),
    Mutation(
        "32-bit row offset (backward, grad_residual)",
        BACKWARD,
        {"row * a.grad_residual_stride": "static_cast<std::uint32_t>(row * a.grad_residual_stride)"},
    ),
    Mutation(
        "32-bit row offset (backward, grad_input)",
        BACKWARD,
        {"row * a.grad_input_stride": "static_cast<int>(row * a.grad_input_stride)"},
    ),
    Mutation(
        "32-bit mask index (backward)",
        BACKWARD,
        {"(result, row * a.cols + column": "(result, static_cast<std::uint32_t>(row * a.cols + column)"},
    ),
    Mutation(
        "mask of the next vector (backward)",
        BACKWARD,
        {"(result, row * a.cols + column": "(result, row * a.cols + column + kVector"},
    ),
    Mutation("mean not corrected (backward)", BACKWARD, {"delta = totals[2] * a.reciprocal_cols": "delta = 0.0F"}),
    Mutation(
        "x read twice (backward)",
        BACKWARD,
        {
            "    if (!has_grad_sum) return;\n": (
                "    StagedX::template fetch<kShifted>(staged_x(stage), x, column, a.cols, i);\n"
                "    if (!has_grad_sum) return;\n"
            )
        },
    ),
    Mutation(
        "input bias's sum in the bias's place (backward)",
        BACKWARD,
        {"sums[kSums - 1][i][k] += result[k]": "sums[1][i][k] += result[k]"},
    ),
    Mutation(
        "input bias's sum in the bias's place (backward, any)",
        BACKWARD_ANY,
        {"partials[(sums - 1) * a.cols + column]": "partials[a.cols + column]"},
    ),
    Mutation("not centered: mean of g taken off (backward, any)", BACKWARD_ANY, {"if (!a.centered) continue;": ""}),
    Mutation(
        "launch: no room for a centered norm's row sums (backward)",
        BACKWARD_LAUNCH,
        {"plan.cluster, backward_row_sums(a.centered)": "plan.cluster, backward_row_sums(false)"},
    ),
    Mutation("one slot for all row sums (backward, any)", BACKWARD_ANY, {"slot + turn * slot_size": "slot"}),
    Mutation("partial sums not cleared (backward, any)", BACKWARD_ANY, {"partials[i] = Value(0)": "(void)i"}),
    Mutation(
        "32-bit row offset (backward, any)",
        BACKWARD_ANY,
        {"row * a.sum.row_stride + column": "static_cast<int>(row * a.sum.row_stride) + column"},
    ),
    Mutation(
        "32-bit mask index (backward, any)",
        BACKWARD_ANY,
        {"dropped(result, row * a.cols + column": "dropped(result, static_cast<std::uint32_t>(row * a.cols + column)"},
    ),
    Mutation("rows of a block at any distance (backward)", BACKWARD, {"kApart = kShifted ? kVector : 1": "kApart = 1"}),
    Mutation(
        "elements beside a shifted row count (backward)",
        BACKWARD,
        {"totals[2] += kShifted && column >= static_cast<unsigned>(a.cols) ? 0.0F : x[k]": "totals[2] += x[k]"},
    ),
    Mutation(
        "shift of the first row for all (backward)",
        BACKWARD,
        {"a.first_element + part_row * a.x_stride": "a.first_element"},
    ),
    Mutation(
        "32-bit shift (backward)",
        BACKWARD,
        {"(a.first_element + part_row * a.x_stride)": "static_cast<int>(a.first_element + part_row * a.x_stride)"},
    ),
    Mutation(
        "vectors beyond a shifted row copied whole (backward)",
        BACKWARD,
        {"if (kShifted && (column < 0 || column + kVector > cols)) {": "if (false) {"},
    ),
]

RESIDUAL_ADD = [
    Mutation(
        "tail of the row skipped (residual_add, forward)",
        RESIDUAL_FORWARD,
        {"if (column >= a.cols) continue;": "if (column + kVector >= a.cols) continue;"},
    ),
    Mutation(
        "all blocks take the first tile (residual_add, forward)",
        RESIDUAL_FORWARD,
        {"block_index() % a.tiles * kItems": "0 * kItems"},
    ),
    Mutation(
        "all groups take the same row (residual_add, forward)",
        RESIDUAL_FORWARD,
        {"* groups + thread_index() / a.row_threads": "* groups"},
    ),
    Mutation(
        "mask of the next vector (residual_add, forward)",
        RESIDUAL_FORWARD,
        {"(x, row * a.cols + column": "(x, row * a.cols + column + kVector"},
    ),
    Mutation(
        "residual read twice (residual_add, forward)",
        RESIDUAL_FORWARD,
        {
            "    residual_words[i] = load": (
                "    load_vector<Residual, kVector, kShifted>(residual, base + i * step, a.cols);\n"
                "    residual_words[i] = load"
            )
        },
    ),
    Mutation(
        "rows of a part at any distance (residual_add, backward)",
        RESIDUAL_BACKWARD,
        {"kApart = kShifted && kInputBias ? kVector : 1": "kApart = 1"},
    ),
    Mutation("parts overlap (residual_add, backward)", RESIDUAL_BACKWARD, {"row += a.parts * groups": "row += groups"}),
    Mutation(
        "32-bit row offset (residual_add, forward, input)",
        RESIDUAL_FORWARD,
        {"(a.input) + row * a.input_stride": "(a.input) + static_cast<int>(row * a.input_stride)"},
    ),
    Mutation(
        "32-bit row offset (residual_add, forward, residual)",
        RESIDUAL_FORWARD,
        {"row * a.residual_stride": "static_cast<std::uint32_t>(row * a.residual_stride)"},
    ),
    Mutation(
        "32-bit row offset (residual_add, forward, output)",
        RESIDUAL_FORWARD,
        {"row * a.output_stride": "static_cast<std::uint32_t>(row * a.output_stride)"},
    ),
    Mutation(
        "32-bit mask index (residual_add, forward)",
        RESIDUAL_FORWARD,
        {"row * a.cols + column": "static_cast<std::uint32_t>(row * a.cols) + column"},
    ),
    Mutation(
        "32-bit row offset (residual_add, backward, grad_output)",
        RESIDUAL_BACKWARD,
        {
            "(a.grad_output) + row * a.grad_output_stride": (
                "(a.grad_output) + static_cast<int>(row * a.grad_output_stride)"
            )
        },
    ),
    Mutation(
        "32-bit row offset (residual_add, backward, grad_input)",
        RESIDUAL_BACKWARD,
        {"row * a.grad_input_stride": "static_cast<std::uint32_t>(row * a.grad_input_stride)"},
    ),
    Mutation(
        "32-bit mask index (residual_add, backward)",
        RESIDUAL_BACKWARD,
        {"row * a.cols + column": "static_cast<std::uint32_t>(row * a.cols) + column"},
    ),
    Mutation(
        "32-bit row offset (residual_add, any, residual)",
        RESIDUAL_ANY,
        {"row * a.residual.row_stride": "static_cast<std::uint32_t>(row * a.residual.row_stride)"},
    ),
    Mutation(
        "input bias of the next column (residual_add, any)",
        RESIDUAL_ANY,
        {"a.input_bias.dtype, column);": "a.input_bias.dtype, (column + 1) % a.cols);"},
    ),
    Mutation(
        "one row of a part left out of the sums (residual_add, any)",
        RESIDUAL_ANY,
        {"    total += value;": "    if (row != place.parts) total += value;"},
    ),
    Mutation(
        "mask without the row (residual_add, backward)",
        RESIDUAL_BACKWARD,
        {"(result, row * a.cols + column": "(result, column"},
    ),
]

COLUMNS = [
    Mutation(
        "no barrier before the groups meet",
        COLUMN_SUMS,
        {"    barrier(0, block_threads());\n#pragma": "#pragma"},
    ),
    Mutation(
        "no barrier after the groups meet",
        COLUMN_SUMS,
        {"    barrier(0, block_threads());\n    for (int value": "    for (int value"},
    ),
    Mutation(
        "partial sums of the first vectors alone",
        COLUMN_SUMS,
        {"partials[column] = total": "if (i == 0) partials[column] = total"},
    ),
    Mutation(
        "partial sums of the last group lost", COLUMN_SUMS, {"other < groups; ++other": "other + 1 < groups; ++other"}
    ),
    Mutation(
        "partial sums before the first column",
        COLUMN_SUMS,
        {"if (column < 0 || column >= cols)": "if (column >= cols)"},
    ),
    Mutation("finish drops parts", FINISH, {"part += kSlices)": "part += kSlices + 1)"}),
    Mutation("finish drops a slice", FINISH, {"other < kSlices;": "other + 1 < kSlices;"}),
    Mutation("finish without its barrier", FINISH, {"  barrier(0, kFinishThreads);\n": ""}),
    Mutation(
        "finish: threads leave before its barrier",
        FINISH,
        {
            "  barrier(0, kFinishThreads);\n": "",
            "  if (slice > 0 || column >= columns) return;\n": (
                "  if (slice > 0 || column >= columns) return;\n  barrier(0, kFinishThreads);\n"
            ),
        },
    ),
]

MUTATIONS = SUMS + VECTORS + MASK + PLANS + NORM_FORWARD + NORM_BACKWARD + RESIDUAL_ADD + COLUMNS
