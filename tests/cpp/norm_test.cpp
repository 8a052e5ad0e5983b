// SPDX-License-Identifier: BSD-3-Clause
// What the norms compute, forward and backward, centered or not, with and without a residual.
#include "norm_problem.h"

namespace resnorm::cpu::testing {
namespace {

using Problem = NormProblem;

class NormTest : public KernelTest {};
RESNORM_FOR_EVERY_ISA(NormTest);

const std::vector<NormTypes> kPlainTypes = {
    same(kFloat32),
    same(kFloat64),
    same(kBFloat16),
    same(kFloat16),
    plain(kBFloat16, kFloat32),
    plain(kFloat16, kFloat32),
    plain(kFloat32, kFloat64),
};

const std::vector<NormTypes> kResidualTypes = {
    same(kFloat32),
    same(kFloat64),
    same(kBFloat16),
    same(kFloat16),
    {kBFloat16, kBFloat16, kBFloat16, kFloat32},
    {kBFloat16, kFloat32, kFloat32, kBFloat16},
    {kFloat16, kFloat32, kFloat32, kFloat32},
    {kBFloat16, kBFloat16, kFloat32, kBFloat16},
    {kFloat32, kBFloat16, kFloat32, kFloat32},
    {kFloat32, kFloat64, kFloat64, kFloat32},
    {kFloat16, kFloat64, kFloat64, kFloat16},
    {kBFloat16, kBFloat16, kFloat64, kBFloat16},
    {kFloat16, kBFloat16, kFloat32, kFloat64},
    {kFloat32, kFloat64, kFloat32, kFloat32},
    {kFloat64, kFloat32, kBFloat16, kFloat64},
};

const std::vector<NormOptions> kResidualOptions = {
    {.adds = true},
    {.adds = true, .affine = false, .prenorm = false},
    {.adds = true, .p = 0.3},
    {.adds = true, .input_bias = true, .prenorm = false},
    {.adds = true, .p = 0.3, .input_bias = true, .affine = false},
};

TEST_P(NormTest, MatchesFloat64Reference) {
  for (const NormTypes types : kPlainTypes) {
    for (const Shape shape : kShapes) {
      for (const Layout layout : kLayouts) {
        for (const bool affine : {true, false}) {
          for (const bool centered : {true, false}) {
            const NormOptions options{.centered = centered, .affine = affine};
            SCOPED_TRACE(::testing::Message() << types << " " << shape.rows << "x" << shape.cols << " offset "
                                              << layout.offset << " " << options);
            Problem problem(generator, shape, types, layout, options);
            problem.forward(kernels(), serial);
            problem.expect_forward_correct();
            problem.backward(kernels(), serial);
            problem.expect_backward_correct();
            if (HasFatalFailure()) return;
          }
        }
      }
    }
  }
}

TEST_P(NormTest, MatchesFloat64ReferenceBesideAResidual) {
  for (const NormTypes types : kResidualTypes) {
    for (std::size_t shape = 0; shape < kShapes.size(); ++shape) {
      for (std::size_t option = 0; option < kResidualOptions.size(); ++option) {
        for (const bool centered : {true, false}) {
          NormOptions options = kResidualOptions[option];
          options.centered = centered;
          SCOPED_TRACE(::testing::Message()
                       << types << " " << kShapes[shape].rows << "x" << kShapes[shape].cols << " " << options);
          Problem problem(generator, kShapes[shape], types, kLayouts[(shape + option) % 2], options);
          problem.forward(kernels(), serial);
          problem.expect_forward_correct();
          problem.backward(kernels(), serial);
          problem.expect_backward_correct();
          if (HasFatalFailure()) return;
        }
      }
    }
  }
}

TEST_P(NormTest, EveryOperandIsOptional) {
  for (int mask = 0; mask < 64; ++mask) {
    SCOPED_TRACE(mask);
    Problem problem(generator, {5, 37}, same(kFloat32), {}, {.centered = (mask & 32) == 0});
    if (mask & 1) problem.weight = {};
    if (mask & 2) problem.bias = {};
    problem.forward(kernels(), serial);
    problem.expect_forward_correct();
    if (mask & 4) problem.grad_input = {};
    if (mask & 8) problem.grad_weight = {};
    if (mask & 16) problem.grad_bias = {};
    problem.backward(kernels(), serial);
    problem.expect_backward_correct();
  }
}

TEST_P(NormTest, EveryGradientBesideAResidualIsOptional) {
  for (int mask = 0; mask < 256; ++mask) {
    SCOPED_TRACE(mask);
    Problem problem(generator, {5, 37}, {kBFloat16, kFloat32, kFloat32, kFloat32}, {},
                    {.centered = (mask & 128) == 0, .adds = true, .p = mask & 1 ? 0.2 : 0.0, .input_bias = true});
    problem.forward(kernels(), serial);
    if (mask & 2) problem.grad_input = {};
    if (mask & 4) problem.grad_residual = {};
    if (mask & 8) problem.grad_weight = {};
    if (mask & 16) problem.grad_bias = {};
    if (mask & 32) problem.grad_input_bias = {};
    if (mask & 64) problem.grad_output = {};
    problem.backward(kernels(), serial);
    problem.expect_backward_correct();
  }
}

TEST_P(NormTest, SumAndStatisticsAreOptional) {
  for (const bool centered : {true, false}) {
    for (const bool adds : {true, false}) {
      for (const NormTypes types : adds ? kResidualTypes : kPlainTypes) {
        const NormOptions options{.centered = centered, .adds = adds, .p = adds ? 0.2 : 0.0, .input_bias = adds};
        SCOPED_TRACE(::testing::Message() << types << " " << options);
        Problem problem(generator, {5, 91}, types, {1, 1}, options);
        problem.sum = problem.mean = problem.rstd = {};
        problem.forward(kernels(), serial);
        problem.expect_forward_correct();
      }
    }
  }
}

TEST_P(NormTest, MixedTypesGoThroughBuffers) {
  for (const bool centered : {true, false}) {
    Problem problem(generator, {6, 45}, plain(kBFloat16, kFloat16), {2, 1}, {.centered = centered});
    problem.output = Matrix(6, 45, kFloat32);
    problem.grad_output = Matrix::random(generator, 6, 45, kFloat16);
    problem.grad_input = Matrix(6, 45, kFloat32);
    problem.forward(kernels(), serial);
    problem.expect_forward_correct();
    problem.backward(kernels(), serial);
    problem.expect_backward_correct();
  }
}

// Exactly the bias where the mean is taken off; else what the formula gives for them, also for a row of zeros.
TEST_P(NormTest, ConstantRows) {
  for (const DType dtype : {kFloat32, kFloat64, kBFloat16, kFloat16}) {
    for (const std::int64_t cols : {1, 7, 768, 775, 8193}) {
      for (const bool centered : {true, false}) {
        SCOPED_TRACE(::testing::Message() << name_of(dtype) << ", " << cols << (centered ? " columns, centered" : ""));
        Problem problem(generator, {4, cols}, same(dtype), {}, {.centered = centered});
        const double values[4] = {0.1, -3.3e-5, 1000003.7, 0.0};
        for (std::int64_t row = 0; row < 4; ++row) {
          for (std::int64_t col = 0; col < cols; ++col) {
            problem.input.set(row, col, dtype == kFloat16 ? std::min(values[row], 60000.0) : values[row]);
          }
        }
        problem.forward(kernels(), serial);
        if (centered) {
          for (std::int64_t row = 0; row < 4; ++row) {
            for (std::int64_t col = 0; col < cols; ++col) ASSERT_EQ(problem.output(row, col), problem.bias(0, col));
          }
          continue;
        }
        problem.expect_forward_correct();
        problem.backward(kernels(), serial);
        problem.expect_backward_correct();
        if (HasFatalFailure()) return;
      }
    }
  }
}

TEST_P(NormTest, LargeBasesKeepFloat32Accuracy) {
  for (const double base : {1e3, -1e5, 1e6}) {
    for (const std::int64_t cols : {37, 768, 8193}) {
      for (const bool centered : {true, false}) {
        SCOPED_TRACE(::testing::Message() << cols << " columns of base " << base << (centered ? ", centered" : ""));
        Problem problem(generator, {8, cols}, same(kFloat32), {}, {.centered = centered, .affine = false});
        problem.input = Matrix::random(generator, 8, cols, kFloat32, {}, base);
        problem.forward(kernels(), serial);
        const auto want = normalize(problem.input, 8, cols, {}, {}, kEps, centered);
        for (std::int64_t row = 0; row < 8; ++row) {
          for (std::int64_t col = 0; col < cols; ++col) {
            ASSERT_NEAR(problem.output(row, col), want.output(row, col), 1e-6);
          }
        }
        problem.backward(kernels(), serial);
        problem.expect_backward_correct();
      }
    }
  }
}

// Squares beyond the range of float16, whose largest number is 65504, and close to the end of float32's.
TEST_P(NormTest, LargeValues) {
  for (const auto& [dtype, deviation] : {std::pair{kFloat16, 1.4e4}, {kBFloat16, 1e16}, {kFloat32, 1e16}}) {
    for (const std::int64_t cols : {33, 775}) {
      for (const bool centered : {true, false}) {
        SCOPED_TRACE(::testing::Message() << name_of(dtype) << ", " << cols << (centered ? " columns, centered" : ""));
        Problem problem(generator, {5, cols}, same(dtype), {}, {.centered = centered});
        problem.input = Matrix::random(generator, 5, cols, dtype, {}, 0.0, deviation);
        problem.forward(kernels(), serial);
        const auto want = normalize(problem.input, 5, cols, problem.weight, problem.bias, kEps, centered);
        expect_close(problem.output, want.output, want.scale, kFloat32, 8, "output");
        problem.backward(kernels(), serial);
        problem.expect_backward_correct();
      }
    }
  }
}

TEST_P(NormTest, NanAndInfStayInTheirRows) {
  for (const DType dtype : {kFloat32, kBFloat16}) {
    for (const bool centered : {true, false}) {
      Problem problem(generator, {4, 50}, same(dtype), {}, {.centered = centered});
      problem.input.set(1, 0, std::numeric_limits<double>::infinity());
      problem.input.set(2, 49, std::numeric_limits<double>::quiet_NaN());
      problem.forward(kernels(), serial);
      const auto want = normalize(problem.input, 4, 50, problem.weight, problem.bias, kEps, centered);
      expect_close(problem.output, want.output, want.scale, kFloat32, 8, "output");
      for (std::int64_t col = 0; col < 50; ++col) {
        EXPECT_TRUE(std::isfinite(problem.output(0, col)) && std::isfinite(problem.output(3, col)));
        EXPECT_TRUE(std::isnan(problem.output(2, col)));
        // An infinite mean leaves nothing; an infinite sum of squares makes 0 of what is finite.
        EXPECT_TRUE(centered || col == 0 ? std::isnan(problem.output(1, col)) : problem.output(1, col) == 0);
      }
    }
  }
}

TEST_P(NormTest, DroppedElementsAddNothing) {
  for (const double p : {0.5, 0.99999, 1.0}) {
    for (const bool centered : {true, false}) {
      Problem problem(generator, {9, 775}, same(kFloat32), {}, {.centered = centered, .adds = true, .p = p});
      for (std::int64_t row = 0; row < 9; ++row) {
        for (std::int64_t col = 0; col < 775; ++col) {
          if (!problem.kept(row, col)) problem.input.set(row, col, std::nan(""));
        }
      }
      problem.forward(kernels(), serial);
      problem.expect_forward_correct();
      problem.backward(kernels(), serial);
      problem.expect_backward_correct();
      if (p < 1) continue;
      for (std::int64_t col = 0; col < 775; ++col) {
        ASSERT_EQ(problem.sum(3, col), problem.residual(3, col));
        ASSERT_EQ(problem.grad_input(3, col), 0.0);
      }
    }
  }
}

}  // namespace
}  // namespace resnorm::cpu::testing
