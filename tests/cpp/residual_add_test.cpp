// SPDX-License-Identifier: BSD-3-Clause
#include "residual_reference.h"

namespace resnorm::cpu::testing {
namespace {

using enum DType;

class ResidualAddTest : public KernelTest {};
RESNORM_FOR_EVERY_ISA(ResidualAddTest);

struct Types {
  DType input, residual, output;

  DType accumulation() const { return accumulation_of({input, residual, output}); }
};

const std::vector<Types> kTypes = {
    {kFloat32, kFloat32, kFloat32},   {kFloat64, kFloat64, kFloat64},  {kBFloat16, kBFloat16, kBFloat16},
    {kFloat16, kFloat16, kFloat16},   {kBFloat16, kFloat32, kFloat32}, {kFloat16, kFloat32, kFloat32},
    {kBFloat16, kBFloat16, kFloat32}, {kFloat32, kBFloat16, kFloat16}, {kFloat16, kFloat64, kFloat64},
    {kFloat64, kBFloat16, kBFloat16},
};

struct Problem {
  Dropout dropout;
  KeepMask kept;
  DType accumulation;
  Matrix input, residual, input_bias, output;
  Matrix grad_output, grad_input, grad_input_bias;

  Problem(std::mt19937_64& generator, Shape shape, Types types, Layout layout, double p, bool with_bias)
      : dropout(dropout_of(p, 0x123456789ABCDEF0ULL)),
        kept(dropout, shape),
        accumulation(types.accumulation()),
        input(Matrix::random(generator, shape.rows, shape.cols, types.input, layout)),
        residual(Matrix::random(generator, shape.rows, shape.cols, types.residual, layout)),
        output(shape.rows, shape.cols, types.output, layout),
        grad_output(Matrix::random(generator, shape.rows, shape.cols, types.output, layout)),
        grad_input(shape.rows, shape.cols, types.input, layout) {
    if (!with_bias) return;
    input_bias = Matrix::random(generator, 1, shape.cols, types.input, {0, layout.offset});
    grad_input_bias = Matrix(1, shape.cols, types.input, {0, layout.offset});
  }

  void forward(const KernelTable& kernels, ParallelFor parallel_for) {
    kernels.residual_add_forward({.rows = input.rows(),
                                  .cols = input.cols(),
                                  .input = input.const_operand(),
                                  .residual = residual.const_operand(),
                                  .input_bias = input_bias.const_vector(),
                                  .dropout = dropout,
                                  .output = output.operand()},
                                 parallel_for);
  }

  void backward(const KernelTable& kernels, ParallelFor parallel_for) {
    auto workspace = workspace_for(input.rows(), input.cols(), grad_input_bias.present(), accumulation);
    kernels.residual_add_backward({.rows = input.rows(),
                                   .cols = input.cols(),
                                   .grad_output = grad_output.const_operand(),
                                   .dropout = dropout,
                                   .grad_input = grad_input.operand(),
                                   .grad_input_bias = grad_input_bias.vector(),
                                   .workspace = workspace.data()},
                                  parallel_for);
  }

