// SPDX-License-Identifier: BSD-3-Clause
#include "fixture.h"
#include "layer_norm_reference.h"

namespace resnorm::cpu::testing {
namespace {

constexpr double kEps = 1e-5;

class LayerNormTest : public KernelTest {};
RESNORM_FOR_EVERY_ISA(LayerNormTest);

struct Types {
  DType data, parameters;
};

const std::vector<Types> kTypes = {
    {DType::kFloat32, DType::kFloat32}, {DType::kFloat64, DType::kFloat64},  {DType::kBFloat16, DType::kBFloat16},
    {DType::kFloat16, DType::kFloat16}, {DType::kBFloat16, DType::kFloat32}, {DType::kFloat16, DType::kFloat32},
    {DType::kFloat32, DType::kFloat64},
};

struct Problem {
  Matrix input, weight, bias, output, mean, rstd;
  Matrix grad_output, grad_input, grad_weight, grad_bias;

  Problem(std::mt19937_64& generator, Shape shape, Types types, Layout layout, bool affine)
      : Problem(generator, shape, types, layout, affine, accumulation_of({types.data})) {}

  Problem(std::mt19937_64& generator, Shape shape, Types types, Layout layout, bool affine, DType statistics)
      : input(Matrix::random(generator, shape.rows, shape.cols, types.data, layout, 0.5)),
        output(shape.rows, shape.cols, types.data, layout),
        mean(1, shape.rows, statistics),
        rstd(1, shape.rows, statistics),
        grad_output(Matrix::random(generator, shape.rows, shape.cols, types.data, layout)),
        grad_input(shape.rows, shape.cols, types.data, layout) {
    if (!affine) return;
    weight = Matrix::random(generator, 1, shape.cols, types.parameters, {0, layout.offset}, 1.0);
    bias = Matrix::random(generator, 1, shape.cols, types.parameters, {0, layout.offset});
    grad_weight = Matrix(1, shape.cols, types.parameters, {0, layout.offset});
    grad_bias = Matrix(1, shape.cols, types.parameters, {0, layout.offset});
  }

  void forward(const KernelTable& kernels, ParallelFor parallel_for) {
    kernels.layer_norm_forward({.rows = input.rows(),
                                .cols = input.cols(),
                                .input = input.const_operand(),
                                .weight = weight.const_vector(),
                                .bias = bias.const_vector(),
                                .eps = kEps,
                                .output = output.operand(),
                                .mean = mean.vector().data,
                                .rstd = rstd.vector().data},
                               parallel_for);
  }

  void backward(const KernelTable& kernels, ParallelFor parallel_for) {
    const int column_sums = grad_weight.present() + grad_bias.present();
    auto workspace = workspace_for(input.rows(), input.cols(), column_sums, mean.dtype());
    kernels.layer_norm_backward({.rows = input.rows(),
                                 .cols = input.cols(),
                                 .grad_output = grad_output.const_operand(),
                                 .input = input.const_operand(),
                                 .weight = weight.const_vector(),
                                 .mean = mean.vector().data,
                                 .rstd = rstd.vector().data,
                                 .grad_input = grad_input.operand(),
                                 .grad_weight = grad_weight.vector(),
                                 .grad_bias = grad_bias.vector(),
                                 .workspace = workspace.data()},
                                parallel_for);
  }

