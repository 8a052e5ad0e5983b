// SPDX-License-Identifier: BSD-3-Clause
#include "../layer_norm.h"

#include <torch/library.h>

#include "../overlap.h"
#include "norm_backward.h"
#include "norm_forward.h"

namespace resnorm {

namespace {

Tensor layer_norm_cuda(const Tensor& input, c10::SymIntArrayRef normalized_shape, const OptionalTensor& weight,
                       const OptionalTensor& bias, double eps) {
  auto output = layer_norm_meta(input, normalized_shape, weight, bias, eps);
  if (output.numel() == 0) return output;
  const auto row_dims = static_cast<int64_t>(normalized_shape.size());
  const auto cols = row_counts(output, row_dims).cols;
  norm_forward_cuda("layer_norm", row_dims, {.input = input, .weight = weight, .bias = bias, .eps = eps},
                    {.output = result_rows(output, cols, true)});
  return output;
}

void layer_norm_out_cuda(const Tensor& input, c10::SymIntArrayRef normalized_shape, const OptionalTensor& weight,
                         const OptionalTensor& bias, double eps, Tensor output) {
  layer_norm_out_meta(input, normalized_shape, weight, bias, eps, output);
  check_overlap(output, {input}, {weight, bias});
  if (output.numel() == 0) return;
  const auto row_dims = static_cast<int64_t>(normalized_shape.size());
  OutputRows output_rows(output, row_dims);
  norm_forward_cuda("layer_norm", row_dims, {.input = input, .weight = weight, .bias = bias, .eps = eps},
                    {.output = output_rows.rows()});
  output_rows.commit();
}

std::tuple<Tensor, Tensor, Tensor> layer_norm_forward_cuda(const Tensor& input, c10::SymIntArrayRef normalized_shape,
                                                           const OptionalTensor& weight, const OptionalTensor& bias,
                                                           double eps) {
  auto results = layer_norm_forward_meta(input, normalized_shape, weight, bias, eps);
  const auto& [output, mean, rstd] = results;
  if (output.numel() == 0) return results;
  const auto row_dims = static_cast<int64_t>(normalized_shape.size());
  const auto cols = row_counts(output, row_dims).cols;
  norm_forward_cuda(
      "layer_norm", row_dims, {.input = input, .weight = weight, .bias = bias, .eps = eps},
      {.output = result_rows(output, cols, true), .mean = mean.mutable_data_ptr(), .rstd = rstd.mutable_data_ptr()});
  return results;
}

std::tuple<Tensor, Tensor, Tensor> layer_norm_backward_cuda(const Tensor& grad_output, const Tensor& input,
                                                            c10::SymIntArrayRef normalized_shape,
                                                            const OptionalTensor& weight, const OptionalTensor& bias,
                                                            const Tensor& mean, const Tensor& rstd, double eps,
                                                            std::array<bool, 3> output_mask) {
  auto results =
      layer_norm_backward_meta(grad_output, input, normalized_shape, weight, bias, mean, rstd, eps, output_mask);
  const auto& [grad_input, grad_weight, grad_bias] = results;
  const auto row_dims = static_cast<int64_t>(normalized_shape.size());
  const auto cols = row_counts(input, row_dims).cols;
  if (cols == 0) return results;  // all of them empty
  norm_backward_cuda("layer_norm", row_dims, {false, grad_output, input, std::nullopt, weight, mean, rstd},
                     {.grad_input = result_rows(grad_input, cols, output_mask[0]),
                      .grad_weight = result_vector(grad_weight, output_mask[1]),
                      .grad_bias = result_vector(grad_bias, output_mask[2])});
  return results;
}

}  // namespace

TORCH_LIBRARY_IMPL(resnorm, CUDA, m) {
  m.impl("layer_norm", layer_norm_cuda);
  m.impl("layer_norm_out", layer_norm_out_cuda);
  m.impl("_layer_norm_forward", layer_norm_forward_cuda);
  m.impl("_layer_norm_backward", layer_norm_backward_cuda);
}

}  // namespace resnorm