  void expect_correct() const {
    const auto rows = input.rows(), cols = input.cols();
    const auto want = residual_sum(input, residual, input_bias, dropout, kept);
    expect_close(output, want.sum, want.scale, accumulation, 4, "output");
    Values grad(rows, cols), scale(rows, cols), sum(1, cols), sum_scale(1, cols);
    for (std::int64_t row = 0; row < rows; ++row) {
      for (std::int64_t col = 0; col < cols; ++col) {
        if (kept(row, col)) grad(row, col) = grad_output(row, col) * dropout.scale;
        scale(row, col) = std::fabs(grad(row, col));
        sum(0, col) += grad(row, col);
        sum_scale(0, col) += scale(row, col);
      }
    }
    expect_close(grad_input, grad, scale, accumulation, 4, "grad_input");
    expect_close(grad_input_bias, sum, sum_scale, accumulation, 8, "grad_input_bias");
  }
};

TEST_P(ResidualAddTest, MatchesFloat64Reference) {
  for (const Types types : kTypes) {
    for (const Shape shape : kShapes) {
      for (const double p : {0.0, 0.3}) {
        for (const bool with_bias : {false, true}) {
          const Layout layout = kLayouts[p > 0];
          SCOPED_TRACE(::testing::Message()
                       << name_of(types.input) << "+" << name_of(types.residual) << " -> " << name_of(types.output)
                       << " " << shape.rows << "x" << shape.cols << " p=" << p << (with_bias ? " bias" : ""));
          Problem problem(generator, shape, types, layout, p, with_bias);
          problem.forward(kernels(), serial);
          problem.backward(kernels(), serial);
          problem.expect_correct();
          if (HasFatalFailure()) return;
        }
      }
    }
  }
}

TEST_P(ResidualAddTest, DropoutHoldsAtItsExtremes) {
  for (const double p : {1e-6, 7.7e-6, 0.99999, 0.999995, 1.0}) {
    for (const DType dtype : {kFloat32, kFloat64, kBFloat16}) {
      SCOPED_TRACE(::testing::Message() << p << " " << name_of(dtype));
      Problem problem(generator, {300, 131}, {dtype, dtype, dtype}, {}, p, true);
      for (std::int64_t row = 0; row < 300; ++row) {
        for (std::int64_t col = 0; col < 131; ++col) {
          if (problem.kept(row, col)) continue;
          problem.input.set(row, col, row % 2 ? std::numeric_limits<double>::infinity() : std::nan(""));
          problem.grad_output.set(row, col, std::numeric_limits<double>::infinity());
        }
      }
      problem.forward(kernels(), serial);
      problem.backward(kernels(), serial);
      problem.expect_correct();
      if (p < 1) continue;
      for (std::int64_t row = 0; row < 300; ++row) {
        for (std::int64_t col = 0; col < 131; ++col) {
          ASSERT_EQ(problem.output(row, col), problem.residual(row, col));
          ASSERT_EQ(problem.grad_input(row, col), 0.0);
        }
      }
    }
  }
}

TEST_P(ResidualAddTest, GradientsAreOptional) {
  for (const bool grad_input : {false, true}) {
    for (const bool grad_input_bias : {false, true}) {
      Problem problem(generator, {6, 50}, {kFloat32, kFloat32, kFloat32}, {}, 0.2, true);
      problem.forward(kernels(), serial);
      if (!grad_input) problem.grad_input = {};
      if (!grad_input_bias) problem.grad_input_bias = {};
      problem.backward(kernels(), serial);
      problem.expect_correct();
    }
  }
}

TEST_P(ResidualAddTest, OutputMayBeResidualOrInput) {
  for (const DType dtype : {kFloat32, kBFloat16}) {
    Problem apart(generator, {7, 77}, {dtype, dtype, dtype}, {1, 1}, 0.4, true);
    apart.forward(kernels(), serial);
    for (Matrix Problem::* operand : {&Problem::residual, &Problem::input}) {
      Problem together = apart;
      Rows output = (together.*operand).operand();
      kernels().residual_add_forward({.rows = 7,
                                      .cols = 77,
                                      .input = together.input.const_operand(),
                                      .residual = together.residual.const_operand(),
                                      .input_bias = together.input_bias.const_vector(),
                                      .dropout = together.dropout,
                                      .output = output},
                                     serial);
      EXPECT_EQ((together.*operand).storage(), apart.output.storage()) << name_of(dtype);
    }
  }
}

TEST_P(ResidualAddTest, ThreadsChangeNothing) {
  for (const DType dtype : {kFloat32, kBFloat16}) {
    Problem alone(generator, {1031, 257}, {dtype, dtype, dtype}, {}, 0.1, true);
    Problem two = alone, five = alone;
    alone.forward(kernels(), serial), alone.backward(kernels(), serial);
    two.forward(kernels(), threaded<2>), two.backward(kernels(), threaded<2>);
    five.forward(kernels(), threaded<5>), five.backward(kernels(), threaded<5>);
    for (const Problem* other : {&two, &five}) {
      EXPECT_EQ(alone.output.storage(), other->output.storage());
      EXPECT_EQ(alone.grad_input.storage(), other->grad_input.storage());
      EXPECT_EQ(alone.grad_input_bias.storage(), other->grad_input_bias.storage());
    }
  }
}

// Adding to zeros shows the conversions bare. Shapes are chosen so that vectors and their tails see every value.
class ConversionTest : public ResidualAddTest {
 protected:
  Matrix converted(const Matrix& input, DType dtype) {
    const Matrix zeros = [&] {
      Matrix matrix(input.rows(), input.cols(), dtype);
      for (std::int64_t row = 0; row < input.rows(); ++row) {
        for (std::int64_t col = 0; col < input.cols(); ++col) matrix.set(row, col, 0.0);
      }
      return matrix;
    }();
    Matrix output(input.rows(), input.cols(), dtype);
    kernels().residual_add_forward({.rows = input.rows(),
                                    .cols = input.cols(),
                                    .input = input.const_operand(),
                                    .residual = zeros.const_operand(),
                                    .input_bias = {},
                                    .dropout = {},
                                    .output = output.operand()},
                                   serial);
    return output;
  }
};
RESNORM_FOR_EVERY_ISA(ConversionTest);

constexpr std::int64_t kCols = 45, kRows = 65536 / kCols + 1;

TEST_P(ConversionTest, EveryHalfWidensExactly) {
  for (const DType half : {kBFloat16, kFloat16}) {
    for (const DType wide : {kFloat32, kFloat64}) {
      Matrix input(kRows, kCols, half);
      for (std::int64_t i = 0; i < kRows * kCols; ++i) {
        const double value = format_of(half).decode(static_cast<std::uint16_t>(i));
        input.set(i / kCols, i % kCols, value);
      }
      const Matrix output = converted(input, wide);
      for (std::int64_t i = 0; i < kRows * kCols; ++i) {
        const double want = input(i / kCols, i % kCols), got = output(i / kCols, i % kCols);
        ASSERT_TRUE(std::isnan(want) ? std::isnan(got) : got == want)
            << name_of(half) << " " << want << ", got " << got;
      }
    }
  }
}

TEST_P(ConversionTest, NarrowingRoundsToNearestEvenAndKeepsNan) {
  for (const DType half : {kBFloat16, kFloat16}) {
    // A half, its neighbours in float32, the midpoint to the next half, and that one's neighbours.
    for (const int step : {0, 1, 2, 3, 4, 5}) {
      Matrix input(kRows, kCols, kFloat32);
      for (std::int64_t i = 0; i < kRows * kCols; ++i) {
        const auto bits = static_cast<std::uint16_t>(i);
        const double here = format_of(half).decode(bits), next = format_of(half).decode(bits + 1);
        const auto base = static_cast<float>(step < 3 || !std::isfinite(next) ? here : (here + next) / 2);
        input.set(i / kCols, i % kCols, std::nextafterf(base, step % 3 == 0 ? base : step % 3 == 1 ? 1e38F : -1e38F));
      }
      const Matrix output = converted(input, half);
      for (std::int64_t i = 0; i < kRows * kCols; ++i) {
        const double from = input(i / kCols, i % kCols), got = output(i / kCols, i % kCols);
        if (std::isnan(from)) {
          ASSERT_TRUE(std::isnan(got)) << name_of(half);
          continue;
        }
        ASSERT_EQ(got, format_of(half).decode(format_of(half).encode(from))) << name_of(half) << " of " << from;
      }
    }
  }
}

TEST_P(ResidualAddTest, ResultsBeyondTheCachesAreTheSame) {
  for (const DType dtype : {kFloat32, kBFloat16}) {
    Problem one(generator, {1, kNonTemporalCols}, {dtype, dtype, dtype}, {}, 0.0, true);
    one.forward(kernels(), serial);
    one.backward(kernels(), serial);
    const std::int64_t rows = non_temporal_rows(dtype);
    Matrix output(rows, kNonTemporalCols, dtype, kWholeLines), grad_input = output;
    kernels().residual_add_forward({.rows = rows,
                                    .cols = kNonTemporalCols,
                                    .input = repeated(one.input),
                                    .residual = repeated(one.residual),
                                    .input_bias = one.input_bias.const_vector(),
                                    .output = output.operand()},
                                   threaded<2>);
    kernels().residual_add_backward({.rows = rows,
                                     .cols = kNonTemporalCols,
                                     .grad_output = repeated(one.grad_output),
                                     .grad_input = grad_input.operand()},
                                    threaded<2>);
    expect_rows_equal(output, one.output);
    expect_rows_equal(grad_input, one.grad_input);
  }
}

}  // namespace
}  // namespace resnorm::cpu::testing
