// SPDX-License-Identifier: BSD-3-Clause
// resnorm::bias_activation: dropout(activation(input + bias)), in one pass.
#pragma once

#include <array>
#include <tuple>

#include "activation.h"
#include "support/checks.h"

namespace resnorm {

Tensor bias_activation(const Tensor& input, const OptionalTensor& bias, c10::string_view activation, double dropout_p,
                       const OptionalTensor& seed);

// Writes into `output`, which may be `input`.
void bias_activation_out(const Tensor& input, const OptionalTensor& bias, c10::string_view activation, double dropout_p,
                         const OptionalTensor& seed, Tensor output);

// Gradients of (input, bias), and the output computed again; those whose `output_mask` is false are empty.
std::tuple<Tensor, Tensor, Tensor> bias_activation_backward(const Tensor& grad_output, const Tensor& input,
                                                            const OptionalTensor& bias, c10::string_view activation,
                                                            double dropout_p, const OptionalTensor& seed,
                                                            std::array<bool, 3> output_mask);

// Checked arguments, allocated results: the whole of the meta kernels, the first step of every other.
Tensor bias_activation_meta(const Tensor& input, const OptionalTensor& bias, c10::string_view activation,
                            double dropout_p, const OptionalTensor& seed);
void bias_activation_out_meta(const Tensor& input, const OptionalTensor& bias, c10::string_view activation,
                              double dropout_p, const OptionalTensor& seed, Tensor output);
std::tuple<Tensor, Tensor, Tensor> bias_activation_backward_meta(const Tensor& grad_output, const Tensor& input,
                                                                 const OptionalTensor& bias,
                                                                 c10::string_view activation, double dropout_p,
                                                                 const OptionalTensor& seed,
                                                                 std::array<bool, 3> output_mask);

}  // namespace resnorm
