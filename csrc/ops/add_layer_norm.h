// SPDX-License-Identifier: BSD-3-Clause
// resnorm::add_layer_norm: sum = residual + dropout(input + input_bias), output = layer_norm(sum), in one pass.
#pragma once

#include <array>
#include <tuple>

#include "checks.h"

namespace resnorm {

// (output, sum); without `prenorm` the sum is never stored and comes back empty.
std::tuple<Tensor, Tensor> add_layer_norm(const Tensor& input, const Tensor& residual,
                                          c10::SymIntArrayRef normalized_shape, const OptionalTensor& weight,
                                          const OptionalTensor& bias, double eps, const OptionalTensor& input_bias,
                                          double dropout_p, const OptionalTensor& seed, bool prenorm,
                                          std::optional<at::ScalarType> residual_dtype);

// Writes `output`, which may be `input` or `residual`, and `sum` where given, which may be the other of the two.
void add_layer_norm_out(const Tensor& input, const Tensor& residual, c10::SymIntArrayRef normalized_shape,
                        const OptionalTensor& weight, const OptionalTensor& bias, double eps,
                        const OptionalTensor& input_bias, double dropout_p, const OptionalTensor& seed,
                        std::optional<at::ScalarType> residual_dtype, Tensor output, OptionalTensor sum);

// (output, sum, mean, rstd): what the backward pass needs besides the parameters.
std::tuple<Tensor, Tensor, Tensor, Tensor> add_layer_norm_forward(
    const Tensor& input, const Tensor& residual, c10::SymIntArrayRef normalized_shape, const OptionalTensor& weight,
    const OptionalTensor& bias, double eps, const OptionalTensor& input_bias, double dropout_p,
    const OptionalTensor& seed, std::optional<at::ScalarType> residual_dtype);

// Gradients of (input, residual, weight, bias, input_bias); those whose `output_mask` is false are empty.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> add_layer_norm_backward(
    const Tensor& grad_output, const OptionalTensor& grad_sum, const Tensor& sum, c10::SymIntArrayRef normalized_shape,
    const OptionalTensor& weight, const OptionalTensor& bias, const OptionalTensor& input_bias, const Tensor& mean,
    const Tensor& rstd, double eps, double dropout_p, const OptionalTensor& seed, at::ScalarType residual_dtype,
    std::array<bool, 5> output_mask);

// Checked arguments, allocated results: the whole of the meta kernels, the first step of every other.
std::tuple<Tensor, Tensor> add_layer_norm_meta(const Tensor& input, const Tensor& residual,
                                               c10::SymIntArrayRef normalized_shape, const OptionalTensor& weight,
                                               const OptionalTensor& bias, double eps, const OptionalTensor& input_bias,
                                               double dropout_p, const OptionalTensor& seed, bool prenorm,
                                               std::optional<at::ScalarType> residual_dtype);
void add_layer_norm_out_meta(const Tensor& input, const Tensor& residual, c10::SymIntArrayRef normalized_shape,
                             const OptionalTensor& weight, const OptionalTensor& bias, double eps,
                             const OptionalTensor& input_bias, double dropout_p, const OptionalTensor& seed,
                             std::optional<at::ScalarType> residual_dtype, Tensor output, OptionalTensor sum);
std::tuple<Tensor, Tensor, Tensor, Tensor> add_layer_norm_forward_meta(
    const Tensor& input, const Tensor& residual, c10::SymIntArrayRef normalized_shape, const OptionalTensor& weight,
    const OptionalTensor& bias, double eps, const OptionalTensor& input_bias, double dropout_p,
    const OptionalTensor& seed, std::optional<at::ScalarType> residual_dtype);
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> add_layer_norm_backward_meta(
    const Tensor& grad_output, const OptionalTensor& grad_sum, const Tensor& sum, c10::SymIntArrayRef normalized_shape,
    const OptionalTensor& weight, const OptionalTensor& bias, const OptionalTensor& input_bias, const Tensor& mean,
    const Tensor& rstd, double eps, double dropout_p, const OptionalTensor& seed, at::ScalarType residual_dtype,
    std::array<bool, 5> output_mask);

}  // namespace resnorm
