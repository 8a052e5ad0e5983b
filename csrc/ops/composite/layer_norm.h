// SPDX-License-Identifier: BSD-3-Clause
// layer_norm in torch's own operators, differentiable any number of times and under every torch.func transform. It
// serves devices without kernels of ours, transforms and double backward.
#pragma once

#include "../layer_norm.h"

namespace resnorm::composite {

Tensor layer_norm(const Tensor& input, c10::SymIntArrayRef normalized_shape, const OptionalTensor& weight,
                  const OptionalTensor& bias, double eps);

// The statistics are recomputed from the input, so that their dependence on it is differentiated too.
std::tuple<Tensor, Tensor, Tensor> layer_norm_backward(const Tensor& grad_output, const Tensor& input,
                                                       c10::SymIntArrayRef normalized_shape,
                                                       const OptionalTensor& weight, const OptionalTensor& bias,
                                                       const Tensor& mean, const Tensor& rstd, double eps,
                                                       std::array<bool, 3> output_mask);

// (output, mean, rstd) in the dtype of `input`, to which the parameters are converted.
std::tuple<Tensor, Tensor, Tensor> normalize(const Tensor& input, c10::SymIntArrayRef normalized_shape,
                                             const OptionalTensor& weight, const OptionalTensor& bias, double eps);

struct NormalizeGradients {
  Tensor input, weight, bias;
};

// Gradients of `normalize`, all in the dtype of `input`.
NormalizeGradients normalize_backward(const Tensor& grad_output, const Tensor& input,
                                      c10::SymIntArrayRef normalized_shape, const OptionalTensor& weight, double eps);

// `gradient` in the dtype of what it belongs to, or the stand-in, like `like`, for one that was not asked for.
Tensor requested_gradient(bool wanted, const Tensor& gradient, at::ScalarType dtype, const Tensor& like);

}  // namespace resnorm::composite
