// SPDX-License-Identifier: BSD-3-Clause
#include <bit>

#include "activation_reference.h"
#include "fixture.h"

namespace resnorm::cpu::testing {
namespace {

using enum DType;

class PrepackedLinearTest : public KernelTest {
 protected:
  // Those that this instruction set packs.
  std::vector<DType> dtypes() const {
    std::vector<DType> prepacked;
    for (const DType dtype : {kFloat32, kFloat64, kBFloat16, kFloat16}) {
      if (kernels().prepacked_weight_bytes(dtype, 1, 1) > 0) prepacked.push_back(dtype);
    }
    return prepacked;
  }
};
RESNORM_FOR_EVERY_ISA(PrepackedLinearTest);

constexpr Activation kActivations[] = {Activation::kNone, Activation::kRelu, Activation::kGelu, Activation::kGeluTanh};

struct Problem {
  Activation activation;
  Matrix input, weight, bias, output;
  Bytes prepacked;

  Problem(std::mt19937_64& generator, DType dtype, std::int64_t rows, Shape weights, Layout layout, bool with_bias,
          Activation activation = Activation::kNone)
      : activation(activation),
        input(Matrix::random(generator, rows, weights.cols, dtype, layout)),
        weight(Matrix::random(generator, weights.rows, weights.cols, dtype, layout)),
        output(rows, weights.rows, dtype, layout) {
    if (with_bias) bias = Matrix::random(generator, 1, weights.rows, dtype, {0, layout.offset});
  }

  void run(const KernelTable& kernels, ParallelFor parallel_for) {
    // As large as is said and no larger: the sanitizers see what is read or written behind it.
    prepacked = Bytes(kernels.prepacked_weight_bytes(weight.dtype(), weight.rows(), weight.cols()), 0xFF);
    kernels.prepack_weight({weight.rows(), weight.cols(), weight.const_operand(), prepacked.data()}, parallel_for);
    kernels.prepacked_linear({.rows = input.rows(),
                              .cols = input.cols(),
                              .out_features = weight.rows(),
                              .input = input.const_operand(),
                              .prepacked = prepacked.data(),
                              .bias = bias.const_vector(),
                              .activation = activation,
                              .output = output.operand()},
                             parallel_for);
  }

