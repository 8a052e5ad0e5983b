// SPDX-License-Identifier: BSD-3-Clause
// The forward kernels, from the entry point on, in the emulation of a GPU.
#include "emulated_test.h"
#include "kernels/cuda/plan.h"
#include "norm_forward_problem.h"

namespace resnorm::cuda::testing {
namespace {

using Problem = NormForwardProblem;
using Types = Problem::Types;
using Options = Problem::Options;

class NormForwardTest : public EmulatedTest {};
RESNORM_FOR_SCHEDULES(NormForwardTest, kSchedules);

// What has kernels of its own.
const std::vector<Types> kTypes = {
    {kF32, kF32, kF32, kF32}, {kBF16, kBF16, kBF16, kBF16}, {kBF16, kF32, kF32, kF32}, {kBF16, kBF16, kF32, kBF16},
    {kF16, kF16, kF16, kF32}, {kF16, kF32, kF32, kF16},     {kF16, kF16, kF32, kF16},
};
// Every other combination goes through one kernel.
const std::vector<Types> kRareTypes = {
    {kF64, kF64, kF64, kF64}, {kF32, kBF16, kF32, kF32}, {kBF16, kF32, kBF16, kBF16},
    {kF32, kF64, kF64, kF32}, {kF16, kBF16, kF32, kF32},
};

// Part of a warp, one to four vectors a lane, several warps, and the sizes beside those at which plans change.
const std::vector<Shape> kForwardShapes = {{19, 8},  {37, 64},  {5, 128},  {5, 256},  {5, 320},  {3, 504},
                                           {3, 768}, {3, 1016}, {2, 1024}, {3, 1032}, {2, 2048}, {1, 4096}};
const std::vector<Shape> kOddShapes = {{19, 1}, {5, 7}, {9, 63}, {5, 129}, {3, 333}, {3, 775}, {2, 1027}, {1, 2049}};

const std::vector<Options> kOptions = {
    {},
    {.affine = false, .statistics = false},
    {.adds = true},
    {.adds = true, .affine = false, .input_bias = true, .statistics = false},
    {.adds = true, .stores_sum = true, .dropout_p = 0.3},
    {.adds = true, .input_bias = true, .stores_sum = true, .dropout_p = 0.1},
    {.centered = false},
    {.centered = false, .adds = true, .affine = false, .input_bias = true, .statistics = false},
    {.centered = false, .adds = true, .stores_sum = true, .dropout_p = 0.3},
};

TEST_P(NormForwardTest, MatchesFloat64Reference) {
  for (const auto* types : {&kTypes, &kRareTypes}) {
    for (const Types type : *types) {
      for (const auto* shapes : {&kForwardShapes, &kOddShapes}) {
        for (const Shape shape : *shapes) {
          for (const Options& options : kOptions) {
            if (leaves_out_case()) continue;
            SCOPED_TRACE(::testing::Message() << type << " " << shape.rows << "x" << shape.cols << " options "
                                              << &options - kOptions.data());
            Problem problem(generator, shape, type, {}, options);
            ASSERT_EQ(problem.run(), cudaSuccess);
            problem.expect_correct();
          }
        }
      }
    }
  }
}

TEST_P(NormForwardTest, AnyStridesAndAlignment) {
  for (const Types type : kTypes) {
    for (const Layout layout : {Layout{8, 0}, Layout{3, 0}, Layout{0, 1}, Layout{5, 3}, Layout{8, 4}}) {
      for (const Shape shape : {Shape{5, 64}, Shape{3, 775}, Shape{2, 1032}}) {
        if (leaves_out_case()) continue;
        SCOPED_TRACE(::testing::Message() << type << " " << shape.rows << "x" << shape.cols << " padding "
                                          << layout.padding << " offset " << layout.offset);
        for (const bool centered : {true, false}) {
          Problem problem(generator, shape, type, layout,
                          {.centered = centered, .adds = true, .stores_sum = true, .dropout_p = 0.3});
          ASSERT_EQ(problem.run(), cudaSuccess);
          problem.expect_correct();
        }
      }
    }
  }
}

// Clusters of 2, 4 and 8; without clusters, and beyond them, the kernel that reads the row again.
TEST_P(NormForwardTest, LongRows) {
  for (const auto& [cols, architecture] : std::vector<std::pair<std::int64_t, int>>{
           {8200, 90}, {8192, 90}, {16391, 90}, {33000, 90}, {8200, 80}, {70000, 90}}) {
    if (leaves_out_case()) continue;
    SCOPED_TRACE(::testing::Message() << cols << " columns on sm_" << architecture);
    for (const bool centered : {true, false}) {
      Problem problem(generator, {2, cols}, kTypes[0], {},
                      {.centered = centered, .adds = true, .stores_sum = true, .dropout_p = 0.1});
      ASSERT_EQ(problem.run(device_of(architecture, 8)), cudaSuccess);
      problem.expect_correct();
    }
  }
}

TEST_P(NormForwardTest, LongRowsWhereNoClusterFits) {
  Problem problem(generator, {2, 20000}, kTypes[0], {}, {});
  const auto plan_on = [&](int multiprocessors) {
    return norm_forward_plan(problem.arguments(), device_of(90, multiprocessors));
  };
  EXPECT_EQ(plan_on(8).cluster, 4);
  EXPECT_TRUE(plan_on(2).generic);
  ASSERT_EQ(problem.run(device_of(90, 2)), cudaSuccess);
  problem.expect_correct();
}

// A launch of one wave, where the architecture can: two blocks of 512 threads on each of 4 multiprocessors.
TEST(ForwardOverlapTest, IsForSmallLaunches) {
  std::mt19937_64 generator;
  for (const int architecture : {80, 90, 100}) {
    for (const std::int64_t rows : {8, 9}) {
      Problem problem(generator, {rows, 8192}, kTypes[0], {}, {});
      EXPECT_EQ(norm_forward_plan(problem.arguments(), device_of(architecture)).overlaps,
                architecture >= 90 && rows == 8);
    }
  }
}

TEST_P(NormForwardTest, MovesTheLeastBytes) {
  for (const Types type : kTypes) {
    for (const Shape shape : {Shape{5, 64}, Shape{3, 768}, Shape{3, 775}, Shape{2, 2048}}) {
      SCOPED_TRACE(::testing::Message() << type << " " << shape.rows << "x" << shape.cols);
      for (const bool centered : {true, false}) {
        Problem problem(generator, shape, type, {}, {.centered = centered, .adds = true, .stores_sum = true});
        simt::counters() = {};
        ASSERT_EQ(problem.run(), cudaSuccess);
        const auto elements = shape.rows * shape.cols;
        EXPECT_EQ(simt::counters().loaded_once, elements * (size_of(type.input) + size_of(type.residual)));
        EXPECT_EQ(simt::counters().stored, elements * (size_of(type.input) + size_of(type.sum)));
      }
    }
  }
}

TEST_P(NormForwardTest, ResultsMayBeWrittenOverInputs) {
  for (const Types type : {kTypes[0], kTypes[1], kTypes[4], kRareTypes[0]}) {
    for (const Shape shape : {Shape{5, 64}, Shape{3, 775}, Shape{2, 2048}}) {
      SCOPED_TRACE(::testing::Message() << type << " " << shape.rows << "x" << shape.cols);
      for (const bool centered : {true, false}) {
        Problem apart(generator, shape, type, {},
                      {.centered = centered, .adds = true, .stores_sum = true, .dropout_p = 0.2});
        Problem together = apart;
        ASSERT_EQ(apart.run(), cudaSuccess);
        NormForward arguments = together.arguments();
        arguments.output = together.input.operand();
        arguments.sum = together.residual.operand();
        ASSERT_EQ(together.run(arguments, device_of()), cudaSuccess);
        EXPECT_EQ(together.input.storage(), apart.output.storage());
        EXPECT_EQ(together.residual.storage(), apart.sum.storage());
      }
    }
  }
}

TEST_P(NormForwardTest, RowsFarFromZero) {
  for (const double mean : {1e4, 1e6}) {
    for (const std::int64_t cols : {64, 768, 775, 2048, 8200}) {
      SCOPED_TRACE(::testing::Message() << cols << " columns of mean " << mean);
      for (const bool centered : {true, false}) {
        Problem problem(generator, {3, cols}, kTypes[0], {}, {.centered = centered, .affine = false, .mean = mean});
        ASSERT_EQ(problem.run(), cudaSuccess);
        problem.expect_correct();
      }
    }
  }
}

// Most of them in numbers of columns by which float cannot divide as it multiplies by the reciprocal.
TEST_P(NormForwardTest, ConstantRowsGiveTheBias) {
  for (const std::int64_t cols : {41, 328, 775, 1128, 2048, 8437}) {
    for (const double value : {0.1, 1e6 / 3}) {
      SCOPED_TRACE(::testing::Message() << cols << " columns of " << value);
      Problem problem(generator, {2, cols}, kTypes[0], {}, {});
      for (std::int64_t row = 0; row < 2; ++row) {
        for (std::int64_t col = 0; col < cols; ++col) problem.input.set(row, col, value);
      }
      ASSERT_EQ(problem.run(), cudaSuccess);
      for (std::int64_t row = 0; row < 2; ++row) {
        for (std::int64_t col = 0; col < cols; ++col) ASSERT_EQ(problem.output(row, col), problem.bias(0, col));
      }
    }
  }
}

// Squares beyond the range of float16, whose largest number is 65504.
TEST_P(NormForwardTest, LargeFloat16) {
  for (const auto& [mean, deviation] : {std::pair{6e4, 1e3}, std::pair{-6e4, 1e3}, std::pair{0.0, 1.4e4}}) {
    for (const std::int64_t cols : {64, 768, 775, 2048}) {
      for (const bool adds : {false, true}) {
        SCOPED_TRACE(::testing::Message() << cols << " columns of mean " << mean << (adds ? " and a residual" : ""));
        for (const bool centered : {true, false}) {
          Problem problem(
              generator, {3, cols}, kTypes[4], {},
              {.centered = centered, .adds = adds, .stores_sum = true, .mean = mean, .deviation = deviation});
          ASSERT_EQ(problem.run(), cudaSuccess);
          problem.expect_correct();
        }
      }
    }
  }
}

TEST_P(NormForwardTest, SpecialValues) {
  for (const bool centered : {true, false}) {
    Problem problem(generator, {5, 775}, kTypes[1], {},
                    {.centered = centered, .adds = true, .stores_sum = true, .dropout_p = 0.5});
    const double infinity = std::numeric_limits<double>::infinity();
    problem.input.set(0, 5, std::numeric_limits<double>::quiet_NaN());
    for (std::int64_t col = 0; col < 775; ++col) {  // in dropped places alone
      if (!problem.kept(1, col)) problem.input.set(1, col, infinity);
      problem.input.set(2, col, 0.0), problem.residual.set(2, col, 3.0);
      problem.input.set(4, col, 0.0), problem.residual.set(4, col, 0.0);
    }
    problem.residual.set(3, 7, -infinity);
    ASSERT_EQ(problem.run(), cudaSuccess);
    problem.expect_correct();
  }
}

TEST(ForwardPlanTest, HoldsEveryRow) {
  for (const int bytes : {2, 4}) {
    for (const int residual_bytes : {0, 2, 4}) {
      for (const int architecture : {75, 80, 90, 120}) {
        for (const bool shifted : {false, true}) {
          for (int cols = 1; cols <= 140000; cols += cols / 50 + 1) {
            const Plan plan = forward_plan(cols, bytes, residual_bytes, shifted, shifted, architecture);
            if (plan.generic) continue;
            const int vector = kVectorBytes / bytes, needed = cols + (shifted ? vector - 1 : 0);
            EXPECT_GE(plan.row_threads * plan.items * plan.cluster * vector, needed);
            EXPECT_EQ(plan.threads % 32, 0);
            EXPECT_LE(plan.threads, 1024);
            EXPECT_TRUE(plan.cluster == 1 || architecture >= 90);
          }
        }
      }
    }
  }
}

}  // namespace
}  // namespace resnorm::cuda::testing