  void expect_correct() const {
    const auto want = normalize(input, input.rows(), input.cols(), weight, bias, kEps);
    expect_close(output, want.output, want.scale, mean.dtype(), 8, "output");
    mean.expect_guards_untouched();
    rstd.expect_guards_untouched();
    const double roundoff = unit_roundoff(mean.dtype());
    for (std::int64_t row = 0; row < input.rows(); ++row) {
      ASSERT_NEAR(mean(0, row), want.mean[row], 4 * roundoff * (1 + std::fabs(want.mean[row])));
      ASSERT_NEAR(rstd(0, row), want.rstd[row], 8 * roundoff * want.rstd[row]);
    }
    const auto gradients = normalize_backward(grad_output, input, weight, rstd);
    expect_close(grad_input, gradients.grad_input, gradients.grad_input_scale, mean.dtype(), 8, "grad_input");
    expect_close(grad_weight, gradients.grad_weight, gradients.grad_weight_scale, mean.dtype(), 8, "grad_weight");
    expect_close(grad_bias, gradients.grad_bias, gradients.grad_bias_scale, mean.dtype(), 8, "grad_bias");
  }
};

TEST_P(LayerNormTest, MatchesFloat64Reference) {
  for (const Types types : kTypes) {
    for (const Shape shape : kShapes) {
      for (const Layout layout : kLayouts) {
        for (const bool affine : {true, false}) {
          SCOPED_TRACE(::testing::Message()
                       << name_of(types.data) << "/" << name_of(types.parameters) << " " << shape.rows << "x"
                       << shape.cols << " offset " << layout.offset << (affine ? " affine" : ""));
          Problem problem(generator, shape, types, layout, affine);
          problem.forward(kernels(), serial);
          problem.backward(kernels(), serial);
          problem.expect_correct();
          if (HasFatalFailure()) return;
        }
      }
    }
  }
}

TEST_P(LayerNormTest, EveryOperandIsOptional) {
  for (int mask = 0; mask < 32; ++mask) {
    SCOPED_TRACE(mask);
    Problem problem(generator, {5, 37}, {DType::kFloat32, DType::kFloat32}, {}, true);
    if (mask & 1) problem.weight = {};
    if (mask & 2) problem.bias = {};
    problem.forward(kernels(), serial);
    if (mask & 4) problem.grad_input = {};
    if (mask & 8) problem.grad_weight = {};
    if (mask & 16) problem.grad_bias = {};
    problem.backward(kernels(), serial);
    problem.expect_correct();
  }
}

TEST_P(LayerNormTest, MixedTypesGoThroughBuffers) {
  Problem problem(generator, {6, 45}, {DType::kBFloat16, DType::kFloat16}, {2, 1}, true);
  problem.output = Matrix(6, 45, DType::kFloat32);
  problem.grad_output = Matrix::random(generator, 6, 45, DType::kFloat16);
  problem.grad_input = Matrix(6, 45, DType::kFloat32);
  problem.forward(kernels(), serial);
  problem.backward(kernels(), serial);
  problem.expect_correct();
}

TEST_P(LayerNormTest, StatisticsAreOptional) {
  Problem problem(generator, {3, 20}, {DType::kFloat32, DType::kFloat32}, {}, true);
  problem.mean = problem.rstd = {};
  problem.forward(kernels(), serial);
  const auto want = normalize(problem.input, 3, 20, problem.weight, problem.bias, kEps);
  expect_close(problem.output, want.output, want.scale, DType::kFloat32, 8, "output");
}

TEST_P(LayerNormTest, OutputMayBeInput) {
  for (const DType dtype : {DType::kFloat32, DType::kFloat64, DType::kBFloat16, DType::kFloat16}) {
    Problem apart(generator, {7, 77}, {dtype, dtype}, {1, 1}, true);
    apart.forward(kernels(), serial);
    Matrix both = apart.input;
    kernels().layer_norm_forward({.rows = 7,
                                  .cols = 77,
                                  .input = both.const_operand(),
                                  .weight = apart.weight.const_vector(),
                                  .bias = apart.bias.const_vector(),
                                  .eps = kEps,
                                  .output = both.operand()},
                                 serial);
    EXPECT_EQ(both.storage(), apart.output.storage()) << name_of(dtype);
  }
}

TEST_P(LayerNormTest, ThreadsChangeNothing) {
  for (const Shape shape : {Shape{613, 130}, Shape{1031, 257}, Shape{9, 20000}}) {
    for (const DType dtype : {DType::kFloat32, DType::kBFloat16}) {
      Problem alone(generator, shape, {dtype, dtype}, {}, true);
      ASSERT_GT(workspace_for(shape.rows, shape.cols, 1, dtype).size(), shape.cols * sizeof(float))
          << "one block of rows cannot be cut for threads";
      Problem two = alone, five = alone;
      alone.forward(kernels(), serial), alone.backward(kernels(), serial);
      two.forward(kernels(), threaded<2>), two.backward(kernels(), threaded<2>);
      five.forward(kernels(), threaded<5>), five.backward(kernels(), threaded<5>);
      for (const Problem* other : {&two, &five}) {
        EXPECT_EQ(alone.output.storage(), other->output.storage());
        EXPECT_EQ(alone.mean.storage(), other->mean.storage());
        EXPECT_EQ(alone.rstd.storage(), other->rstd.storage());
        EXPECT_EQ(alone.grad_input.storage(), other->grad_input.storage());
        EXPECT_EQ(alone.grad_weight.storage(), other->grad_weight.storage());
        EXPECT_EQ(alone.grad_bias.storage(), other->grad_bias.storage());
      }
    }
  }
}

TEST_P(LayerNormTest, ConstantRowsGiveExactlyTheBias) {
  for (const DType dtype : {DType::kFloat32, DType::kFloat64, DType::kBFloat16, DType::kFloat16}) {
    for (const std::int64_t cols : {1, 7, 768, 775, 8193}) {
      Problem problem(generator, {4, cols}, {dtype, dtype}, {}, true);
      const double values[4] = {0.1, -3.3e-5, 1000003.7, 0.0};
      for (std::int64_t row = 0; row < 4; ++row) {
        for (std::int64_t col = 0; col < cols; ++col) {
          problem.input.set(row, col, dtype == DType::kFloat16 ? std::min(values[row], 60000.0) : values[row]);
        }
      }
      problem.forward(kernels(), serial);
      for (std::int64_t row = 0; row < 4; ++row) {
        for (std::int64_t col = 0; col < cols; ++col) ASSERT_EQ(problem.output(row, col), problem.bias(0, col));
      }
    }
  }
}

TEST_P(LayerNormTest, LargeBasesKeepFloat32Accuracy) {
  for (const double base : {1e3, -1e5, 1e6}) {
    for (const std::int64_t cols : {37, 768, 8193}) {
      Problem problem(generator, {8, cols}, {DType::kFloat32, DType::kFloat32}, {}, false);
      problem.input = Matrix::random(generator, 8, cols, DType::kFloat32, {}, base);
      problem.forward(kernels(), serial);
      const auto want = normalize(problem.input, 8, cols, {}, {}, kEps);
      for (std::int64_t row = 0; row < 8; ++row) {
        for (std::int64_t col = 0; col < cols; ++col) {
          ASSERT_NEAR(problem.output(row, col), want.output(row, col), 1e-6) << "base " << base << ", " << cols;
        }
      }
      problem.grad_input = Matrix(8, cols, DType::kFloat32);
      problem.backward(kernels(), serial);
      const auto gradients = normalize_backward(problem.grad_output, problem.input, {}, problem.rstd);
      expect_close(problem.grad_input, gradients.grad_input, gradients.grad_input_scale, DType::kFloat32, 8,
                   "grad_input");
    }
  }
}

TEST_P(LayerNormTest, NanAndInfStayInTheirRows) {
  for (const DType dtype : {DType::kFloat32, DType::kBFloat16}) {
    Problem problem(generator, {4, 50}, {dtype, dtype}, {}, true);
    problem.input.set(1, 0, std::numeric_limits<double>::infinity());
    problem.input.set(2, 49, std::numeric_limits<double>::quiet_NaN());
    problem.forward(kernels(), serial);
    const auto want = normalize(problem.input, 4, 50, problem.weight, problem.bias, kEps);
    expect_close(problem.output, want.output, want.scale, DType::kFloat32, 8, "output");
    for (std::int64_t col = 0; col < 50; ++col) {
      EXPECT_TRUE(std::isfinite(problem.output(0, col)) && std::isfinite(problem.output(3, col)));
      EXPECT_TRUE(std::isnan(problem.output(1, col)) && std::isnan(problem.output(2, col)));
    }
  }
}

TEST_P(LayerNormTest, ResultsBeyondTheCachesAreTheSame) {
  for (const DType dtype : {DType::kFloat32, DType::kFloat64, DType::kBFloat16, DType::kFloat16}) {
    Problem one(generator, {1, kStreamedCols}, {dtype, dtype}, {}, true);
    one.forward(kernels(), serial);
    one.backward(kernels(), serial);
    const std::int64_t rows = streamed_rows(dtype);
    Matrix output(rows, kStreamedCols, dtype, kWholeLines), grad_input = output;
    Matrix mean(1, rows, one.mean.dtype()), rstd = mean;
    kernels().layer_norm_forward({.rows = rows,
                                  .cols = kStreamedCols,
                                  .input = repeated(one.input),
                                  .weight = one.weight.const_vector(),
                                  .bias = one.bias.const_vector(),
                                  .eps = kEps,
                                  .output = output.operand(),
                                  .mean = mean.vector().data,
                                  .rstd = rstd.vector().data},
                                 threaded<2>);
    kernels().layer_norm_backward({.rows = rows,
                                   .cols = kStreamedCols,
                                   .grad_output = repeated(one.grad_output),
                                   .input = repeated(one.input),
                                   .weight = one.weight.const_vector(),
                                   .mean = mean.vector().data,
                                   .rstd = rstd.vector().data,
                                   .grad_input = grad_input.operand(),
                                   .grad_weight = {},
                                   .grad_bias = {}},
                                  threaded<2>);
    expect_rows_equal(output, one.output);
    expect_rows_equal(grad_input, one.grad_input);
  }
}

TEST_P(LayerNormTest, RowsMayBeOneRowRepeated) {
  Problem problem(generator, {6, 40}, {DType::kFloat32, DType::kFloat32}, {}, true);
  problem.forward(kernels(), serial);
  Problem repeated = problem;
  for (std::int64_t row = 0; row < 6; ++row) {
    for (std::int64_t col = 0; col < 40; ++col) repeated.grad_output.set(row, col, problem.grad_output(0, col));
  }
  repeated.backward(kernels(), serial);
  ConstRows expanded = problem.grad_output.const_operand();
  expanded.row_stride = 0;
  auto workspace = workspace_for(6, 40, 1, DType::kFloat32);
  kernels().layer_norm_backward({.rows = 6,
                                 .cols = 40,
                                 .grad_output = expanded,
                                 .input = problem.input.const_operand(),
                                 .weight = problem.weight.const_vector(),
                                 .mean = problem.mean.vector().data,
                                 .rstd = problem.rstd.vector().data,
                                 .grad_input = problem.grad_input.operand(),
                                 .grad_weight = {},
                                 .grad_bias = problem.grad_bias.vector(),
                                 .workspace = workspace.data()},
                                serial);
  EXPECT_EQ(problem.grad_input.storage(), repeated.grad_input.storage());
  EXPECT_EQ(problem.grad_bias.storage(), repeated.grad_bias.storage());
}

}  // namespace
}  // namespace resnorm::cpu::testing
