// SPDX-License-Identifier: BSD-3-Clause
#include "activation_reference.h"
#include "fixture.h"

namespace resnorm::cpu::testing {
namespace {

using enum DType;

class BiasActivationTest : public KernelTest {};
RESNORM_FOR_EVERY_ISA(BiasActivationTest);

constexpr Activation kActivations[] = {Activation::kRelu, Activation::kGelu, Activation::kGeluTanh};

struct Types {
  DType input, bias;
};

const std::vector<Types> kTypes = {
    {kFloat32, kFloat32}, {kBFloat16, kBFloat16}, {kFloat16, kFloat16}, {kBFloat16, kFloat32}, {kFloat16, kFloat32},
};

struct Problem {
  Activation activation;
  Dropout dropout{};
  Matrix input, bias, output;
  Matrix grad_output, grad_input, grad_bias, output_again;

  Problem(std::mt19937_64& generator, Activation activation, Shape shape, Types types, Layout layout, bool with_bias)
      : activation(activation),
        input(Matrix::random(generator, shape.rows, shape.cols, types.input, layout)),
        output(shape.rows, shape.cols, types.input, layout),
        grad_output(Matrix::random(generator, shape.rows, shape.cols, types.input, layout)),
        grad_input(shape.rows, shape.cols, types.input, layout) {
    if (!with_bias) return;
    bias = Matrix::random(generator, 1, shape.cols, types.bias, {0, layout.offset});
    grad_bias = Matrix(1, shape.cols, types.bias, {0, layout.offset});
  }

  void forward(const KernelTable& kernels, ParallelFor parallel_for) { forward(kernels, parallel_for, output); }

  void forward(const KernelTable& kernels, ParallelFor parallel_for, Matrix& into) {
    kernels.bias_activation_forward({.rows = input.rows(),
                                     .cols = input.cols(),
                                     .input = input.const_operand(),
                                     .bias = bias.const_vector(),
                                     .activation = activation,
                                     .dropout = dropout,
                                     .output = into.operand()},
                                    parallel_for);
  }

  void backward(const KernelTable& kernels, ParallelFor parallel_for) {
    auto workspace = workspace_for(input.rows(), input.cols(), grad_bias.present(), kFloat32);
    kernels.bias_activation_backward({.rows = input.rows(),
                                      .cols = input.cols(),
                                      .grad_output = grad_output.const_operand(),
                                      .input = input.const_operand(),
                                      .bias = bias.const_vector(),
                                      .activation = activation,
                                      .dropout = dropout,
                                      .grad_input = grad_input.operand(),
                                      .grad_bias = grad_bias.vector(),
                                      .output = output_again.operand(),
                                      .workspace = workspace.data()},
                                     parallel_for);
  }

