// SPDX-License-Identifier: BSD-3-Clause
#include "norm_forward.h"

#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include "../../kernels/cuda/norm_forward.h"
#include "launch.h"

namespace resnorm {

void norm_forward_cuda(const char* op, int64_t row_dims, const NormForwardInputs& inputs,
                       const NormForwardResults& results) {
  const auto& input = inputs.input;
  const c10::cuda::CUDAGuard guard(input.device());
  const auto counts = row_counts(input, row_dims);
  const RowView input_rows(input, row_dims);
  std::optional<RowView> residual_rows;
  if (inputs.residual.has_value()) residual_rows.emplace(*inputs.residual, row_dims);
  const VectorView weight(inputs.weight), bias(inputs.bias), input_bias(inputs.input_bias);
  const AddLayerNormForward arguments = {
      .rows = counts.rows,
      .cols = counts.cols,
      .input = input_rows.const_rows(),
      .residual = residual_rows.has_value() ? residual_rows->const_rows() : ConstRows{},
      .input_bias = input_bias.const_vector(),
      .weight = weight.const_vector(),
      .bias = bias.const_vector(),
      .dropout = dropout_of(inputs.dropout_p),
      .eps = inputs.eps,
      .output = results.output,
      .sum = results.sum,
      .mean = results.mean,
      .rstd = results.rstd};
  const auto plan = cuda::norm_forward_plan(arguments, current_device());
  const auto error = cuda::norm_forward(arguments, plan, seed_address(arguments.dropout, inputs.seed),
                                        c10::cuda::getCurrentCUDAStream());
  check_launch(error, op, counts, plan);
}

}  // namespace resnorm
