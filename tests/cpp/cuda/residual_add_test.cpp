// SPDX-License-Identifier: BSD-3-Clause
// residual_add's kernels, from the entry points on, in the emulation of a GPU.
#include "kernels/cuda/residual_add.h"

#include "../fixture.h"
#include "../residual_reference.h"
#include "emulated_test.h"
#include "far_rows.h"

namespace resnorm::cuda::testing {
namespace {

using namespace cpu::testing;

constexpr Device kDevice = device_of();

struct Types {
  DType branch, residual, sum, parameters;
};

std::ostream& operator<<(std::ostream& out, const Types& types) {
  return out << name_of(types.branch) << "+" << name_of(types.residual) << " -> " << name_of(types.sum) << ", "
             << name_of(types.parameters);
}

struct Options {
  bool input_bias = false;
  double dropout_p = 0.0;
};

struct Problem {
  Matrix input, residual, input_bias, output, grad_output, grad_input, grad_input_bias;
  Dropout dropout;
  KeepMask kept;
  DType accumulation, backward_accumulation;
  Plan plan;  // of the last run

  Problem(std::mt19937_64& generator, Shape shape, Types types, Layout layout, Options options)
      : dropout(dropout_of(options.dropout_p, kSeed)),
        kept(dropout, shape),
        accumulation(accumulation_of({types.branch, types.residual, types.sum})),
        backward_accumulation(accumulation_of({types.branch, types.sum})) {
    const auto [rows, cols] = shape;
    input = Matrix::random(generator, rows, cols, types.branch, layout);
    residual = Matrix::random(generator, rows, cols, types.residual, layout);
    output = Matrix(rows, cols, types.sum, layout);
    grad_output = Matrix::random(generator, rows, cols, types.sum, layout);
    grad_input = Matrix(rows, cols, types.branch, layout);
    if (options.input_bias) {
      const Layout aligned_as{0, layout.offset};
      input_bias = Matrix::random(generator, 1, cols, types.parameters, aligned_as);
      grad_input_bias = Matrix(1, cols, types.parameters, aligned_as);
    }
  }

  ResidualAddForward forward_arguments() {
    return {.rows = input.rows(),
            .cols = input.cols(),
            .input = input.const_operand(),
            .residual = residual.const_operand(),
            .input_bias = input_bias.const_vector(),
            .dropout = dropout,
            .output = output.operand()};
  }

  ResidualAddBackward backward_arguments() {
    return {.rows = grad_output.rows(),
            .cols = grad_output.cols(),
            .grad_output = grad_output.const_operand(),
            .dropout = dropout,
            .grad_input = grad_input.operand(),
            .grad_input_bias = grad_input_bias.vector()};
  }

  cudaError_t forward() { return run(forward_arguments()); }

  cudaError_t forward(Rows to) {
    ResidualAddForward arguments = forward_arguments();
    arguments.output = to;
    return run(arguments);
  }

  cudaError_t backward() { return run(backward_arguments()); }

  cudaError_t run(const ResidualAddForward& arguments) {
    plan = residual_add_forward_plan(arguments);
    return residual_add_forward(arguments, plan, &kSeed, nullptr);
  }

  cudaError_t run(ResidualAddBackward arguments) {
    plan = residual_add_backward_plan(arguments, kDevice);
    Bytes workspace(residual_add_backward_workspace_bytes(arguments, plan), 0xFF);
    arguments.workspace = workspace.data();
    return residual_add_backward(arguments, plan, &kSeed, nullptr);
  }

  // On rows `row_stride` apart, the first of which is row `first_row` of its matrix.
  void forward_far(std::int64_t first_row, std::int64_t row_stride) {
    FarRows far_input(input, first_row * row_stride, row_stride);
    FarRows far_residual(residual, first_row * row_stride, row_stride);
    FarRows far_output(output, first_row * row_stride, row_stride);
    ResidualAddForward arguments = forward_arguments();
    arguments.rows += first_row;
    arguments.input = {far_input.data(), row_stride, input.dtype()};
    arguments.residual = {far_residual.data(), row_stride, residual.dtype()};
    arguments.output = {far_output.data(), row_stride, output.dtype()};
    ASSERT_EQ(run(arguments), cudaSuccess);
    far_output.copy_back();
  }

  // Without the columns' sums, to which blocks that do not run would contribute.
  void backward_far(std::int64_t first_row, std::int64_t row_stride) {
    FarRows far_grad_output(grad_output, first_row * row_stride, row_stride);
    FarRows far_grad_input(grad_input, first_row * row_stride, row_stride);
    ResidualAddBackward arguments = backward_arguments();
    arguments.rows += first_row;
    arguments.grad_output = {far_grad_output.data(), row_stride, grad_output.dtype()};
    arguments.grad_input = {far_grad_input.data(), row_stride, grad_input.dtype()};
    arguments.grad_input_bias = {};
    ASSERT_EQ(run(arguments), cudaSuccess);
    far_grad_input.copy_back();
    grad_input_bias = {};
  }

