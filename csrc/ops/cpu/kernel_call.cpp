// SPDX-License-Identifier: BSD-3-Clause
#include "kernel_call.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#include <stdexcept>

#include "../../kernels/cpu/dispatch.h"
#include "../dropout.h"

namespace resnorm {

Dropout kernel_dropout(double p, const std::optional<at::Tensor>& seed) {
  const auto threshold = dropout_threshold(p);
  if (threshold == 0) return {};
  return {threshold, dropout_scale(threshold), static_cast<std::uint64_t>(seed->item<int64_t>())};
}

at::Tensor backward_workspace(RowCounts counts, int column_sums, at::ScalarType accumulation) {
  const auto bytes = cpu::backward_workspace_bytes(counts.rows, counts.cols, column_sums, kernel_dtype(accumulation));
  return at::empty({static_cast<int64_t>(bytes)}, at::TensorOptions().dtype(at::kByte));
}

const cpu::KernelTable& cpu_kernels() {
  try {
    return cpu::kernels();
  } catch (const std::invalid_argument& error) {
    TORCH_CHECK_VALUE(false, error.what());
  }
}

void parallel_for(int64_t count, int64_t grain, cpu::RangeBody body, const void* context) {
  at::parallel_for(0, count, grain, [=](int64_t begin, int64_t end) { body(context, begin, end); });
}

}  // namespace resnorm
