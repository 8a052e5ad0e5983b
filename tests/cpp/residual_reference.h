// SPDX-License-Identifier: BSD-3-Clause
// residual + dropout(input + input_bias) straight from the formula.
#pragma once

#include "fixture.h"
#include "norm_reference.h"

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

// From the gradient of the norm's input to those of what it is a sum of. `norm` and the scales grow by grad_sum.
struct ResidualGradients {
  Values input, input_scale, input_bias, input_bias_scale;
};

inline ResidualGradients residual_gradients(NormGradients& norm, const Matrix& grad_sum, const Dropout& dropout,
                                            const KeepMask& kept, Shape shape) {
  const auto [rows, cols] = shape;
  ResidualGradients result{Values(rows, cols), Values(rows, cols), Values(1, cols), Values(1, cols)};
  for (std::int64_t row = 0; row < rows; ++row) {
    for (std::int64_t col = 0; col < cols; ++col) {
      if (grad_sum.present()) {
        norm.grad_input(row, col) += grad_sum(row, col);
        norm.grad_input_scale(row, col) += std::fabs(grad_sum(row, col));
      }
      if (!kept(row, col)) continue;
      result.input(row, col) = norm.grad_input(row, col) * dropout.scale;
      result.input_scale(row, col) = norm.grad_input_scale(row, col) * dropout.scale;
      result.input_bias(0, col) += result.input(row, col);
      result.input_bias_scale(0, col) += result.input_scale(row, col);
    }
  }
  return result;
}

}  // namespace resnorm::cpu::testing
