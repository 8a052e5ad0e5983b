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
    bool centered = true, adds = false, affine = true, input_bias = false, grad_sum = false, grad_residual = false;
    double dropout_p = 0.0;
    double mean = 0.0, deviation = 1.0;  // of the sum
  };

  Matrix grad_output, grad_sum, sum, weight, mean, rstd;
  Matrix grad_input, grad_residual, grad_weight, grad_bias, grad_input_bias;
  Dropout dropout;
  KeepMask kept;
  DType accumulation;
  bool centered;
  Plan plan;  // of the last run

  NormBackwardProblem(std::mt19937_64& generator, Shape shape, Types types, Layout layout, Options options)
      : dropout(dropout_of(options.adds ? options.dropout_p : 0.0, kSeed)),
        kept(dropout, shape),
        accumulation(accumulation_of({types.gradient, types.sum})),
        centered(options.centered) {
    const auto [rows, cols] = shape;
    const bool adds = options.adds;
    const Layout aligned_as{0, layout.offset};
    sum = Matrix::random(generator, rows, cols, types.sum, layout, options.mean, options.deviation);
    grad_output = Matrix::random(generator, rows, cols, types.gradient, layout);
    grad_input = Matrix(rows, cols, types.gradient, layout);
    if (adds && options.grad_sum) grad_sum = Matrix::random(generator, rows, cols, types.sum, layout);
    if (adds && options.grad_residual) grad_residual = Matrix(rows, cols, types.residual, layout);
    if (options.affine) {
      weight = Matrix::random(generator, 1, cols, types.parameters, aligned_as, 1.0);
      grad_weight = Matrix(1, cols, types.parameters, aligned_as);
      if (centered) grad_bias = grad_weight;
    }
    if (adds && options.input_bias) grad_input_bias = Matrix(1, cols, types.parameters, aligned_as);
    const auto statistics = normalize(sum, rows, cols, {}, {}, 1e-5, centered);
    rstd = Matrix(1, rows, accumulation);
    if (centered) mean = rstd;
    for (std::int64_t row = 0; row < rows; ++row) {
      rstd.set(0, row, statistics.rstd[row]);
      if (centered) mean.set(0, row, statistics.mean[row]);
    }
  }

  // Without a workspace.
  NormBackward arguments() {
    return {.rows = sum.rows(),
            .cols = sum.cols(),
            .centered = centered,
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

  cudaError_t run(const Device& device = device_of()) {
    NormBackward arguments = this->arguments();
    Bytes workspace(norm_backward_workspace_bytes(arguments, norm_backward_plan(arguments, device)), 0xFF);
    arguments.workspace = workspace.data();
    return run(arguments, device);
  }

  cudaError_t run(const NormBackward& arguments, const Device& device) {
    plan = norm_backward_plan(arguments, device);
    return norm_backward(arguments, plan, &kSeed, nullptr);
  }

  void expect_correct() const {
    auto norm = normalize_backward(grad_output, sum, weight, rstd, centered);
    expect_close(grad_weight, norm.grad_weight, norm.grad_weight_scale, accumulation, 8, "grad_weight");
    expect_close(grad_bias, norm.grad_bias, norm.grad_bias_scale, accumulation, 8, "grad_bias");
    const auto residual = residual_gradients(norm, grad_sum, dropout, kept, {sum.rows(), sum.cols()});
    expect_close(grad_residual, norm.grad_input, norm.grad_input_scale, accumulation, 8, "grad_residual");
    expect_close(grad_input, residual.input, residual.input_scale, accumulation, 8, "grad_input");
    expect_close(grad_input_bias, residual.input_bias, residual.input_bias_scale, accumulation, 8, "grad_input_bias");
  }
};

}  // namespace resnorm::cuda::testing
