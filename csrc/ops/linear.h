// SPDX-License-Identifier: BSD-3-Clause
// resnorm::linear: activation(input weight^T + bias). Each function here is the typed call of the operator that
// torch.ops.resnorm holds under the same name.
//
// On the CPU it is oneDNN or ATen, as csrc/engine/linear/choice.h says. Under transforms, where somebody records the
// call, and on other devices it is torch's own operators, which differentiate themselves.
#pragma once

#include "activation.h"
#include "support/checks.h"

namespace resnorm {

Tensor linear(const Tensor& input, const Tensor& weight, const OptionalTensor& bias, c10::string_view activation);

// Checked arguments, allocated result.
Tensor linear_meta(const Tensor& input, const Tensor& weight, const OptionalTensor& bias, c10::string_view activation);

// input weight^T + bias, differentiable, of plain tensors on the CPU by the backend that is the fastest one for weights
// that change at every step, of others by torch's own operators.
bool has_training_product(const Tensor& input, const Tensor& weight);
Tensor training_product(const Tensor& input, const Tensor& weight, const OptionalTensor& bias = std::nullopt);

// The gradients of its weight and bias, differentiable.
Tensor weight_gradient(const Tensor& grad_output, const Tensor& input);
Tensor bias_gradient(const Tensor& grad_output);

// What linear_meta checks, alone.
void check_linear(const Tensor& input, const Tensor& weight, const OptionalTensor& bias);

}  // namespace resnorm
