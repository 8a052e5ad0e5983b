// SPDX-License-Identifier: BSD-3-Clause
// layer_norm's forward on CUDA; out= and the backward pass take torch's operators (composite/).
#include "../layer_norm.h"

#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include "../../kernels/cuda/layer_norm_forward.h"
#include "../cpu/operands.h"

namespace resnorm {

namespace {

void run_forward(const Tensor& input, int64_t row_dims, const OptionalTensor& weight, const OptionalTensor& bias,
                 double eps, const Tensor& output, void* mean, void* rstd) {
  const c10::cuda::CUDAGuard guard(input.device());
  const auto counts = row_counts(input, row_dims);
  const RowView input_rows(input, row_dims);
  const VectorView weight_view(weight), bias_view(bias);
  C10_CUDA_CHECK(cuda::layer_norm_forward({.rows = counts.rows,
                                           .cols = counts.cols,
                                           .input = input_rows.const_rows(),
                                           .weight = weight_view.const_vector(),
                                           .bias = bias_view.const_vector(),
                                           .eps = eps,
                                           .output = result_rows(output, counts.cols, true),
                                           .mean = mean,
                                           .rstd = rstd},
                                          c10::cuda::getCurrentCUDAStream()));
}

Tensor layer_norm_cuda(const Tensor& input, c10::SymIntArrayRef normalized_shape, const OptionalTensor& weight,
                       const OptionalTensor& bias, double eps) {
  auto output = layer_norm_meta(input, normalized_shape, weight, bias, eps);
  if (output.numel() == 0) return output;
  run_forward(input, static_cast<int64_t>(normalized_shape.size()), weight, bias, eps, output, nullptr, nullptr);
  return output;
}

std::tuple<Tensor, Tensor, Tensor> layer_norm_forward_cuda(const Tensor& input, c10::SymIntArrayRef normalized_shape,
                                                           const OptionalTensor& weight, const OptionalTensor& bias,
                                                           double eps) {
  auto results = layer_norm_forward_meta(input, normalized_shape, weight, bias, eps);
  const auto& [output, mean, rstd] = results;
  if (output.numel() == 0) return results;
  run_forward(input, static_cast<int64_t>(normalized_shape.size()), weight, bias, eps, output, mean.mutable_data_ptr(),
              rstd.mutable_data_ptr());
  return results;
}

}  // namespace

TORCH_LIBRARY_IMPL(resnorm, CUDA, m) {
  m.impl("layer_norm", layer_norm_cuda);
  m.impl("_layer_norm_forward", layer_norm_forward_cuda);
}

}  // namespace resnorm
