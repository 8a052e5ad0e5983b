// SPDX-License-Identifier: BSD-3-Clause
#include "backend.h"

#include <c10/util/accumulate.h>

namespace resnorm::engine {

Tensor multiply(const LinearBackend& backend, const Tensor& input, const Tensor& weight, const OptionalTensor& bias,
                Activation activation, int64_t out_features) {
  auto sizes = input.sizes().vec();
  const auto in_features = sizes.back();
  sizes.pop_back();
  const auto rows = c10::multiply_integers(sizes);
  sizes.push_back(out_features);
  return backend.multiply(input.reshape({rows, in_features}), weight, bias, activation, out_features, {}).view(sizes);
}

}  // namespace resnorm::engine
