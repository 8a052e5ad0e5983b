// SPDX-License-Identifier: BSD-3-Clause
// residual + dropout(input + input_bias) straight from the formula.
#pragma once

#include "fixture.h"

namespace resnorm::cpu::testing {

struct ResidualSums {
  Values sum, scale;  // the value, and the size of the terms it is a sum of
};

// Dropped elements add nothing, not even a NaN.
inline ResidualSums residual_sum(const Matrix& input, const Matrix& residual, const Matrix& input_bias,
                                 const Dropout& dropout, const KeepMask& kept) {
  const auto rows = input.rows(), cols = input.cols();
  ResidualSums result{Values(rows, cols), Values(rows, cols)};
  for (std::int64_t row = 0; row < rows; ++row) {
    for (std::int64_t col = 0; col < cols; ++col) {
      const double bias = input_bias.present() ? input_bias(0, col) : 0.0;
      double branch = 0, scale = std::fabs(residual(row, col));
      if (kept(row, col)) {
        branch = (input(row, col) + bias) * (dropout.threshold > 0 ? dropout.scale : 1.0);
        scale += (std::fabs(input(row, col)) + std::fabs(bias)) * dropout.scale;
      }
      result.sum(row, col) = residual(row, col) + branch;
      result.scale(row, col) = scale;
    }
  }
  return result;
}

}  // namespace resnorm::cpu::testing
