// SPDX-License-Identifier: BSD-3-Clause
#include "kernel_plan.h"

#include <c10/util/Exception.h>

#include <limits>
#include <sstream>

#include "operands.h"

namespace resnorm {

std::string describe(const cuda::Plan& plan) {
  if (plan.generic) return "rows of any length, element by element";
  std::ostringstream text;
  text << plan.row_threads << " threads a row" << (plan.cluster > 1 ? " in each block" : "") << ", " << plan.items
       << (plan.shifted ? " shifted" : "") << " vectors a thread, blocks of " << plan.threads << " threads";
  if (plan.cluster > 1) text << ", clusters of " << plan.cluster << " blocks";
  if (plan.tiles > 1) text << ", " << plan.tiles << " tiles a row";
  if (plan.row_subsets > 0) text << ", " << plan.row_subsets << " subsets of the rows";
  return text.str();
}

cuda::Plan kernel_plan(const std::string& pass, int64_t cols, at::ScalarType dtype,
                       std::optional<at::ScalarType> residual_dtype, bool dropout, bool aligned, int architecture) {
  TORCH_CHECK_VALUE(cols > 0, "kernel_plan: expected a positive number of columns, got ", cols);
  const auto bytes = static_cast<int>(c10::elementSize(dtype));
  const auto residual_bytes = residual_dtype.has_value() ? static_cast<int>(c10::elementSize(*residual_dtype)) : 0;
  const bool shifted = !aligned || cols % (cuda::kVectorBytes / bytes) != 0;
  const auto branch = kernel_dtype(dtype), residual = kernel_dtype(residual_dtype.value_or(dtype));
  const bool has_kernels = cuda::has_kernels(branch, residual, residual);
  if (pass == "residual_add") {
    return has_kernels
               ? cuda::elementwise_plan(cols, bytes, shifted, cuda::kElementwiseThreads, cuda::kElementwiseItems)
               : cuda::Plan{.generic = true};
  }
  TORCH_CHECK_VALUE(pass == "norm_forward" || pass == "norm_backward",
                    "kernel_plan: expected norm_forward, norm_backward or residual_add, got ", pass);
  if (!has_kernels || cols > std::numeric_limits<int>::max() / 2) return {.generic = true};
  if (pass == "norm_forward") {
    return cuda::forward_plan(static_cast<int>(cols), bytes, residual_bytes, dropout, shifted, architecture);
  }
  // A residual's gradient comes together with one of the sum, of the residual's type.
  const int sum_bytes = residual_bytes == 0 ? bytes : 2 * residual_bytes;
  return cuda::backward_plan(static_cast<int>(cols), bytes, bytes + sum_bytes, shifted, architecture,
                             cuda::max_shared_bytes(architecture));
}

}  // namespace resnorm
