// SPDX-License-Identifier: BSD-3-Clause
#include <torch/library.h>

#include "linear.h"
#include "linear_composite.h"
#include "support/transforms.h"

namespace resnorm {

namespace {

Tensor linear_autograd(const Tensor& input, const Tensor& weight, const OptionalTensor& bias,
                       c10::string_view activation) {
  if (needs_formula(input, weight, bias) || requires_grad(input, weight, bias)) {
    return composite::linear(input, weight, bias, activation);
  }
  at::AutoDispatchBelowADInplaceOrView guard;
  return linear(input, weight, bias, activation);
}

}  // namespace

TORCH_LIBRARY_IMPL(resnorm, Autograd, m) { m.impl("linear", linear_autograd); }

}  // namespace resnorm
