// SPDX-License-Identifier: BSD-3-Clause
// residual_add in torch's own operators; see norm_composite.h.
#pragma once

#include "residual_add.h"

namespace resnorm::composite {

Tensor residual_add(const Tensor& input, const Tensor& residual, const OptionalTensor& input_bias, double dropout_p,
                    const OptionalTensor& seed, std::optional<at::ScalarType> residual_dtype);

std::tuple<Tensor, Tensor> residual_add_backward(const Tensor& grad_output, const OptionalTensor& input_bias,
                                                 double dropout_p, const OptionalTensor& seed,
                                                 at::ScalarType input_dtype, std::array<bool, 2> output_mask);

// residual + dropout(input + input_bias), unrounded: in the accumulation type of the operands and `sum_dtype`.
Tensor exact_sum(const Tensor& input, const Tensor& residual, const OptionalTensor& input_bias, double dropout_p,
                 const OptionalTensor& seed, at::ScalarType sum_dtype);

}  // namespace resnorm::composite
