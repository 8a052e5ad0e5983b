// SPDX-License-Identifier: BSD-3-Clause
// Operands for the backward kernels, and what must come of them.
#pragma once

#include "../fixture.h"
#include "../residual_reference.h"
#include "emulated_test.h"
#include "kernels/cuda/norm_backward.h"

namespace resnorm::cuda::testing {

using namespace cpu::testing;

struct NormBackwardProblem {
  struct Types {
    DType gradient, residual, sum, parameters;
  };

  friend std::ostream& operator<<(std::ostream& out, const Types& types) {
    return out << name_of(types.gradient) << "+" << name_of(types.residual) << " -> " << name_of(types.sum) << ", "
               << name_of(types.parameters);
  }

  struct Options {
    bool adds = false, affine = true, input_bias = false, grad_sum = false, grad_residual = false;
    double dropout_p = 0.0;
    double mean = 0.0, deviation = 1.0;  // of the sum
  };

  Matrix grad_output, grad_sum, sum, weight, mean, rstd;
  Matrix grad_input, grad_residual, grad_weight, grad_bias, grad_input_bias;
  Dropout dropout;
  KeepMask kept;
  DType accumulation;
  bool adds;
  Plan plan;  // of the last run

  NormBackwardProblem(std::mt19937_64& generator, Shape shape, Types types, Layout layout, Options options)
      : dropout(dropout_of(options.adds ? options.dropout_p : 0.0, kSeed)),
        kept(dropout, shape),
        accumulation(accumulation_of({types.gradient, types.sum})),
        adds(options.adds) {
    const auto [rows, cols] = shape;
    const Layout aligned_as{0, layout.offset};
    sum = Matrix::random(generator, rows, cols, types.sum, layout, options.mean, options.deviation);
    grad_output = Matrix::random(generator, rows, cols, types.gradient, layout);
    grad_input = Matrix(rows, cols, types.gradient, layout);
    if (adds && options.grad_sum) grad_sum = Matrix::random(generator, rows, cols, types.sum, layout);
    if (adds && options.grad_residual) grad_residual = Matrix(rows, cols, types.residual, layout);
    if (options.affine) {
      weight = Matrix::random(generator, 1, cols, types.parameters, aligned_as, 1.0);
      grad_weight = grad_bias = Matrix(1, cols, types.parameters, aligned_as);
    }
    if (adds && options.input_bias) grad_input_bias = Matrix(1, cols, types.parameters, aligned_as);
    mean = rstd = Matrix(1, rows, accumulation);
    for (std::int64_t row = 0; row < rows; ++row) {
      long double total = 0, squares = 0;
      for (std::int64_t col = 0; col < cols; ++col) total += sum(row, col);
      const long double exact = total / cols;
      for (std::int64_t col = 0; col < cols; ++col) squares += (sum(row, col) - exact) * (sum(row, col) - exact);
      mean.set(0, row, static_cast<double>(exact));
      rstd.set(0, row, static_cast<double>(1.0L / std::sqrt(squares / cols + 1e-5L)));
    }
  }

  // Without a workspace.
  AddLayerNormBackward arguments() {
    return {.rows = sum.rows(),
            .cols = sum.cols(),
            .grad_output = grad_output.const_operand(),
            .grad_sum = grad_sum.const_operand(),
            .sum = sum.const_operand(),
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

  cudaError_t run(const Device& device = {kNewest, 4}) {
    AddLayerNormBackward arguments = this->arguments();
    Bytes workspace(norm_backward_workspace_bytes(arguments, norm_backward_plan(arguments, adds, device)), 0xFF);
    arguments.workspace = workspace.data();
    return run(arguments, device);
  }

  cudaError_t run(const AddLayerNormBackward& arguments, const Device& device) {
    plan = norm_backward_plan(arguments, adds, device);
    return norm_backward(arguments, adds, plan, &kSeed, nullptr);
  }

  void expect_correct() const {
    auto norm = normalize_backward(grad_output, sum, weight, rstd);
    expect_close(grad_weight, norm.grad_weight, norm.grad_weight_scale, accumulation, 8, "grad_weight");
    expect_close(grad_bias, norm.grad_bias, norm.grad_bias_scale, accumulation, 8, "grad_bias");
    const auto residual = residual_gradients(norm, grad_sum, dropout, kept, {sum.rows(), sum.cols()});
    expect_close(grad_residual, norm.grad_input, norm.grad_input_scale, accumulation, 8, "grad_residual");
    expect_close(grad_input, residual.input, residual.input_scale, accumulation, 8, "grad_input");
    expect_close(grad_input_bias, residual.input_bias, residual.input_bias_scale, accumulation, 8, "grad_input_bias");
  }
};

}  // namespace resnorm::cuda::testing
