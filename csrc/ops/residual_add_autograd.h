// SPDX-License-Identifier: BSD-3-Clause
#pragma once

#include <array>
#include <tuple>

#include "support/checks.h"

namespace resnorm {

// Gradients of residual_add's (input, residual, input_bias); undefined where not wanted.
std::tuple<Tensor, Tensor, Tensor> residual_add_gradients(const Tensor& grad_output, const OptionalTensor& input_bias,
                                                          double dropout_p, const OptionalTensor& seed,
                                                          at::ScalarType input_dtype, at::ScalarType residual_dtype,
                                                          const std::array<bool, 3>& wanted);

}  // namespace resnorm
