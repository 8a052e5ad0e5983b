// SPDX-License-Identifier: BSD-3-Clause
#include <algorithm>

#include "column_sums.h"
#include "column_sums_finish.cuh"
#include "launch.cuh"

namespace resnorm::cuda {

namespace {

template <class Value>
cudaError_t launch_finish(const FinishArguments& a, bool overlaps, cudaStream_t stream) {
  const auto blocks = static_cast<int>((a.cols * a.sums + 31) / 32);
  const int shared_bytes = kFinishThreads / 32 * 33 * static_cast<int>(sizeof(Value));
  const LaunchShape shape = {blocks, 1, kFinishThreads, shared_bytes, overlaps};
  return launch<column_sums_finish<Value>>(shape, stream, a);
}

}  // namespace

cudaError_t finish_column_sums(const void* partials, bool is_float64, const Plan& plan, std::int64_t cols,
                               std::initializer_list<Vector> gradients, cudaStream_t stream) {
  const auto is_absent = [](const Vector& gradient) { return gradient.data == nullptr; };
  if (std::all_of(gradients.begin(), gradients.end(), is_absent)) return cudaSuccess;
  FinishArguments arguments = {partials, plan.row_subsets, static_cast<int>(gradients.size()), cols, {}};
  std::copy(gradients.begin(), gradients.end(), arguments.gradients);
  return is_float64 ? launch_finish<double>(arguments, plan.overlaps, stream)
                    : launch_finish<float>(arguments, plan.overlaps, stream);
}

}  // namespace resnorm::cuda
