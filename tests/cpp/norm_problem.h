// SPDX-License-Identifier: BSD-3-Clause
// Operands for the norms, with or without a residual, and what must come of them.
#pragma once

#include "norm_reference.h"
#include "residual_reference.h"

namespace resnorm::cpu::testing {

using enum DType;

inline constexpr double kEps = 1e-5;

// Without a residual, the sum is the input and has its type.
struct NormTypes {
  DType input, residual, sum, parameters;

  DType accumulation() const { return accumulation_of({input, sum}); }
};

inline std::ostream& operator<<(std::ostream& out, NormTypes types) {
  return out << name_of(types.input) << "+" << name_of(types.residual) << " -> " << name_of(types.sum) << ", "
             << name_of(types.parameters);
}

inline NormTypes same(DType dtype) { return {dtype, dtype, dtype, dtype}; }
inline NormTypes plain(DType data, DType parameters) { return {data, data, data, parameters}; }

struct NormOptions {
  bool centered = true, adds = false;
  double p = 0.0;  // this and the input bias beside a residual alone
  bool input_bias = false, affine = true, prenorm = true;
};

inline std::ostream& operator<<(std::ostream& out, const NormOptions& options) {
  return out << (options.centered ? "centered" : "not centered") << (options.adds ? ", adds" : "")
             << (options.input_bias ? ", input_bias" : "") << (options.affine ? ", affine" : "")
             << (options.prenorm ? ", prenorm" : "") << ", p=" << options.p;
}

struct NormProblem {
  NormTypes types;
  NormOptions options;
  Dropout dropout;
  KeepMask kept;
  Matrix input, residual, input_bias, weight, bias, output, sum, mean, rstd;
  Matrix grad_output, grad_sum, grad_input, grad_residual, grad_weight, grad_bias, grad_input_bias;

  NormProblem(std::mt19937_64& generator, Shape shape, NormTypes types, Layout layout, NormOptions options)
      : types(types), options(options), dropout(dropout_of(options.p, 0xFEDCBA9876543210ULL)), kept(dropout, shape) {
    const auto [rows, cols] = shape;
    const Layout aligned_as{0, layout.offset};
    const auto random = [&](DType dtype, double mean) {
      return Matrix::random(generator, rows, cols, dtype, layout, mean);
    };
    const auto random_vector = [&](double mean) {
      return Matrix::random(generator, 1, cols, types.parameters, aligned_as, mean);
    };
    input = random(types.input, 0.5);
    output = grad_input = Matrix(rows, cols, types.input, layout);
    grad_output = random(types.input, 0.0);
    rstd = Matrix(1, rows, types.accumulation());
    if (options.centered) mean = rstd;
    if (options.affine) weight = random_vector(1.0), grad_weight = Matrix(1, cols, types.parameters, aligned_as);
    if (options.affine && options.centered) bias = random_vector(0.0), grad_bias = grad_weight;
    if (!options.adds) return;
    residual = random(types.residual, 0.0);
    sum = Matrix(rows, cols, types.sum, layout);
    grad_residual = Matrix(rows, cols, types.residual, layout);
    if (options.prenorm) grad_sum = random(types.sum, 0.0);
    if (!options.input_bias) return;
    input_bias = random_vector(0.0), grad_input_bias = Matrix(1, cols, types.parameters, aligned_as);
  }

  const Matrix& normed() const { return options.adds ? sum : input; }

  // A sum of a residual that is not stored still has a dtype.
  NormForward forward_arguments() {
    return {.rows = input.rows(),
            .cols = input.cols(),
            .centered = options.centered,
            .input = input.const_operand(),
            .residual = residual.const_operand(),
            .input_bias = input_bias.const_vector(),
            .weight = weight.const_vector(),
            .bias = bias.const_vector(),
            .dropout = dropout,
            .eps = kEps,
            .output = output.operand(),
            .sum = sum.present() ? sum.operand() : Rows{.dtype = types.sum},
            .mean = mean.vector().data,
            .rstd = rstd.vector().data};
  }

