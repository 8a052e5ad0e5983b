// SPDX-License-Identifier: BSD-3-Clause
// resnorm::residual_add: residual + dropout(input + input_bias), in one pass.
#pragma once

#include <array>
#include <tuple>

#include "support/checks.h"

namespace resnorm {

Tensor residual_add(const Tensor& input, const Tensor& residual, const OptionalTensor& input_bias, double dropout_p,
                    const OptionalTensor& seed, std::optional<at::ScalarType> residual_dtype);

// Writes into `output`, which may be `input` or `residual`.
void residual_add_out(const Tensor& input, const Tensor& residual, const OptionalTensor& input_bias, double dropout_p,
                      const OptionalTensor& seed, std::optional<at::ScalarType> residual_dtype, Tensor output);

// Gradients of (input, input_bias), the first of dtype `input_dtype`; those whose `output_mask` is false are empty. The
// residual's gradient is grad_output.
std::tuple<Tensor, Tensor> residual_add_backward(const Tensor& grad_output, const OptionalTensor& input_bias,
                                                 double dropout_p, const OptionalTensor& seed,
                                                 at::ScalarType input_dtype, std::array<bool, 2> output_mask);

// Checked arguments, allocated results: the whole of the meta kernels, the first step of every other.
Tensor residual_add_meta(const Tensor& input, const Tensor& residual, const OptionalTensor& input_bias,
                         double dropout_p, const OptionalTensor& seed, std::optional<at::ScalarType> residual_dtype);
void residual_add_out_meta(const Tensor& input, const Tensor& residual, const OptionalTensor& input_bias,
                           double dropout_p, const OptionalTensor& seed, std::optional<at::ScalarType> residual_dtype,
                           Tensor output);
std::tuple<Tensor, Tensor> residual_add_backward_meta(const Tensor& grad_output, const OptionalTensor& input_bias,
                                                      double dropout_p, const OptionalTensor& seed,
                                                      at::ScalarType input_dtype, std::array<bool, 2> output_mask);

}  // namespace resnorm
