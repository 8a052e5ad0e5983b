// SPDX-License-Identifier: BSD-3-Clause
// The activations and their derivatives in torch's own operators.
#pragma once

#include "activation.h"
#include "support/checks.h"

namespace resnorm::composite {

Tensor activate(Activation activation, const Tensor& input);
void activate_in_place(Activation activation, Tensor& tensor);

// grad_output times the derivative at `input`; differentiable in both.
Tensor activate_backward(Activation activation, const Tensor& grad_output, const Tensor& input);

}  // namespace resnorm::composite
