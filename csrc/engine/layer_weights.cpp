// SPDX-License-Identifier: BSD-3-Clause
#include "layer_weights.h"

#include "../ops/cpu/onednn_linear.h"
#include "../ops/cpu/prepacked_linear.h"

namespace resnorm::engine {

Tensor PreparedLinear::operator()(const Tensor& input, c10::string_view activation) const {
  switch (backend) {
    case LinearBackend::kAten:
      return linear(input, weight, bias, activation, std::nullopt);
    case LinearBackend::kOneDnn:
      return onednn::linear(input, weight, bias, parse_activation(activation), std::nullopt);
    case LinearBackend::kResnorm:
      return prepacked_linear::linear(input, weight, out_features, bias, parse_activation(activation));
  }
  TORCH_INTERNAL_ASSERT(false, "unknown backend");
}

Tensor PreparedLinear::multiply(const Tensor& input, const Tensor& memory, c10::string_view activation) const {
  TORCH_CHECK(memory.size(1) == out_features, "Expected a linear layer of ", memory.size(1),
              " output features, but got one of ", out_features);
  if (backend != LinearBackend::kResnorm) return (*this)(input, activation);
  prepacked_linear::linear_out(input, weight, bias, parse_activation(activation), memory);
  return memory;
}

}  // namespace resnorm::engine
