// SPDX-License-Identifier: BSD-3-Clause
// The activations and their derivatives by the C library's erfc and exp, in extended precision.
#pragma once

#include <cmath>
#include <numbers>

#include "kernels/arguments.h"

namespace resnorm::cpu::testing {

struct Activated {
  long double value, derivative;
};

inline Activated gelu(long double x) {
  const auto cdf = std::erfc(-x / std::numbers::sqrt2_v<long double>) / 2;
  const auto density =
      std::exp(-x * x / 2) * std::numbers::inv_sqrtpi_v<long double> / std::numbers::sqrt2_v<long double>;
  return {x * cdf, cdf + x * density};
}

inline Activated gelu_tanh(long double x) {
  constexpr auto scale = std::numbers::sqrt2_v<long double> * std::numbers::inv_sqrtpi_v<long double>;
  const auto logistic = [](long double t) { return 1 / (1 + std::exp(-t)); };
  const auto t = 2 * scale * (x + 0.044715L * x * x * x);
  const auto cdf = logistic(t), density = cdf * logistic(-t) * 2 * scale * (1 + 3 * 0.044715L * x * x);
  return {x * cdf, cdf + x * density};
}

inline Activated activated(Activation activation, long double x) {
  switch (activation) {
    case Activation::kRelu:
      return {x <= 0 ? 0 : x, x <= 0 ? 0.0L : 1.0L};
    case Activation::kGelu:
      return gelu(x);
    default:
      return gelu_tanh(x);
  }
}

inline const char* name_of(Activation activation) {
  switch (activation) {
    case Activation::kRelu:
      return "relu";
    case Activation::kGelu:
      return "gelu";
    default:
      return "gelu_tanh";
  }
}

}  // namespace resnorm::cpu::testing
