// SPDX-License-Identifier: BSD-3-Clause
// resnorm::feed_forward: dropout(activation(input weight1^T + bias1)) weight2^T + bias2, the position-wise feed-forward
// block of a Transformer. Each function here is the typed call of the operator that torch.ops.resnorm holds under the
// same name.
//
// For a backward pass on the CPU it keeps the first product alone: what the second one multiplies is computed again,
// together with the gradients that need the first one anyway.
#pragma once

#include "support/checks.h"

namespace resnorm {

Tensor feed_forward(const Tensor& input, const Tensor& weight1, const OptionalTensor& bias1, const Tensor& weight2,
                    const OptionalTensor& bias2, c10::string_view activation, double dropout_p,
                    const OptionalTensor& seed);

// What of the arguments no other operator checks under this one's name.
void check_feed_forward(const Tensor& input, c10::string_view activation, double dropout_p, const OptionalTensor& seed);

namespace composite {

// One operator after the other.
Tensor feed_forward(const Tensor& input, const Tensor& weight1, const OptionalTensor& bias1, const Tensor& weight2,
                    const OptionalTensor& bias2, c10::string_view activation, double dropout_p,
                    const OptionalTensor& seed);

}  // namespace composite

}  // namespace resnorm
