// SPDX-License-Identifier: BSD-3-Clause
#include <torch/library.h>

#include "../../engine/layer_weights.h"
#include "../../engine/linear/choice.h"
#include "../linear.h"

namespace resnorm {

namespace {

Tensor linear_cpu(const Tensor& input, const Tensor& weight, const OptionalTensor& bias, c10::string_view activation) {
  check_linear(input, weight, bias);
  const auto dtype = input.scalar_type();
  // Prepacking a weight for one call would not pay, nor would copying one that is transposed: where prepacked ones are
  // best, oneDNN takes those that are not.
  const bool by_onednn = input.numel() > 0 && weight.numel() > 0 && weight.is_contiguous() &&
                         engine::onednn.supports(dtype) &&
                         &engine::linear_backend(dtype, weight.size(1), weight.size(0)) != &engine::aten;
  return engine::multiply(by_onednn ? engine::onednn : engine::aten, input, weight, bias, parse_activation(activation),
                          weight.size(0));
}

}  // namespace

TORCH_LIBRARY_IMPL(resnorm, CPU, m) { m.impl("linear", linear_cpu); }

}  // namespace resnorm
