// SPDX-License-Identifier: BSD-3-Clause
// The forward kernels, from the entry point on, in the emulation of a GPU.
#include "kernels/cuda/norm_forward.h"

#include "../fixture.h"
#include "../layer_norm_reference.h"
#include "../residual_reference.h"
#include "kernels/cuda/plan.h"
#include "launch.h"

namespace resnorm::cuda::testing {
namespace {

using namespace cpu::testing;

constexpr double kEps = 1e-5;
constexpr std::int64_t kSeed = 0x123456789ABCDEF;
constexpr int kNewest = 90;

struct Types {
  DType input, residual, sum, parameters;
};

std::ostream& operator<<(std::ostream& out, const Types& types) {
  return out << name_of(types.input) << "+" << name_of(types.residual) << " -> " << name_of(types.sum) << ", "
             << name_of(types.parameters);
}

struct Options {
  bool adds = false, affine = true, input_bias = false, stores_sum = false, statistics = true;
  double dropout_p = 0.0;
  double mean = 0.0;
};

struct Problem {
  Matrix input, residual, input_bias, weight, bias, output, sum, mean, rstd;
  Dropout dropout;
  KeepMask kept;
  DType accumulation;

  Problem(std::mt19937_64& generator, Shape shape, Types types, Layout layout, Options options)
      : dropout(dropout_of(options.adds ? options.dropout_p : 0.0, kSeed)),
        kept(dropout, shape),
        accumulation(accumulation_of({types.input, options.adds ? types.sum : types.input})) {
    const auto [rows, cols] = shape;
    const Layout aligned_as{0, layout.offset};
    input = Matrix::random(generator, rows, cols, types.input, layout, options.mean);
    output = Matrix(rows, cols, types.input, layout);
    if (options.adds) residual = Matrix::random(generator, rows, cols, types.residual, layout);
    if (options.adds && options.stores_sum) sum = Matrix(rows, cols, types.sum, layout);
    const auto parameter = [&] { return Matrix::random(generator, 1, cols, types.parameters, aligned_as, 1.0); };
    if (options.affine) weight = parameter(), bias = parameter();
    if (options.adds && options.input_bias) input_bias = parameter();
    if (options.statistics) mean = rstd = Matrix(1, rows, accumulation);
    sum_dtype_ = types.sum;
  }

  cudaError_t run(int architecture = kNewest) { return run(architecture, output.operand(), sum_operand()); }

  cudaError_t run(int architecture, Rows output_rows, Rows sum_rows) {
    const AddLayerNormForward arguments = {.rows = input.rows(),
                                           .cols = input.cols(),
                                           .input = input.const_operand(),
                                           .residual = residual.const_operand(),
                                           .input_bias = input_bias.const_vector(),
                                           .weight = weight.const_vector(),
                                           .bias = bias.const_vector(),
                                           .dropout = dropout,
                                           .eps = kEps,
                                           .output = output_rows,
                                           .sum = sum_rows,
                                           .mean = mean.vector().data,
                                           .rstd = rstd.vector().data};
    return norm_forward(arguments, norm_forward_plan(arguments, {architecture, 4}), &kSeed, nullptr);
  }

  // A sum that is not stored still has a dtype.
  Rows sum_operand() { return sum.present() ? sum.operand() : Rows{.dtype = sum_dtype_}; }

  void expect_correct() const {
    const auto rows = input.rows(), cols = input.cols();
    Values exact(rows, cols), size(rows, cols);
    if (residual.present()) {
      auto sums = residual_sum(input, residual, input_bias, dropout, kept);
      exact = sums.sum, size = sums.scale;
      expect_close(sum, exact, size, accumulation, 4, "sum");
    } else {
      for (std::int64_t row = 0; row < rows; ++row) {
        for (std::int64_t col = 0; col < cols; ++col) exact(row, col) = input(row, col);
      }
    }
    auto want = normalize(exact, rows, cols, weight, bias, kEps);
    for (std::int64_t row = 0; row < rows; ++row) {
      for (std::int64_t col = 0; col < cols; ++col) {
        want.scale(row, col) += size(row, col) * want.rstd[row] * std::fabs(weight_at(weight, col));
      }
      if (!mean.present() || !std::isfinite(want.mean[row])) continue;
      EXPECT_NEAR(mean(0, row), want.mean[row], 1e-6 * (1 + std::fabs(want.mean[row])));
      EXPECT_NEAR(rstd(0, row), want.rstd[row], 1e-5 * want.rstd[row]);
    }
    expect_close(output, want.output, want.scale, accumulation, 24, "output");
  }

 private:
  DType sum_dtype_;
};

class NormForwardTest : public ::testing::TestWithParam<simt::Order> {
 protected:
  void SetUp() override {
    simt::schedule() = {GetParam(), 1};
    simt::counters() = {};
  }

