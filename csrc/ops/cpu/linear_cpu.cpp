// SPDX-License-Identifier: BSD-3-Clause
#include <torch/library.h>

#include "../../engine/layer_weights.h"
#include "../../engine/linear/choice.h"
#include "../linear.h"

namespace resnorm {

namespace {

Tensor linear_cpu(const Tensor& input, const Tensor& weight, const OptionalTensor& bias, c10::string_view activation) {
  check_linear(input, weight, bias);
  const auto& backend = input.numel() > 0 ? engine::unpacked_backend(weight) : engine::aten;
  return engine::multiply(backend, input, weight, bias, parse_activation(activation), weight.size(0));
}

}  // namespace

TORCH_LIBRARY_IMPL(resnorm, CPU, m) { m.impl("linear", linear_cpu); }

}  // namespace resnorm
