// SPDX-License-Identifier: BSD-3-Clause
// Offsets past 2^31 and 2^32 elements: a few rows with giant strides, and the last rows of giant matrices, of whose
// grids only the last clusters run. The reference computes the mask on its own.
#include "far_rows.h"
#include "norm_backward_problem.h"
#include "norm_forward_problem.h"
#include "operations.h"

namespace resnorm::cuda::testing {
namespace {

class FarOffsetsTest : public EmulatedTest {};
RESNORM_FOR_SCHEDULES(FarOffsetsTest, kSchedules);

// Which rows a problem's are.
struct Place {
  std::int64_t first_row, row_stride;
  std::int64_t row_step = 1;
};

// Row 1 begins just past 2^31, row 2 just past 2^32.
constexpr std::int64_t kFarStride = (std::int64_t{1} << 31) + 8, kFarOddStride = (std::int64_t{1} << 31) + 3;

// Part of a warp, a warp, a block, and a cluster of two to the row; and a kernel that takes any.
struct Case {
  DType dtype;
  std::int64_t cols;
};
constexpr Case kCases[] = {{kBF16, 64}, {kBF16, 520}, {kF32, 2048}, {kF32, 8200}, {kF32, 775}, {kF64, 4200}};

cudaError_t run(NormForwardProblem& problem, Place place, const Device& device) {
  const auto far = [&](Matrix& near) {
    return FarRows(near, place.first_row * place.row_stride, place.row_step * place.row_stride);
  };
  FarRows input = far(problem.input), residual = far(problem.residual);
  FarRows output = far(problem.output), sum = far(problem.sum);
  FarRows mean(problem.mean, place.first_row, 0), rstd(problem.rstd, place.first_row, 0);
  NormForward arguments = problem.arguments();
  arguments.rows = place.first_row + (arguments.rows - 1) * place.row_step + 1;
  arguments.input = {input.data(), place.row_stride, problem.input.dtype()};
  arguments.residual = {residual.data(), place.row_stride, problem.residual.dtype()};
  arguments.output = {output.data(), place.row_stride, problem.output.dtype()};
  arguments.sum = {sum.data(), place.row_stride, problem.sum.dtype()};
  arguments.mean = mean.data();
  arguments.rstd = rstd.data();
  const cudaError_t error = problem.run(arguments, device);
  for (FarRows* result : {&output, &sum, &mean, &rstd}) result->copy_back();
  return error;
}

// `workspace` has a row for each of the last subsets.
cudaError_t run(NormBackwardProblem& problem, Place place, Matrix& workspace, std::int64_t first_subset,
                const Device& device) {
  const auto far = [&](Matrix& near) { return FarRows(near, place.first_row * place.row_stride, place.row_stride); };
  FarRows grad_output = far(problem.grad_output), grad_sum = far(problem.grad_sum), sum = far(problem.sum);
  FarRows grad_input = far(problem.grad_input), grad_residual = far(problem.grad_residual);
  FarRows mean(problem.mean, place.first_row, 0), rstd(problem.rstd, place.first_row, 0);
  FarRows partials(workspace, first_subset * workspace.cols(), workspace.cols());
  NormBackward arguments = problem.arguments();
  arguments.rows += place.first_row;
  arguments.grad_output = {grad_output.data(), place.row_stride, problem.grad_output.dtype()};
  arguments.grad_sum = {grad_sum.data(), place.row_stride, problem.grad_sum.dtype()};
  arguments.sum = {sum.data(), place.row_stride, problem.sum.dtype()};
  arguments.grad_input = {grad_input.data(), place.row_stride, problem.grad_input.dtype()};
  arguments.grad_residual = {grad_residual.data(), place.row_stride, problem.grad_residual.dtype()};
  arguments.mean = mean.data();
  arguments.rstd = rstd.data();
  arguments.workspace = partials.data();
  const cudaError_t error = problem.run(arguments, device);
  for (FarRows* result : {&grad_input, &grad_residual}) result->copy_back();
  return error;
}

constexpr Device kDevice = device_of();
constexpr int kRowSubsets = 8;  // at most: rows that start anywhere need one for each element of a vector
constexpr NormForwardProblem::Options forward_options(bool centered) {
  return {.centered = centered, .adds = true, .stores_sum = true, .dropout_p = 0.3};
}
// Without the columns' sums, for which the subsets that do not run would be needed.
constexpr NormBackwardProblem::Options backward_options(bool centered) {
  return {
      .centered = centered, .adds = true, .affine = false, .grad_sum = true, .grad_residual = true, .dropout_p = 0.3};
}

TEST_P(FarOffsetsTest, RowStrides) {
  for (const auto& [dtype, cols] : kCases) {
    for (const std::int64_t stride : {kFarStride, kFarOddStride}) {
      for (const bool centered : {true, false}) {
        if (leaves_out_case()) continue;
        SCOPED_TRACE(::testing::Message() << name_of(dtype) << " " << cols << " columns, stride " << stride
                                          << (centered ? ", centered" : ""));
        NormForwardProblem forward(generator, {3, cols}, {dtype, dtype, dtype, dtype}, {}, forward_options(centered));
        ASSERT_EQ(run(forward, {0, stride}, kDevice), cudaSuccess);
        forward.expect_correct();
        NormBackwardProblem backward(generator, {3, cols}, {dtype, dtype, dtype, dtype}, {},
                                     backward_options(centered));
        Matrix workspace(kRowSubsets, backward_column_sums(centered, false) * cols, backward.accumulation);
        ASSERT_EQ(run(backward, {0, stride}, workspace, 0, kDevice), cudaSuccess);
        backward.expect_correct();
      }
    }
  }
}

// Clusters of the grid for that many rows. None of them runs.
template <class Problem>
std::int64_t clusters_for(Problem& problem, std::int64_t rows, const Device& device) {
  auto arguments = problem.arguments();
  arguments.rows = rows;
  simt::schedule().last_clusters = 0;
  EXPECT_EQ(problem.run(arguments, device), cudaSuccess);
  return simt::current_launch().grid / simt::current_launch().cluster;
}

// The rows that the last clusters take. So many that their rows are neighbours: where rows start anywhere, those of one
// cluster are a vector's length apart.
constexpr int kLastClusters = kRowSubsets;
struct LastRows {
  std::int64_t first, count, clusters;
};

// Of a matrix that goes on for a cluster after so many elements. `problem` has any number of its rows.
template <class Problem>
LastRows last_rows(Problem problem, std::int64_t elements, const Device& device) {
  const std::int64_t rows_before = elements / problem.arguments().cols;
  const std::int64_t clusters_before = clusters_for(problem, rows_before, device);
  const std::int64_t rows_per_cluster = (rows_before + clusters_before - 1) / clusters_before;
  const std::int64_t rows = rows_before + 1 + rows_per_cluster;
  const std::int64_t clusters = clusters_for(problem, rows, device);
  const std::int64_t first = (clusters - kLastClusters) * rows_per_cluster;
  return {first, rows - first, clusters};
}

TEST_P(FarOffsetsTest, LastRows) {
  constexpr Device kHugeDevice = device_of(90, 1 << 29);  // so that blocks are as many as rows in the backward pass too
  for (const std::int64_t elements : {std::int64_t{1} << 31, std::int64_t{1} << 32}) {
    for (const auto& [dtype, cols] : kCases) {
      for (const bool centered : {true, false}) {
        if (leaves_out_case()) continue;
        SCOPED_TRACE(::testing::Message() << name_of(dtype) << " " << cols << " columns, " << elements << " elements"
                                          << (centered ? ", centered" : ""));
        const auto forward_problem = [&](std::int64_t rows) {
          return NormForwardProblem(generator, {rows, cols}, {dtype, dtype, dtype, dtype}, {},
                                    forward_options(centered));
        };
        LastRows last = last_rows(forward_problem(1), elements, kHugeDevice);
        NormForwardProblem forward = forward_problem(last.count);
        forward.kept = KeepMask(forward.dropout, {last.count, cols}, last.first * cols);
        simt::schedule().last_clusters = kLastClusters;
        ASSERT_EQ(run(forward, {last.first, cols}, kHugeDevice), cudaSuccess);
        forward.expect_correct();

        const auto backward_problem = [&](std::int64_t rows) {
          return NormBackwardProblem(generator, {rows, cols}, {dtype, dtype, dtype, dtype}, {},
                                     backward_options(centered));
        };
        last = last_rows(backward_problem(1), elements, kHugeDevice);
        NormBackwardProblem backward = backward_problem(last.count);
        backward.kept = KeepMask(backward.dropout, {last.count, cols}, last.first * cols);
        Matrix workspace(kLastClusters, backward_column_sums(centered, false) * cols, backward.accumulation);
        simt::schedule().last_clusters = kLastClusters;
        ASSERT_EQ(run(backward, {last.first, cols}, workspace, last.clusters - kLastClusters, kHugeDevice),
                  cudaSuccess);
        backward.expect_correct();
      }
    }
  }
}

// The kernel that takes any row has no more blocks than a limit.
TEST_P(FarOffsetsTest, SeveralRowsABlock) {
  for (const bool centered : {true, false}) {
    NormForwardProblem problem(generator, {2, 5}, {kF64, kF64, kF64, kF64}, {},
                               {.centered = centered, .adds = true, .statistics = false});
    const std::int64_t blocks = clusters_for(problem, std::int64_t{1} << 30, kDevice);
    ASSERT_LT(blocks, std::int64_t{1} << 30);
    simt::schedule().last_clusters = 1;
    ASSERT_EQ(run(problem, {.first_row = blocks - 1, .row_stride = 5, .row_step = blocks}, kDevice), cudaSuccess);
    problem.expect_correct();
  }
}

}  // namespace
}  // namespace resnorm::cuda::testing