  std::mt19937_64 generator{20240607};
};
INSTANTIATE_TEST_SUITE_P(Order, NormForwardTest,
                         ::testing::Values(simt::Order::kForward, simt::Order::kReverse, simt::Order::kRandom));

constexpr DType kF32 = DType::kFloat32, kF64 = DType::kFloat64, kBF16 = DType::kBFloat16, kF16 = DType::kFloat16;

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
};

TEST_P(NormForwardTest, MatchesFloat64Reference) {
  for (const auto* types : {&kTypes, &kRareTypes}) {
    for (const Types type : *types) {
      for (const auto* shapes : {&kForwardShapes, &kOddShapes}) {
        for (const Shape shape : *shapes) {
          for (const Options& options : kOptions) {
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
        SCOPED_TRACE(::testing::Message() << type << " " << shape.rows << "x" << shape.cols << " padding "
                                          << layout.padding << " offset " << layout.offset);
        Problem problem(generator, shape, type, layout, {.adds = true, .stores_sum = true, .dropout_p = 0.3});
        ASSERT_EQ(problem.run(), cudaSuccess);
        problem.expect_correct();
      }
    }
  }
}

// Clusters of 2, 4 and 8; without clusters, and beyond them, the kernel that reads the row again.
TEST_P(NormForwardTest, LongRows) {
  for (const auto& [cols, architecture] : std::vector<std::pair<std::int64_t, int>>{
           {8192, 90}, {8200, 90}, {16391, 90}, {33000, 90}, {8200, 80}, {70000, 90}}) {
    SCOPED_TRACE(::testing::Message() << cols << " columns on sm_" << architecture);
    Problem problem(generator, {2, cols}, kTypes[0], {}, {.adds = true, .stores_sum = true, .dropout_p = 0.1});
    ASSERT_EQ(problem.run(architecture), cudaSuccess);
    problem.expect_correct();
  }
}

TEST_P(NormForwardTest, MovesTheLeastBytes) {
  for (const Types type : kTypes) {
    for (const Shape shape : {Shape{5, 64}, Shape{3, 768}, Shape{3, 775}, Shape{2, 2048}}) {
      SCOPED_TRACE(::testing::Message() << type << " " << shape.rows << "x" << shape.cols);
      Problem problem(generator, shape, type, {}, {.adds = true, .stores_sum = true});
      simt::counters() = {};
      ASSERT_EQ(problem.run(), cudaSuccess);
      const auto elements = shape.rows * shape.cols;

      EXPECT_EQ(simt::counters().loaded_once, elements * (size_of(type.input) + size_of(type.residual)));
      EXPECT_EQ(simt::counters().stored, elements * (size_of(type.input) + size_of(type.sum)));
    }
  }
}

TEST_P(NormForwardTest, ResultsMayBeWrittenOverInputs) {
  for (const Types type : {kTypes[0], kTypes[1], kTypes[4], kRareTypes[0]}) {
    for (const Shape shape : {Shape{5, 64}, Shape{3, 775}, Shape{2, 2048}}) {
      SCOPED_TRACE(::testing::Message() << type << " " << shape.rows << "x" << shape.cols);
      Problem apart(generator, shape, type, {}, {.adds = true, .stores_sum = true, .dropout_p = 0.2});
      Problem together = apart;
      ASSERT_EQ(apart.run(), cudaSuccess);
      ASSERT_EQ(together.run(kNewest, together.input.operand(), together.residual.operand()), cudaSuccess);
      EXPECT_EQ(together.input.storage(), apart.output.storage());
      EXPECT_EQ(together.residual.storage(), apart.sum.storage());
    }
  }
}

TEST_P(NormForwardTest, RowsFarFromZero) {
  for (const double mean : {1e4, 1e6}) {
    for (const std::int64_t cols : {64, 768, 775, 2048, 8200}) {
      SCOPED_TRACE(::testing::Message() << cols << " columns of mean " << mean);
      Problem problem(generator, {3, cols}, kTypes[0], {}, {.affine = false, .mean = mean});
      ASSERT_EQ(problem.run(), cudaSuccess);
      problem.expect_correct();
    }
  }
}

TEST_P(NormForwardTest, SpecialValues) {
  Problem problem(generator, {4, 775}, kTypes[1], {}, {.adds = true, .stores_sum = true, .dropout_p = 0.5});
  const double infinity = std::numeric_limits<double>::infinity();
  problem.input.set(0, 5, std::numeric_limits<double>::quiet_NaN());
  for (std::int64_t col = 0; col < 775; ++col) {  // in dropped places alone
    if (!problem.kept(1, col)) problem.input.set(1, col, infinity);
    problem.input.set(2, col, 0.0), problem.residual.set(2, col, 3.0);
  }
  problem.residual.set(3, 7, -infinity);
  ASSERT_EQ(problem.run(), cudaSuccess);
  problem.expect_correct();
}

TEST(ForwardPlanTest, HoldsEveryRow) {
  for (const int bytes : {2, 4}) {
    for (const int stream_bytes : {0, 2, 4}) {
      for (const int architecture : {75, 80, 90, 120}) {
        for (const bool shifted : {false, true}) {
          for (int cols = 1; cols <= 140000; cols += cols / 50 + 1) {
            const Plan plan = forward_plan(cols, bytes, stream_bytes, shifted, shifted, architecture);
            if (plan.any) continue;
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
