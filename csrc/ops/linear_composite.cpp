// SPDX-License-Identifier: BSD-3-Clause
#include "linear_composite.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/linear.h>
#include <torch/library.h>

#include "activation_composite.h"

namespace resnorm::composite {

Tensor linear(const Tensor& input, const Tensor& weight, const OptionalTensor& bias, c10::string_view activation,
              const OptionalTensor& residual) {
  check_linear(input, weight, bias, residual);
  const auto output = activate(parse_activation(activation), at::linear(input, weight, bias));
  return residual.has_value() ? output + *residual : output;
}

TORCH_LIBRARY_IMPL(resnorm, CompositeExplicitAutograd, m) { m.impl("linear", linear); }

TORCH_LIBRARY_IMPL(resnorm, FuncTorchBatched, m) { m.impl("linear", linear); }

}  // namespace resnorm::composite
