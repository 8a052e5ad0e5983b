// SPDX-License-Identifier: BSD-3-Clause
// add_layer_norm in torch's own operators; see layer_norm.h beside this file.
#pragma once

#include "../add_layer_norm.h"

namespace resnorm::composite {

std::tuple<Tensor, Tensor> add_layer_norm(const Tensor& input, const Tensor& residual,
                                          c10::SymIntArrayRef normalized_shape, const OptionalTensor& weight,
                                          const OptionalTensor& bias, double eps, const OptionalTensor& input_bias,
                                          double dropout_p, const OptionalTensor& seed, bool prenorm,
                                          std::optional<at::ScalarType> residual_dtype);

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> add_layer_norm_backward(
    const Tensor& grad_output, const OptionalTensor& grad_sum, const Tensor& sum, c10::SymIntArrayRef normalized_shape,
    const OptionalTensor& weight, const OptionalTensor& bias, const OptionalTensor& input_bias, const Tensor& mean,
    const Tensor& rstd, double eps, double dropout_p, const OptionalTensor& seed, at::ScalarType residual_dtype,
    std::array<bool, 5> output_mask);

}  // namespace resnorm::composite
