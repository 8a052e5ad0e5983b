// SPDX-License-Identifier: BSD-3-Clause
// The backward kernels, from the entry point on, in the emulation of a GPU.
#include "emulated_test.h"
#include "kernels/cuda/plan.h"
#include "norm_backward_problem.h"

namespace resnorm::cuda::testing {
namespace {

using Problem = NormBackwardProblem;
using Types = Problem::Types;
using Options = Problem::Options;

class NormBackwardTest : public EmulatedTest {};
RESNORM_FOR_SCHEDULES(NormBackwardTest, kSchedules);

// What has kernels of its own, and what goes through one kernel for all.
const std::vector<Types> kTypes = {
    {kF32, kF32, kF32, kF32}, {kBF16, kBF16, kBF16, kBF16}, {kBF16, kF32, kF32, kF32}, {kBF16, kBF16, kF32, kBF16},
    {kF16, kF16, kF16, kF32}, {kF16, kF32, kF32, kF16},     {kF16, kF16, kF32, kF16},
};
const std::vector<Types> kRareTypes = {
    {kF64, kF64, kF64, kF64}, {kF32, kBF16, kF32, kF32}, {kBF16, kF32, kBF16, kBF16}, {kF32, kF64, kF64, kF32}};

const std::vector<Options> kOptions = {
    {},
    {.affine = false},
    {.adds = true, .grad_residual = true},
    {.adds = true, .affine = false, .input_bias = true, .grad_sum = true},
    {.adds = true, .grad_sum = true, .grad_residual = true, .dropout_p = 0.3},
    {.adds = true, .input_bias = true, .grad_residual = true, .dropout_p = 0.1},
    {.centered = false},
    {.centered = false, .adds = true, .grad_sum = true, .grad_residual = true},
    {.centered = false, .adds = true, .affine = false, .input_bias = true, .grad_sum = true},
    {.centered = false, .adds = true, .grad_residual = true, .dropout_p = 0.3},
    {.centered = false, .adds = true, .input_bias = true, .grad_sum = true, .grad_residual = true, .dropout_p = 0.1},
};

// A warp a row, several warps, with rows left over and with fewer rows than groups; and odd sizes.
const std::vector<Shape> kBackwardShapes = {{150, 8},  {37, 128}, {70, 256}, {3, 512}, {37, 520},
                                            {19, 768}, {9, 2048}, {5, 1},    {23, 63}, {3, 775}};

TEST_P(NormBackwardTest, MatchesFloat64Reference) {
  for (const auto* types : {&kTypes, &kRareTypes}) {
    for (const Types type : *types) {
      for (const Shape shape : kBackwardShapes) {
        for (const Options& options : kOptions) {
          if (leaves_out_case()) continue;
          SCOPED_TRACE(::testing::Message()
                       << type << " " << shape.rows << "x" << shape.cols << " options " << &options - kOptions.data());
          Problem problem(generator, shape, type, {}, options);
          ASSERT_EQ(problem.run(), cudaSuccess);
          problem.expect_correct();
        }
      }
    }
  }
}

TEST_P(NormBackwardTest, AnyStridesAndAlignment) {
  for (const Types type : kTypes) {
    for (const Layout layout : {Layout{8, 0}, Layout{3, 0}, Layout{0, 1}, Layout{8, 4}}) {
      if (leaves_out_case()) continue;
      SCOPED_TRACE(::testing::Message() << type << " padding " << layout.padding << " offset " << layout.offset);
      for (const bool centered : {true, false}) {
        Problem problem(generator, {21, 264}, type, layout,
                        {.centered = centered, .adds = true, .grad_sum = true, .grad_residual = true});
        ASSERT_EQ(problem.run(), cudaSuccess);
        problem.expect_correct();
      }
    }
  }
}

// Clusters of 2, 4 and 8; without clusters, and beyond them, the kernel that needs none; little shared memory.
TEST_P(NormBackwardTest, LongRows) {
  for (const auto& [cols, architecture] : std::vector<std::pair<std::int64_t, int>>{
           {8200, 90}, {4096, 90}, {16400, 90}, {40000, 90}, {8200, 80}, {70000, 90}, {2048, 75}, {2048, 120}}) {
    if (leaves_out_case()) continue;
    SCOPED_TRACE(::testing::Message() << cols << " columns on sm_" << architecture);
    for (const bool centered : {true, false}) {
      Problem problem(generator, {5, cols}, kTypes[0], {},
                      {.centered = centered, .adds = true, .grad_sum = true, .grad_residual = true});
      ASSERT_EQ(problem.run(device_of(architecture, 8)), cudaSuccess);
      problem.expect_correct();
    }
  }
}

// Asynchronously, but for the vectors at the ends of rows that start anywhere.
TEST_P(NormBackwardTest, MovesTheLeastBytes) {
  for (const Types type : kTypes) {
    for (const Shape shape : {Shape{70, 64}, Shape{19, 768}, Shape{9, 2048}, Shape{19, 775}}) {
      SCOPED_TRACE(::testing::Message() << type << " " << shape.rows << "x" << shape.cols);
      for (const bool centered : {true, false}) {
        Problem problem(generator, shape, type, {},
                        {.centered = centered, .adds = true, .affine = false, .grad_sum = true, .grad_residual = true});
        simt::counters() = {};
        ASSERT_EQ(problem.run(), cudaSuccess);
        const auto elements = shape.rows * shape.cols;
        const simt::Counters moved = simt::counters();
        EXPECT_EQ(moved.copied_asynchronously + moved.loaded_once,
                  elements * (size_of(type.gradient) + 2 * size_of(type.sum)));
        EXPECT_EQ(moved.stored, elements * (size_of(type.gradient) + size_of(type.residual)));
        const auto row_ends = problem.plan.shifted ? 2 * kVectorBytes * 3 * shape.rows * 2 : 0;
        EXPECT_LE(moved.loaded_once, row_ends);
      }
    }
  }
}

TEST_P(NormBackwardTest, RowsFarFromZero) {
  for (const double mean : {1e4, 1e6}) {
    for (const std::int64_t cols : {64, 768, 2048}) {
      SCOPED_TRACE(::testing::Message() << cols << " columns of mean " << mean);
      for (const bool centered : {true, false}) {
        Problem problem(generator, {5, cols}, kTypes[0], {}, {.centered = centered, .mean = mean});
        ASSERT_EQ(problem.run(), cudaSuccess);
        problem.expect_correct();
      }
    }
  }
}

TEST_P(NormBackwardTest, LargeFloat16) {
  for (const auto& [mean, deviation] : {std::pair{6e4, 1e3}, std::pair{0.0, 1.4e4}}) {
    for (const std::int64_t cols : {64, 768, 2048}) {
      SCOPED_TRACE(::testing::Message() << cols << " columns of mean " << mean);
      for (const bool centered : {true, false}) {
        Problem problem(generator, {5, cols}, kTypes[4], {},
                        {.centered = centered, .adds = true, .grad_sum = true, .mean = mean, .deviation = deviation});
        ASSERT_EQ(problem.run(), cudaSuccess);
        problem.expect_correct();
      }
    }
  }
}

// The partition depends on sizes and device alone.
TEST_P(NormBackwardTest, RepeatsBitwise) {
  Problem first(generator, {150, 520}, kTypes[1], {}, {.adds = true, .input_bias = true, .dropout_p = 0.2});
  Problem second = first;
  ASSERT_EQ(first.run(), cudaSuccess);
  simt::schedule() = {simt::Order::kRandom, 2};
  ASSERT_EQ(second.run(), cudaSuccess);
  for (Matrix Problem::* result :
       {&Problem::grad_input, &Problem::grad_weight, &Problem::grad_bias, &Problem::grad_input_bias}) {
    EXPECT_EQ((first.*result).storage(), (second.*result).storage());
  }
}

// Fewer rows than groups, fewer than there are places in a vector, and more than one round.
TEST_P(NormBackwardTest, RowsThatStartAnywhere) {
  for (const Types type : kTypes) {
    for (const Shape shape : {Shape{1, 33}, Shape{5, 775}, Shape{300, 129}, Shape{150, 513}, Shape{37, 1031}}) {
      for (const Options& options : kOptions) {
        if (leaves_out_case()) continue;
        SCOPED_TRACE(::testing::Message()
                     << type << " " << shape.rows << "x" << shape.cols << " options " << &options - kOptions.data());
        Problem problem(generator, shape, type, {}, options);
        ASSERT_EQ(problem.run(), cudaSuccess);
        EXPECT_TRUE(problem.plan.shifted);
        problem.expect_correct();
      }
    }
  }
}

// The weight's gradient, the bias's of a centered norm, the input bias's.
TEST(BackwardWorkspaceTest, HoldsTheSumsOfTheNorm) {
  std::mt19937_64 generator;
  for (const Types& types : {kTypes[0], kRareTypes[0]}) {
    for (const bool centered : {true, false}) {
      for (const bool input_bias : {true, false}) {
        Problem problem(generator, {37, 520}, types, {},
                        {.centered = centered, .adds = true, .input_bias = input_bias});
        const Plan plan = norm_backward_plan(problem.arguments(), device_of());
        const std::size_t sums = 1 + centered + input_bias;
        EXPECT_EQ(norm_backward_workspace_bytes(problem.arguments(), plan),
                  plan.row_subsets * sums * 520 * size_of(problem.accumulation));
      }
    }
  }
}

// y was computed from the exact sum, which is lost: no gradient of that row is a number that an optimizer may take.
TEST_P(NormBackwardTest, AFloat16SumThatOverflowedGivesNoFiniteGradient) {
  for (const std::int64_t cols : {64, 2048}) {
    for (const bool centered : {true, false}) {
      Problem problem(generator, {3, cols}, kTypes[4], {}, {.centered = centered, .adds = true, .grad_residual = true});
      problem.sum.set(1, 5, std::numeric_limits<double>::infinity());
      ASSERT_EQ(problem.run(), cudaSuccess);
      for (std::int64_t row = 0; row < 3; ++row) {
        for (std::int64_t col = 0; col < cols; ++col) {
          EXPECT_EQ(std::isfinite(problem.grad_input(row, col)), row != 1) << row << ", " << col;
        }
      }
    }
  }
}

// As where code for sm_80 runs on sm_86 and sm_89, whose blocks have less.
TEST(BackwardPlanTest, FitsTheSharedMemoryOfTheDevice) {
  std::mt19937_64 generator;
  Problem problem(generator, {37, 2000}, kTypes[0], {}, {.adds = true, .grad_sum = true, .grad_residual = true});
  for (const auto& [shared_bytes, threads] : {std::pair(163 << 10, 256), {99 << 10, 128}}) {
    const Plan plan = norm_backward_plan(problem.arguments(), {80, 8, shared_bytes});
    EXPECT_FALSE(plan.generic);
    EXPECT_EQ(plan.threads, threads);
  }
}

TEST(BackwardPlanTest, HoldsEveryRowInTheSharedMemoryThereIs) {
  for (const int bytes : {2, 4}) {
    for (const int row_bytes : {2 * bytes, 3 * bytes, bytes + 8}) {
      for (const int architecture : {75, 80, 86, 90, 100, 120}) {
        for (const bool shifted : {false, true}) {
          const int vector = kVectorBytes / bytes;
          for (int cols = 1; cols <= 140000; cols += cols / 50 + 1) {
            const Plan plan =
                backward_plan(cols, bytes, row_bytes, shifted, architecture, max_shared_bytes(architecture));
            if (plan.generic) continue;
            EXPECT_GE(plan.row_threads * plan.items * plan.cluster * vector, cols + (shifted ? vector - 1 : 0));
            EXPECT_EQ(plan.threads % plan.row_threads, 0);
            EXPECT_LE(plan.threads, kBackwardThreads);
            EXPECT_LE(staging_of(plan, vector, row_bytes).total_bytes, max_shared_bytes(architecture));
            EXPECT_TRUE(plan.row_threads == 32 || plan.groups() <= 15) << "named barriers";
            EXPECT_TRUE(plan.cluster == 1 || architecture >= 90);
          }
        }
      }
    }
  }
}

}  // namespace
}  // namespace resnorm::cuda::testing