  // Without a workspace.
  NormBackward backward_arguments() {
    return {.rows = input.rows(),
            .cols = input.cols(),
            .centered = options.centered,
            .grad_output = grad_output.const_operand(),
            .grad_sum = grad_sum.const_operand(),
            .sum = normed().const_operand(),
            .weight = weight.const_vector(),
            .mean = mean.vector().data,
            .rstd = rstd.vector().data,
            .dropout = dropout,
            .grad_input = grad_input.operand(),
            .grad_residual = grad_residual.operand(),
            .grad_weight = grad_weight.vector(),
            .grad_bias = grad_bias.vector(),
            .grad_input_bias = grad_input_bias.vector()};
  }

  void forward(const KernelTable& kernels, ParallelFor parallel_for) {
    kernels.norm_forward(forward_arguments(), parallel_for);
  }

  void backward(const KernelTable& kernels, ParallelFor parallel_for) {
    backward(kernels, parallel_for, backward_arguments());
  }

  void backward(const KernelTable& kernels, ParallelFor parallel_for, NormBackward arguments) const {
    const int column_sums = grad_weight.present() + grad_bias.present() + grad_input_bias.present();
    auto workspace = workspace_for(input.rows(), input.cols(), column_sums, types.accumulation());
    arguments.workspace = workspace.data();
    kernels.norm_backward(arguments, parallel_for);
  }

  // Rows whose sum is far smaller than its terms (each rounded to float32) need room for the terms' rounding.
  void expect_forward_correct() const {
    const auto rows = input.rows(), cols = input.cols();
    Values exact(rows, cols), size(rows, cols);  // the sum, and of a residual's the size of its terms
    if (options.adds) {
      const auto sums = residual_sum(input, residual, input_bias, dropout, kept);
      exact = sums.sum, size = sums.scale;
      expect_close(sum, exact, size, types.accumulation(), 4, "sum");
    } else {
      for (std::int64_t row = 0; row < rows; ++row) {
        for (std::int64_t col = 0; col < cols; ++col) exact(row, col) = input(row, col);
      }
    }
    auto want = normalize(exact, rows, cols, weight, bias, kEps, options.centered);
    for (std::int64_t row = 0; row < rows; ++row) {
      for (std::int64_t col = 0; col < cols; ++col) {
        want.scale(row, col) += size(row, col) * want.rstd[row] * std::fabs(weight_at(weight, col));
      }
    }
    expect_close(output, want.output, want.scale, types.accumulation(), options.adds ? 16 : 8, "output");
    mean.expect_guards_untouched();
    rstd.expect_guards_untouched();
    if (!options.adds) expect_statistics(want);
  }

  void expect_backward_correct() const {
    const auto accumulation = types.accumulation();
    auto norm = normalize_backward(grad_output, normed(), weight, rstd, options.centered);
    expect_close(grad_weight, norm.grad_weight, norm.grad_weight_scale, accumulation, 8, "grad_weight");
    expect_close(grad_bias, norm.grad_bias, norm.grad_bias_scale, accumulation, 8, "grad_bias");
    const auto gradients = residual_gradients(norm, grad_sum, dropout, kept, {input.rows(), input.cols()});
    expect_close(grad_residual, norm.grad_input, norm.grad_input_scale, accumulation, 8, "grad_residual");
    expect_close(grad_input, gradients.input, gradients.input_scale, accumulation, 8, "grad_input");
    expect_close(grad_input_bias, gradients.input_bias, gradients.input_bias_scale, accumulation, 8, "grad_input_bias");
  }

 private:
  void expect_statistics(const NormalizedRows& want) const {
    const double roundoff = unit_roundoff(types.accumulation());
    for (std::int64_t row = 0; row < input.rows(); ++row) {
      if (mean.present()) {
        ASSERT_NEAR(mean(0, row), want.mean[row], 4 * roundoff * (1 + std::fabs(want.mean[row])));
      }
      if (rstd.present()) {
        ASSERT_NEAR(rstd(0, row), want.rstd[row], 8 * roundoff * want.rstd[row]);
      }
    }
  }
};

}  // namespace resnorm::cpu::testing
