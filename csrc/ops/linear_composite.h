// SPDX-License-Identifier: BSD-3-Clause
// linear in torch's own operators, differentiable any number of times and under every torch.func transform.
#pragma once

#include "linear.h"

namespace resnorm::composite {

Tensor linear(const Tensor& input, const Tensor& weight, const OptionalTensor& bias, c10::string_view activation);

}  // namespace resnorm::composite
