// SPDX-License-Identifier: BSD-3-Clause
// The norms straight from their formulas, summed in long double: float64 kernels are held to them too.
#pragma once

#include "matrix.h"

namespace resnorm::cpu::testing {

struct NormalizedRows {
  Values output, scale;  // the value, and the size of the terms it is a sum of
  std::vector<double> mean, rstd;
};

inline double weight_at(const Matrix& weight, std::int64_t col) { return weight.present() ? weight(0, col) : 1.0; }

template <class Input>
long double mean_of_row(const Input& input, std::int64_t row, std::int64_t cols) {
  long double mean = 0;
  for (std::int64_t col = 0; col < cols; ++col) mean += input(row, col) / static_cast<long double>(cols);
  return mean;
}

template <class Input>
NormalizedRows normalize(const Input& input, std::int64_t rows, std::int64_t cols, const Matrix& weight,
                         const Matrix& bias, double eps, bool centered) {
  NormalizedRows result{Values(rows, cols), Values(rows, cols), {}, {}};
  for (std::int64_t row = 0; row < rows; ++row) {
    const long double mean = centered ? mean_of_row(input, row, cols) : 0;
    long double variance = 0;  // about zero where the norm is not centered
    for (std::int64_t col = 0; col < cols; ++col) {
      variance += (input(row, col) - mean) * (input(row, col) - mean) / static_cast<long double>(cols);
    }
    const long double rstd = 1.0L / std::sqrt(variance + eps);
    for (std::int64_t col = 0; col < cols; ++col) {
      const long double scaled = (input(row, col) - mean) * rstd * weight_at(weight, col);
      const double shift = bias.present() ? bias(0, col) : 0.0;
      result.output(row, col) = static_cast<double>(scaled + shift);
      result.scale(row, col) = static_cast<double>(std::fabs(scaled)) + std::fabs(shift) +
                               (centered ? std::fabs(weight_at(weight, col)) : 0);
    }
    result.mean.push_back(static_cast<double>(mean));
    result.rstd.push_back(static_cast<double>(rstd));
  }
  return result;
}

struct NormGradients {
  Values grad_input, grad_input_scale;
  Values grad_weight, grad_weight_scale, grad_bias, grad_bias_scale;
};

// `rstd` as the forward pass stored it. An absent grad_output is zero.
inline NormGradients normalize_backward(const Matrix& grad_output, const Matrix& input, const Matrix& weight,
                                        const Matrix& rstd, bool centered) {
  const auto rows = input.rows(), cols = input.cols();
  NormGradients result{Values(rows, cols), Values(rows, cols), Values(1, cols),
                       Values(1, cols),    Values(1, cols),    Values(1, cols)};
  for (std::int64_t row = 0; row < rows; ++row) {
    const long double mean = centered ? mean_of_row(input, row, cols) : 0;
    long double g_mean = 0, gx_mean = 0, g_size = 0;
    const auto grad = [&](std::int64_t col) { return grad_output.present() ? grad_output(row, col) : 0.0; };
    const auto normalized = [&](std::int64_t col) { return (input(row, col) - mean) * rstd(0, row); };
    for (std::int64_t col = 0; col < cols; ++col) {
      const long double g = grad(col) * weight_at(weight, col);
      if (centered) g_mean += g / cols;
      gx_mean += g * normalized(col) / cols;
      g_size = std::max(g_size, std::fabs(g) * (1 + std::fabs(normalized(col))));
    }
    for (std::int64_t col = 0; col < cols; ++col) {
      const long double x = normalized(col), g = grad(col) * weight_at(weight, col);
      result.grad_input(row, col) = static_cast<double>(rstd(0, row) * (g - g_mean - x * gx_mean));
      result.grad_input_scale(row, col) = static_cast<double>(rstd(0, row) * g_size * (1 + std::fabs(x)));
      result.grad_weight(0, col) += static_cast<double>(grad(col) * x);
      result.grad_weight_scale(0, col) += static_cast<double>(std::fabs(grad(col)) * (1 + std::fabs(x)));
      result.grad_bias(0, col) += grad(col);
      result.grad_bias_scale(0, col) += std::fabs(grad(col));
    }
  }
  return result;
}

}  // namespace resnorm::cpu::testing