  void expect_correct() const {
    Values expected(output.rows(), output.cols()), scale(output.rows(), output.cols());
    for (std::int64_t row = 0; row < output.rows(); ++row) {
      for (std::int64_t col = 0; col < output.cols(); ++col) {
        double sum = bias.present() ? bias(0, col) : 0.0, magnitude = std::fabs(sum);
        for (std::int64_t i = 0; i < input.cols(); ++i) {
          const double product = input(row, i) * weight(col, i);
          sum += product;
          magnitude += std::fabs(product);
        }
        expected(row, col) =
            activation == Activation::kNone ? sum : static_cast<double>(activated(activation, sum).value);
        scale(row, col) = 1 + magnitude;
      }
    }
    expect_close(output, expected, scale, kFloat32, 6, "output");
  }
};

TEST_P(PrepackedLinearTest, MatchesReference) {
  for (const DType dtype : dtypes()) {
    for (const std::int64_t rows : {1, 2, 3, 5, 7, 8, 9, 16, 63, 64, 65, 131}) {
      for (const Shape weights :
           {Shape{1, 1}, Shape{2, 3}, Shape{17, 33}, Shape{48, 64}, Shape{49, 7}, Shape{130, 21}}) {
        for (const bool with_bias : {false, true}) {
          SCOPED_TRACE(::testing::Message() << name_of(dtype) << " " << rows << " rows, " << weights.rows << "x"
                                            << weights.cols << (with_bias ? " bias" : ""));
          Problem problem(generator, dtype, rows, weights, kLayouts[with_bias], with_bias);
          problem.run(kernels(), serial);
          problem.expect_correct();
          if (HasFatalFailure()) return;
        }
      }
    }
  }
}

TEST_P(PrepackedLinearTest, Activations) {
  for (const DType dtype : dtypes()) {
    for (const Activation activation : kActivations) {
      Problem problem(generator, dtype, 11, {50, 40}, {}, true, activation);
      problem.run(kernels(), serial);
      problem.expect_correct();
    }
  }
}

// For outputs in bfloat16 activations take fewer steps: what that adds to the rounding of each is a fraction of it.
TEST_P(PrepackedLinearTest, ErrorsOfBFloat16ActivationsOverEveryInput) {
  if (GetParam() != "avx512_bf16") GTEST_SKIP() << "bfloat16 is not prepacked";
  constexpr double kHalfUlp = 0x1p-8;
  for (const Activation activation : {Activation::kGelu, Activation::kGeluTanh}) {
    SCOPED_TRACE(name_of(activation));
    constexpr std::int64_t kBits = 0x4140;  // from 0 to 12
    Problem problem(generator, kBFloat16, 2 * kBits, {1, 1}, {}, false, activation);
    problem.weight.set(0, 0, 1);
    for (std::int64_t bits = 0; bits < kBits; ++bits) {
      const double x = std::bit_cast<float>(static_cast<std::uint32_t>(bits << 16));
      problem.input.set(2 * bits, 0, x);
      problem.input.set(2 * bits + 1, 0, -x);
    }
    problem.run(kernels(), serial);
    for (std::int64_t row = 0; row < 2 * kBits; ++row) {
      const double x = problem.input(row, 0), want = static_cast<double>(activated(activation, x).value);
      const double half_ulps = x > -3 ? 1.1 : 1.3;
      const double tolerance = x > -5 ? half_ulps * kHalfUlp * std::fabs(want) + 0x1p-126 : 2e-8;
      ASSERT_LE(std::fabs(problem.output(row, 0) - want), tolerance) << x;
    }
  }
}

TEST_P(PrepackedLinearTest, LongSumsStayAccurate) {
  for (const DType dtype : dtypes()) {
    Problem problem(generator, dtype, 9, {50, 4097}, {}, true);
    problem.run(kernels(), serial);
    problem.expect_correct();
  }
}

// What no thread and no other row of the batch changes.
TEST_P(PrepackedLinearTest, ThreadsAndOtherRowsChangeNothing) {
  for (const DType dtype : dtypes()) {
    Problem alone(generator, dtype, 203, {400, 131}, {}, true, Activation::kGelu);
    Problem two = alone, five = alone;
    alone.run(kernels(), serial), two.run(kernels(), threaded<2>), five.run(kernels(), threaded<5>);
    EXPECT_EQ(alone.output.storage(), two.output.storage());
    EXPECT_EQ(alone.output.storage(), five.output.storage());
    for (const std::int64_t row : {0, 7, 8, 66, 202}) {
      Problem single = alone;
      single.input = Matrix(1, 131, dtype), single.output = Matrix(1, 400, dtype);
      for (std::int64_t i = 0; i < 131; ++i) single.input.set(0, i, alone.input(row, i));
      single.run(kernels(), serial);
      for (std::int64_t col = 0; col < 400; ++col) ASSERT_EQ(single.output(0, col), alone.output(row, col));
    }
  }
}

TEST_P(PrepackedLinearTest, InfinityAndNanStayInTheirRow) {
  for (const DType dtype : dtypes()) {
    Problem problem(generator, dtype, 10, {50, 33}, {}, true);
    problem.input.set(3, 32, std::numeric_limits<double>::infinity());
    problem.input.set(4, 0, std::nan(""));
    problem.run(kernels(), serial);
    for (std::int64_t row = 0; row < 10; ++row) {
      for (std::int64_t col = 0; col < 50; ++col) {
        EXPECT_EQ(std::isfinite(problem.output(row, col)), row != 3 && row != 4) << row << ", " << col;
      }
    }
  }
}

TEST_P(PrepackedLinearTest, WhatIsPacked) {
  const bool bfloat16 = GetParam() == "avx512_bf16";
  EXPECT_EQ(dtypes(), bfloat16 ? std::vector<DType>({kFloat32, kBFloat16}) : std::vector<DType>({kFloat32}));
}

}  // namespace
}  // namespace resnorm::cpu::testing
