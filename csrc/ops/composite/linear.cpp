// SPDX-License-Identifier: BSD-3-Clause
#include "linear.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/gelu.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/relu.h>
#include <torch/library.h>

namespace resnorm::composite {

namespace {

Tensor activate(Activation activation, const Tensor& product) {
  switch (activation) {
    case Activation::kNone:
      return product;
    case Activation::kRelu:
      return at::relu(product);
    case Activation::kGelu:
      return at::gelu(product);
    case Activation::kGeluTanh:
      return at::gelu(product, "tanh");
  }
  TORCH_INTERNAL_ASSERT(false, "unknown activation");
}

}  // namespace

Tensor linear(const Tensor& input, const Tensor& weight, const OptionalTensor& bias, c10::string_view activation,
              const OptionalTensor& residual) {
  check_linear(input, weight, bias, residual);
  const auto output = activate(parse_activation(activation), at::linear(input, weight, bias));
  return residual.has_value() ? output + *residual : output;
}

TORCH_LIBRARY_IMPL(resnorm, CompositeExplicitAutograd, m) { m.impl("linear", linear); }

TORCH_LIBRARY_IMPL(resnorm, FuncTorchBatched, m) { m.impl("linear", linear); }

}  // namespace resnorm::composite
