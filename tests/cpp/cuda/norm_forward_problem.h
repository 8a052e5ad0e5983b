// SPDX-License-Identifier: BSD-3-Clause
// Operands for the forward kernels, and what must come of them.
#pragma once

#include "../fixture.h"
#include "../norm_reference.h"
#include "../residual_reference.h"
#include "emulated_test.h"
#include "kernels/cuda/norm_forward.h"

namespace resnorm::cuda::testing {

using namespace cpu::testing;

inline constexpr double kEps = 1e-5;

struct NormForwardProblem {
  struct Types {
    DType input, residual, sum, parameters;
  };

  friend std::ostream& operator<<(std::ostream& out, const Types& types) {
    return out << name_of(types.input) << "+" << name_of(types.residual) << " -> " << name_of(types.sum) << ", "
               << name_of(types.parameters);
  }

  struct Options {
    bool centered = true, adds = false, affine = true, input_bias = false, stores_sum = false, statistics = true;
    double dropout_p = 0.0;
    double mean = 0.0, deviation = 1.0;  // of the input
  };

  Matrix input, residual, input_bias, weight, bias, output, sum, mean, rstd;
  Dropout dropout;
  KeepMask kept;
  DType accumulation;
  bool centered;

  NormForwardProblem(std::mt19937_64& generator, Shape shape, Types types, Layout layout, Options options)
      : dropout(dropout_of(options.adds ? options.dropout_p : 0.0, kSeed)),
        kept(dropout, shape),
        accumulation(accumulation_of({types.input, options.adds ? types.sum : types.input})),
        centered(options.centered) {
    const auto [rows, cols] = shape;
    const Layout aligned_as{0, layout.offset};
    input = Matrix::random(generator, rows, cols, types.input, layout, options.mean, options.deviation);
    output = Matrix(rows, cols, types.input, layout);
    if (options.adds) residual = Matrix::random(generator, rows, cols, types.residual, layout);
    if (options.adds && options.stores_sum) sum = Matrix(rows, cols, types.sum, layout);
    const auto parameter = [&] { return Matrix::random(generator, 1, cols, types.parameters, aligned_as, 1.0); };
    if (options.affine) weight = parameter();
    if (options.affine && centered) bias = parameter();
    if (options.adds && options.input_bias) input_bias = parameter();
    if (options.statistics) rstd = Matrix(1, rows, accumulation);
    if (options.statistics && centered) mean = rstd;
    sum_dtype_ = types.sum;
  }

  NormForward arguments() {
    return {.rows = input.rows(),
            .cols = input.cols(),
            .centered = centered,
            .input = input.const_operand(),
            .residual = residual.const_operand(),
            .input_bias = input_bias.const_vector(),
            .weight = weight.const_vector(),
            .bias = bias.const_vector(),
            .dropout = dropout,
            .eps = kEps,
            .output = output.operand(),
            .sum = sum_operand(),
            .mean = mean.vector().data,
            .rstd = rstd.vector().data};
  }

  cudaError_t run(const Device& device = device_of()) { return run(arguments(), device); }

  cudaError_t run(const NormForward& arguments, const Device& device) const {
    return norm_forward(arguments, norm_forward_plan(arguments, device), &kSeed, nullptr);
  }

  // A sum that is not stored still has a dtype.
  Rows sum_operand() { return sum.present() ? sum.operand() : Rows{.dtype = sum_dtype_}; }

  void expect_correct() const {
    const auto rows = input.rows(), cols = input.cols();
    Values exact(rows, cols), size(rows, cols);
    if (residual.present()) {
      auto sums = residual_sum(input, residual, input_bias, dropout, kept);
      exact = sums.sum, size = sums.scale;
      expect_close(sum, exact, size, accumulation, 4, "sum");
    } else {
      for (std::int64_t row = 0; row < rows; ++row) {
        for (std::int64_t col = 0; col < cols; ++col) exact(row, col) = input(row, col);
      }
    }
    auto want = normalize(exact, rows, cols, weight, bias, kEps, centered);
    for (std::int64_t row = 0; row < rows; ++row) {
      for (std::int64_t col = 0; col < cols; ++col) {
        want.scale(row, col) += size(row, col) * want.rstd[row] * std::fabs(weight_at(weight, col));
      }
      if (!rstd.present() || !std::isfinite(want.rstd[row])) continue;
      EXPECT_NEAR(rstd(0, row), want.rstd[row], 1e-5 * want.rstd[row]);
      if (!centered) continue;
      EXPECT_NEAR(mean(0, row), want.mean[row], 1e-6 * (1 + 1 / want.rstd[row] + std::fabs(want.mean[row])));
    }
    expect_close(output, want.output, want.scale, accumulation, 24, "output");
  }

 private:
  DType sum_dtype_;
};

}  // namespace resnorm::cuda::testing