  void expect_correct() const {
    const auto sums = residual_sum(input, residual, input_bias, dropout, kept);
    expect_close(output, sums.sum, sums.scale, accumulation, 4, "output");
    const auto rows = grad_output.rows(), cols = grad_output.cols();
    Values gradient(rows, cols), size(rows, cols), bias(1, cols), bias_size(1, cols);
    for (std::int64_t row = 0; row < rows; ++row) {
      for (std::int64_t col = 0; col < cols; ++col) {
        if (kept(row, col)) gradient(row, col) = grad_output(row, col) * dropout.scale;
        size(row, col) = std::fabs(gradient(row, col));
        bias(0, col) += gradient(row, col);
        bias_size(0, col) += size(row, col);
      }
    }
    expect_close(grad_input, gradient, size, backward_accumulation, 4, "grad_input");
    expect_close(grad_input_bias, bias, bias_size, backward_accumulation, 8, "grad_input_bias");
  }
};

class ResidualAddCudaTest : public EmulatedTest {};
RESNORM_FOR_SCHEDULES(ResidualAddCudaTest, kSchedules);

// What has kernels of its own, and what goes through one kernel for all.
const std::vector<Types> kTypes = {
    {kF32, kF32, kF32, kF32}, {kBF16, kBF16, kBF16, kBF16}, {kBF16, kF32, kF32, kF32}, {kBF16, kBF16, kF32, kBF16},
    {kF16, kF16, kF16, kF32}, {kF16, kF32, kF32, kF16},     {kF16, kF16, kF32, kF16},
};
const std::vector<Types> kRareTypes = {
    {kF64, kF64, kF64, kF64}, {kF32, kBF16, kF32, kF32}, {kBF16, kF32, kBF16, kBF16}, {kF32, kF64, kF64, kF32}};

const std::vector<Options> kOptions = {{}, {.input_bias = true}, {.dropout_p = 0.3}, {true, 0.1}, {true, 1.0}};

TEST_P(ResidualAddCudaTest, MatchesFloat64Reference) {
  for (const auto* types : {&kTypes, &kRareTypes}) {
    for (const Types type : *types) {
      for (const Shape shape :
           {Shape{1, 1}, Shape{150, 8}, Shape{5, 33}, Shape{37, 129}, Shape{19, 768}, Shape{3, 775}, Shape{2, 9000}}) {
        for (const Options& options : kOptions) {
          if (leaves_out_case()) continue;
          SCOPED_TRACE(::testing::Message()
                       << type << " " << shape.rows << "x" << shape.cols << " options " << &options - kOptions.data());
          Problem problem(generator, shape, type, {}, options);
          ASSERT_EQ(problem.forward(), cudaSuccess);
          ASSERT_EQ(problem.backward(), cudaSuccess);
          problem.expect_correct();
        }
      }
    }
  }
}

TEST_P(ResidualAddCudaTest, AnyStridesAndAlignment) {
  for (const Types type : kTypes) {
    for (const Layout layout : {Layout{8, 0}, Layout{3, 0}, Layout{0, 1}, Layout{5, 3}, Layout{8, 4}}) {
      for (const Options& options : kOptions) {
        if (leaves_out_case()) continue;
        SCOPED_TRACE(::testing::Message() << type << " padding " << layout.padding << " offset " << layout.offset
                                          << " options " << &options - kOptions.data());
        Problem problem(generator, {21, 264}, type, layout, options);
        ASSERT_EQ(problem.forward(), cudaSuccess);
        ASSERT_EQ(problem.backward(), cudaSuccess);
        problem.expect_correct();
      }
    }
  }
}

TEST_P(ResidualAddCudaTest, RowsWithoutGapsAreOneLongRow) {
  Problem problem(generator, {16, 33}, kTypes[1], {}, {.dropout_p = 0.3});
  ASSERT_EQ(problem.forward(), cudaSuccess);
  EXPECT_FALSE(problem.plan.shifted);
  ASSERT_EQ(problem.backward(), cudaSuccess);
  EXPECT_FALSE(problem.plan.shifted);
  problem.expect_correct();
}

TEST_P(ResidualAddCudaTest, MovesTheLeastBytes) {
  for (const Types type : kTypes) {
    for (const Shape shape : {Shape{70, 64}, Shape{5, 775}, Shape{3, 5000}}) {
      SCOPED_TRACE(::testing::Message() << type << " " << shape.rows << "x" << shape.cols);
      Problem problem(generator, shape, type, {}, {.dropout_p = 0.2});
      const auto elements = shape.rows * shape.cols;
      simt::counters() = {};
      ASSERT_EQ(problem.forward(), cudaSuccess);
      EXPECT_EQ(simt::counters().loaded_once, elements * (size_of(type.branch) + size_of(type.residual)));
      EXPECT_EQ(simt::counters().stored, elements * size_of(type.sum));
      simt::counters() = {};
      ASSERT_EQ(problem.backward(), cudaSuccess);
      EXPECT_EQ(simt::counters().loaded_once, elements * size_of(type.sum));
      EXPECT_EQ(simt::counters().stored, elements * size_of(type.branch));
    }
  }
}

TEST_P(ResidualAddCudaTest, ResultsMayBeWrittenOverInputs) {
  for (const Types type : {kTypes[0], kTypes[1], kTypes[4], kRareTypes[0]}) {
    for (const Shape shape : {Shape{5, 64}, Shape{3, 775}}) {
      SCOPED_TRACE(::testing::Message() << type << " " << shape.rows << "x" << shape.cols);
      Problem apart(generator, shape, type, {}, {true, 0.2});
      Problem over_input = apart, over_residual = apart;
      ASSERT_EQ(apart.forward(), cudaSuccess);
      ASSERT_EQ(over_input.forward(over_input.input.operand()), cudaSuccess);
      ASSERT_EQ(over_residual.forward(over_residual.residual.operand()), cudaSuccess);
      EXPECT_EQ(over_input.input.storage(), apart.output.storage());
      EXPECT_EQ(over_residual.residual.storage(), apart.output.storage());
    }
  }
}

// What is dropped adds nothing, not even an Inf or a NaN.
TEST_P(ResidualAddCudaTest, DroppedElementsDoNotCount) {
  Problem problem(generator, {4, 775}, kTypes[1], {}, {.dropout_p = 0.5});
  for (std::int64_t col = 0; col < 775; ++col) {
    if (!problem.kept(1, col)) problem.input.set(1, col, std::numeric_limits<double>::infinity());
    if (!problem.kept(2, col)) problem.grad_output.set(2, col, std::numeric_limits<double>::quiet_NaN());
  }
  ASSERT_EQ(problem.forward(), cudaSuccess);
  ASSERT_EQ(problem.backward(), cudaSuccess);
  problem.expect_correct();
}

TEST_P(ResidualAddCudaTest, RepeatsBitwise) {
  Problem first(generator, {150, 521}, kTypes[1], {}, {true, 0.2});
  Problem second = first;
  ASSERT_EQ(first.backward(), cudaSuccess);
  simt::schedule() = {simt::Order::kRandom, 2};
  ASSERT_EQ(second.backward(), cudaSuccess);
  EXPECT_EQ(first.grad_input.storage(), second.grad_input.storage());
  EXPECT_EQ(first.grad_input_bias.storage(), second.grad_input_bias.storage());
}

// Row 1 begins just past 2^31 elements, row 2 just past 2^32.
TEST_P(ResidualAddCudaTest, FarRowStrides) {
  for (const Types type : {kTypes[0], kTypes[1], kRareTypes[0]}) {
    for (const std::int64_t stride : {(std::int64_t{1} << 31) + 8, (std::int64_t{1} << 31) + 3}) {
      for (const Options& options : {Options{.dropout_p = 0.3}, Options{true, 0.3}}) {
        SCOPED_TRACE(::testing::Message() << type << " stride " << stride << " bias " << options.input_bias);
        Problem problem(generator, {3, 264}, type, {}, options);
        problem.forward_far(0, stride);
        problem.backward_far(0, stride);
        problem.expect_correct();
      }
    }
  }
}

// The last rows of a matrix of more than 2^31 and 2^32 elements, of whose grid only the blocks of these rows run: 8
// rows each or, where there are no gaps and no bias, 8 KiB of one long row.
TEST_P(ResidualAddCudaTest, LastRows) {
  constexpr int kRows = 128, kCols = 64;
  for (const std::int64_t elements : {std::int64_t{1} << 31, std::int64_t{1} << 32}) {
    for (const Types type : {kTypes[0], kTypes[1]}) {
      for (const Options& options : {Options{.dropout_p = 0.3}, Options{true, 0.3}}) {
        for (const int gap : {0, 8}) {
          SCOPED_TRACE(::testing::Message()
                       << type << ", " << elements << " elements, bias " << options.input_bias << ", gap of " << gap);
          Problem problem(generator, {kRows, kCols}, type, {}, options);
          problem.kept = KeepMask(problem.dropout, {kRows, kCols}, elements);
          const auto blocks = [&](bool has_bias) {
            return has_bias || gap > 0 ? kRows / 8 : kRows * kCols * size_of(type.branch) / 8192;
          };
          simt::schedule().last_clusters = blocks(options.input_bias);
          problem.forward_far(elements / kCols, kCols + gap);
          simt::schedule().last_clusters = blocks(false);
          problem.backward_far(elements / kCols, kCols + gap);
          problem.expect_correct();
        }
      }
    }
  }
}

}  // namespace
}  // namespace resnorm::cuda::testing
