// SPDX-License-Identifier: BSD-3-Clause
#include <algorithm>

#include "column_sums.h"
#include "column_sums_finish.cuh"
#include "launch.cuh"

namespace resnorm::cuda {

namespace {

template <class Value>
cudaError_t launch_finish(const FinishArguments& a, cudaStream_t stream) {
  const auto blocks = static_cast<int>((a.cols * a.sums + 31) / 32);
  const LaunchShape shape = {blocks, 1, kFinishThreads, kFinishThreads / 32 * 33 * static_cast<int>(sizeof(Value))};
  return launch<column_sums_finish<Value>>(shape, stream, a);
}

}  // namespace

cudaError_t finish_column_sums(const void* partials, bool is_float64, int row_subsets, std::int64_t cols,
                               std::initializer_list<Vector> gradients, cudaStream_t stream) {
  const auto is_absent = [](const Vector& gradient) { return gradient.data == nullptr; };
  if (std::all_of(gradients.begin(), gradients.end(), is_absent)) return cudaSuccess;
  FinishArguments arguments = {partials, row_subsets, static_cast<int>(gradients.size()), cols, {}};
  std::copy(gradients.begin(), gradients.end(), arguments.gradients);
  return is_float64 ? launch_finish<double>(arguments, stream) : launch_finish<float>(arguments, stream);
}

}  // namespace resnorm::cuda
