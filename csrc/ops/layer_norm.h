// SPDX-License-Identifier: BSD-3-Clause
// resnorm::layer_norm, as torch.nn.functional.layer_norm. Each function here is the typed call of the operator that
// torch.ops.resnorm holds under the same name: one definition, whichever door a caller takes.
#pragma once

#include <array>
#include <tuple>

#include "checks.h"

namespace resnorm {

Tensor layer_norm(const Tensor& input, c10::SymIntArrayRef normalized_shape, const OptionalTensor& weight,
                  const OptionalTensor& bias, double eps);

// Writes into `output`, which may be `input` itself.
void layer_norm_out(const Tensor& input, c10::SymIntArrayRef normalized_shape, const OptionalTensor& weight,
                    const OptionalTensor& bias, double eps, Tensor output);

// (output, mean, rstd): what the backward pass needs besides the input.
std::tuple<Tensor, Tensor, Tensor> layer_norm_forward(const Tensor& input, c10::SymIntArrayRef normalized_shape,
                                                      const OptionalTensor& weight, const OptionalTensor& bias,
                                                      double eps);

// Gradients of (input, weight, bias); those whose `output_mask` is false are empty.
std::tuple<Tensor, Tensor, Tensor> layer_norm_backward(const Tensor& grad_output, const Tensor& input,
                                                       c10::SymIntArrayRef normalized_shape,
                                                       const OptionalTensor& weight, const OptionalTensor& bias,
                                                       const Tensor& mean, const Tensor& rstd, double eps,
                                                       std::array<bool, 3> output_mask);

// Checked arguments, allocated results: the whole of the meta kernels, the first step of every other.
Tensor layer_norm_meta(const Tensor& input, c10::SymIntArrayRef normalized_shape, const OptionalTensor& weight,
                       const OptionalTensor& bias, double eps);
void layer_norm_out_meta(const Tensor& input, c10::SymIntArrayRef normalized_shape, const OptionalTensor& weight,
                         const OptionalTensor& bias, double eps, Tensor output);
std::tuple<Tensor, Tensor, Tensor> layer_norm_forward_meta(const Tensor& input, c10::SymIntArrayRef normalized_shape,
                                                           const OptionalTensor& weight, const OptionalTensor& bias,
                                                           double eps);
std::tuple<Tensor, Tensor, Tensor> layer_norm_backward_meta(const Tensor& grad_output, const Tensor& input,
                                                            c10::SymIntArrayRef normalized_shape,
                                                            const OptionalTensor& weight, const OptionalTensor& bias,
                                                            const Tensor& mean, const Tensor& rstd, double eps,
                                                            std::array<bool, 3> output_mask);

}  // namespace resnorm
