// SPDX-License-Identifier: BSD-3-Clause
// Linear layers by the project's own kernel, from weights in its own layout. Without autograd.
#pragma once

#include "../linear.h"

namespace resnorm::prepacked_linear {

// Whether the kernels in use pack weights of `dtype`.
bool supports(at::ScalarType dtype);

// `weight`, (out_features, in_features), in the layout of the kernels in use: opaque, one-dimensional, of its dtype.
Tensor prepack_weight(const Tensor& weight);

// activation(input weight^T + bias) into `output`; input and output are matrices, `output` contiguous, `weight`
// prepacked.
void linear_out(const Tensor& input, const Tensor& weight, const OptionalTensor& bias, Activation activation,
                const Tensor& output);

// As resnorm::linear; `weight` is prepacked.
Tensor linear(const Tensor& input, const Tensor& weight, int64_t out_features, const OptionalTensor& bias,
              Activation activation);

}  // namespace resnorm::prepacked_linear
