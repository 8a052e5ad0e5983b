// SPDX-License-Identifier: BSD-3-Clause
// resnorm::linear: activation(input weight^T + bias). Each function here is the typed call of the operator that
// torch.ops.resnorm holds under the same name.
//
// With grad, under transforms and on devices other than the CPU it is torch's own operators, which differentiate
// themselves. On the CPU without grad it is oneDNN or ATen, as csrc/engine/linear/choice.h says.
#pragma once

#include "activation.h"
#include "support/checks.h"

namespace resnorm {

Tensor linear(const Tensor& input, const Tensor& weight, const OptionalTensor& bias, c10::string_view activation);

// Checked arguments, allocated result.
Tensor linear_meta(const Tensor& input, const Tensor& weight, const OptionalTensor& bias, c10::string_view activation);

// What linear_meta checks, alone.
void check_linear(const Tensor& input, const Tensor& weight, const OptionalTensor& bias);

}  // namespace resnorm
