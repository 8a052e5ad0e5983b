// SPDX-License-Identifier: BSD-3-Clause
// bias_activation in torch's own operators; see norm_composite.h.
#pragma once

#include "bias_activation.h"
#include "support/materialized.h"

namespace resnorm::composite {

Tensor bias_activation(const Tensor& input, const OptionalTensor& bias, c10::string_view activation, double dropout_p,
                       const OptionalTensor& seed);

std::tuple<Tensor, Tensor, Tensor> bias_activation_backward(const Tensor& grad_output, const Tensor& input,
                                                            const OptionalTensor& bias, c10::string_view activation,
                                                            double dropout_p, const OptionalTensor& seed,
                                                            std::array<bool, 3> output_mask);

// As kernels of a device.
using BiasActivation = Materialized<bias_activation_meta, bias_activation>;
using BiasActivationBackward = Materialized<bias_activation_backward_meta, bias_activation_backward>;

}  // namespace resnorm::composite
