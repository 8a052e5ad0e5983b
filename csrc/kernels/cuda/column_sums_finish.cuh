// SPDX-License-Identifier: BSD-3-Clause
// The last step of a backward pass: partial sums of the columns, one row of them for each of some subsets of the rows,
// become gradients in their own types. Always in the same order, so the same bits from run to run.
#pragma once

#include "element.cuh"

namespace resnorm::cuda {

inline constexpr int kFinishThreads = 512;

// partials is [row_subsets][sums][cols]; gradients[i] takes sum i, unless it is absent. A block adds 32 columns: 16
// warps take every 16th subset each, then one adds the 16.
struct FinishArguments {
  const void* partials;
  int row_subsets, sums;
  std::int64_t cols;
  Vector gradients[3];
};

template <class Value>
RESNORM_KERNEL(kFinishThreads, 1)
column_sums_finish(const FinishArguments a) {
  await_previous_kernel();
  constexpr int kSlices = kFinishThreads / 32, kPitch = 33;  // 33: a warp's column meets no bank twice
  auto* const slices = reinterpret_cast<Value*>(shared_memory());
  const int lane = thread_index() % 32, slice = thread_index() / 32;
  const std::int64_t columns = a.cols * a.sums, column = static_cast<std::int64_t>(block_index()) * 32 + lane;
  const auto* partials = static_cast<const Value*>(a.partials);
  Value total = 0;
  if (column < columns) {
    for (int subset = slice; subset < a.row_subsets; subset += kSlices) {
      total += load_once<Value>(partials + subset * columns + column);
    }
  }
  slices[slice * kPitch + lane] = total;
  barrier(0, kFinishThreads);
  if (slice > 0 || column >= columns) return;
  total = 0;
  for (int other = 0; other < kSlices; ++other) total += slices[other * kPitch + lane];
  const auto sum = static_cast<int>(column / a.cols);
  const Vector gradient = sum == 0 ? a.gradients[0] : sum == 1 ? a.gradients[1] : a.gradients[2];
  if (gradient.data != nullptr) store_element(gradient.data, gradient.dtype, column % a.cols, total);
}

}  // namespace resnorm::cuda