  void expect_correct() const {
    const auto rows = input.rows(), cols = input.cols();
    Values value(rows, cols), value_scale(rows, cols), grad(rows, cols), grad_scale(rows, cols);
    Values sum(1, cols), sum_scale(1, cols);
    const KeepMask kept(dropout, {rows, cols});
    for (std::int64_t row = 0; row < rows; ++row) {
      for (std::int64_t col = 0; col < cols; ++col) {
        const double factor = kept(row, col) ? dropout.scale : 0;
        const double added = bias.present() ? bias(0, col) : 0.0;
        const auto want = activated(activation, static_cast<long double>(input(row, col)) + added);
        value(row, col) = factor == 0 ? 0 : factor * static_cast<double>(want.value);
        value_scale(row, col) =
            1 + (std::isfinite(input(row, col)) ? std::fabs(input(row, col)) : 0) + std::fabs(added);
        grad(row, col) = factor * static_cast<double>(grad_output(row, col) * want.derivative);
        value_scale(row, col) *= dropout.scale;
        grad_scale(row, col) = std::fabs(grad_output(row, col)) * value_scale(row, col);
        sum(0, col) += grad(row, col);
        sum_scale(0, col) += grad_scale(row, col);
      }
    }
    expect_close(output, value, value_scale, kFloat32, 4, "output");
    expect_close(output_again, value, value_scale, kFloat32, 4, "output of the backward pass");
    expect_close(grad_input, grad, grad_scale, kFloat32, 4, "grad_input");
    expect_close(grad_bias, sum, sum_scale, kFloat32, 8, "grad_bias");
  }
};

TEST_P(BiasActivationTest, MatchesReference) {
  for (const Activation activation : kActivations) {
    for (const Types types : kTypes) {
      for (const Shape shape : kShapes) {
        for (const bool with_bias : {false, true}) {
          SCOPED_TRACE(::testing::Message()
                       << name_of(activation) << " " << name_of(types.input) << "+" << name_of(types.bias) << " "
                       << shape.rows << "x" << shape.cols << (with_bias ? " bias" : ""));
          Problem problem(generator, activation, shape, types, kLayouts[with_bias], with_bias);
          if (with_bias) problem.dropout = dropout_of(0.3, 0x1234567890ABCDEF);
          if (shape.rows % 2 == 1) problem.output_again = problem.output;
          problem.forward(kernels(), serial);
          problem.backward(kernels(), serial);
          problem.expect_correct();
          if (HasFatalFailure()) return;
        }
      }
    }
  }
}

// Every 2^-13 from -24 to 24: beyond, gelu is 0 or its argument.
TEST_P(BiasActivationTest, ErrorsOverADenseSweep) {
  constexpr std::int64_t kRows = 384, kCols = 1024;
  for (const Activation activation : {Activation::kGelu, Activation::kGeluTanh}) {
    SCOPED_TRACE(name_of(activation));
    Problem problem(generator, activation, {kRows, kCols}, {kFloat32, kFloat32}, {}, false);
    for (std::int64_t row = 0; row < kRows; ++row) {
      for (std::int64_t col = 0; col < kCols; ++col) {
        problem.input.set(row, col, static_cast<double>(row * kCols + col) * 0x1p-13 - 24);
        problem.grad_output.set(row, col, 1);
      }
    }
    problem.forward(kernels(), serial);
    problem.backward(kernels(), serial);
    double value_error = 0, derivative_error = 0;
    for (std::int64_t row = 0; row < kRows; ++row) {
      for (std::int64_t col = 0; col < kCols; ++col) {
        const auto want = activated(activation, problem.input(row, col));
        const auto error = [](double got, long double exact) { return std::fabs(static_cast<double>(got - exact)); };
        value_error = std::max(value_error, error(problem.output(row, col), want.value));
        derivative_error = std::max(derivative_error, error(problem.grad_input(row, col), want.derivative));
      }
    }
    RecordProperty(std::string(name_of(activation)) + "_error", std::to_string(value_error * 1e6) + "e-6");
    RecordProperty(std::string(name_of(activation)) + "_derivative_error",
                   std::to_string(derivative_error * 1e6) + "e-6");
    EXPECT_LE(value_error, 6e-7);
    EXPECT_LE(derivative_error, 3e-7);
  }
}

TEST_P(BiasActivationTest, InfinityNanAndLargeNumbersAreTheFormulas) {
  constexpr double kInf = std::numeric_limits<double>::infinity();
  const std::vector<double> special = {kInf,  -kInf, std::nan(""), 0.0,  -0.0,  1e20,
                                       -1e20, 3e38,  -3e38,        14.0, -14.0, -1e-40};
  constexpr std::int64_t kCols = 37;  // vectors and a tail
  for (const Activation activation : kActivations) {
    SCOPED_TRACE(name_of(activation));
    const auto rows = static_cast<std::int64_t>(special.size());
    Problem problem(generator, activation, {rows, kCols}, {kFloat32, kFloat32}, {}, false);
    for (std::int64_t row = 0; row < rows; ++row) {
      for (std::int64_t col = 0; col < kCols; ++col)
        problem.input.set(row, col, special[static_cast<std::size_t>(row)]);
    }
    problem.forward(kernels(), serial);
    problem.backward(kernels(), serial);
    problem.expect_correct();
  }
}

TEST_P(BiasActivationTest, GradientsAreOptional) {
  for (const bool grad_input : {false, true}) {
    for (const bool grad_bias : {false, true}) {
      Problem problem(generator, Activation::kGelu, {6, 50}, {kFloat32, kFloat32}, {}, true);
      problem.forward(kernels(), serial);
      if (!grad_input) problem.grad_input = {};
      if (!grad_bias) problem.grad_bias = {};
      problem.backward(kernels(), serial);
      problem.expect_correct();
    }
  }
}

TEST_P(BiasActivationTest, OutputMayBeInput) {
  for (const DType dtype : {kFloat32, kBFloat16}) {
    Problem apart(generator, Activation::kGelu, {7, 77}, {dtype, kFloat32}, {1, 1}, true);
    apart.forward(kernels(), serial);
    Problem together = apart;
    together.forward(kernels(), serial, together.input);
    EXPECT_EQ(together.input.storage(), apart.output.storage()) << name_of(dtype);
  }
}

TEST_P(BiasActivationTest, ThreadsChangeNothing) {
  for (const DType dtype : {kFloat32, kBFloat16}) {
    Problem alone(generator, Activation::kGeluTanh, {1031, 257}, {dtype, dtype}, {}, true);
    Problem two = alone, five = alone;
    alone.forward(kernels(), serial), alone.backward(kernels(), serial);
    two.forward(kernels(), threaded<2>), two.backward(kernels(), threaded<2>);
    five.forward(kernels(), threaded<5>), five.backward(kernels(), threaded<5>);
    for (const Problem* other : {&two, &five}) {
      EXPECT_EQ(alone.output.storage(), other->output.storage());
      EXPECT_EQ(alone.grad_input.storage(), other->grad_input.storage());
      EXPECT_EQ(alone.grad_bias.storage(), other->grad_bias.storage());
    }
  }
}

}  // namespace
}  // namespace resnorm::cpu::testing
