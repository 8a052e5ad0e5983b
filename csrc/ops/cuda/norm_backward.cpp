// SPDX-License-Identifier: BSD-3-Clause
#include "norm_backward.h"

#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include "../../kernels/cuda/norm_backward.h"
#include "launch.h"

namespace resnorm {

void norm_backward_cuda(const char* op, int64_t row_dims, const NormBackwardInputs& inputs,
                        const NormBackwardResults& results) {
  const auto& sum = inputs.sum;
  const c10::cuda::CUDAGuard guard(sum.device());
  const auto counts = row_counts(sum, row_dims);
  const RowView grad_output_rows(inputs.grad_output, row_dims), sum_rows(sum, row_dims);
  std::optional<RowView> grad_sum_rows;
  if (inputs.grad_sum.has_value()) grad_sum_rows.emplace(*inputs.grad_sum, row_dims);
  const VectorView weight(inputs.weight), mean(inputs.mean), rstd(inputs.rstd);
  AddLayerNormBackward arguments = {.rows = counts.rows,
                                    .cols = counts.cols,
                                    .grad_output = grad_output_rows.const_rows(),
                                    .grad_sum = grad_sum_rows.has_value() ? grad_sum_rows->const_rows() : ConstRows{},
                                    .sum = sum_rows.const_rows(),
                                    .weight = weight.const_vector(),
                                    .mean = mean.const_vector().data,
                                    .rstd = rstd.const_vector().data,
                                    .dropout = dropout_of(inputs.dropout_p),
                                    .grad_input = results.grad_input,
                                    .grad_residual = results.grad_residual,
                                    .grad_weight = results.grad_weight,
                                    .grad_bias = results.grad_bias,
                                    .grad_input_bias = results.grad_input_bias};
  const auto plan = cuda::norm_backward_plan(arguments, inputs.adds, current_device());
  const auto workspace = device_workspace(cuda::norm_backward_workspace_bytes(arguments, plan), sum);
  arguments.workspace = workspace.mutable_data_ptr();
  const auto error = cuda::norm_backward(arguments, inputs.adds, plan, seed_address(arguments.dropout, inputs.seed),
                                         c10::cuda::getCurrentCUDAStream());
  check_launch(error, op, counts, plan);
}

}  // namespace resnorm
