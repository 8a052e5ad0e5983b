// SPDX-License-Identifier: BSD-3-Clause
#include "linear_composite.h"

#include <ATen/ops/linear.h>
#include <torch/library.h>

#include "activation_composite.h"

namespace resnorm::composite {

Tensor linear(const Tensor& input, const Tensor& weight, const OptionalTensor& bias, c10::string_view activation) {
  check_linear(input, weight, bias);
  return activate(parse_activation(activation), at::linear(input, weight, bias));
}

TORCH_LIBRARY_IMPL(resnorm, CompositeExplicitAutograd, m) { m.impl("linear", linear); }

TORCH_LIBRARY_IMPL(resnorm, FuncTorchBatched, m) { m.impl("linear", linear); }

}  // namespace resnorm::composite
