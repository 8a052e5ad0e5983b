// SPDX-License-Identifier: BSD-3-Clause
// The backward pass of norm_forward.cuh: with x the sum (layer_norm's input), n = (x - mean) * rstd and g the weighted
// gradient of the output,
//
//   grad_residual = grad_sum + rstd * (g - mean of g - n * mean of g * n),  grad_input = dropout'(grad_residual),
//
// and the columns' sums grad_weight = sum of grad_output * n, grad_bias = sum of grad_output, grad_input_bias = sum of
// grad_input, as float32 partial sums, one row of them a block (a cluster); norm_backward_finish adds those.
//
// Persistent blocks, cut into groups of threads that share a row. A thread owns the same columns of every row, so the
// columns' sums stay in registers. x and the gradients are read once, by asynchronous copies kBackwardStages rounds
// ahead. What is staged is private: a thread reads only what it copied itself, so no barrier orders it, and refills it
// as soon as its results are written. Bytes moved: rows * cols * (x, grad_output, grad_sum, grad_residual, grad_input,
// as far as present) + 8 * rows + the partial sums.
//
// Numerics, as on the CPU: the mean is corrected by delta = sum(x - mean) / N, taken along in the first sweep.
#pragma once

#include "dropout.cuh"
#include "plan.h"
#include "row_access.cuh"
#include "row_sum.cuh"

namespace resnorm::cuda {

// Strides in elements. What is absent is null; a column's sum that is not wanted is computed all the same.
struct NormBackwardArguments {
  const void *x, *grad_output, *grad_sum, *weight;
  const float *mean, *rstd;
  void *grad_input, *grad_residual;
  float* partials;  // [blocks or clusters][2, or 3 with grad_input_bias][cols]
  const std::int64_t* seed;
  std::int64_t rows, x_stride, grad_output_stride, grad_sum_stride, grad_input_stride, grad_residual_stride;
  int cols, row_threads, stage_bytes, staged_bytes;  // of all threads: one stage, and all of them
  bool float32_parameters;
  float reciprocal_cols;
  std::uint32_t threshold;
  float scale;
};

template <class Gradient_, class Residual_, class Sum_>
struct BackwardTypes {
  using Gradient = Gradient_;  // grad_output's and grad_input's
  using Residual = Residual_;
  using Sum = Sum_;
};

// A row's vectors on their way from memory to registers, through shared memory.
template <class T, int kVector, int kItems>
class StagedRow {
 public:
  static constexpr int kBytes = kItems * kVector * static_cast<int>(sizeof(T));  // a thread, a stage

  // `staged` is this stream's part of shared memory in one stage, kBytes for each thread of the block.
  static RESNORM_DEVICE void fetch(unsigned char* staged, const T* from, int item) {
#pragma unroll
    for (int quad = 0; quad < kQuads; ++quad) {
      async_copy16(at(staged, item, quad), reinterpret_cast<const char*>(from) + 16 * quad);
    }
  }

  static RESNORM_DEVICE void read(unsigned char* staged, int item, float (&values)[kVector]) {
    Words<kVector * sizeof(T)> words;
#pragma unroll
    for (int quad = 0; quad < kQuads; ++quad) {
      const auto loaded = load_staged<Words<16>>(at(staged, item, quad));
#pragma unroll
      for (int i = 0; i < 4; ++i) words.word[4 * quad + i] = loaded.word[i];
    }
    Codec<T>::template unpack<kVector>(words, values);
  }

 private:
  static constexpr int kQuads = kVector * static_cast<int>(sizeof(T)) / 16;

  // Threads side by side, so that a warp's accesses meet no bank twice.
  static RESNORM_DEVICE unsigned char* at(unsigned char* staged, int item, int quad) {
    return staged + ((item * kQuads + quad) * block_threads() + thread_index()) * 16;
  }
};

// kWarpRow: a row's threads are one warp; else `row_threads`, a multiple of 32, of each block of the cluster.
// Rows start and end at multiples of a vector.
template <class Types, int kVector, bool kWarpRow, int kItems, bool kCluster, bool kAdds, bool kDrops, bool kInputBias>
RESNORM_KERNEL(kBackwardThreads, 1)
norm_backward(const NormBackwardArguments a) {
  using Gradient = typename Types::Gradient;
  using Residual = typename Types::Residual;
  using Sum = typename Types::Sum;
  using StagedX = StagedRow<Sum, kVector, kItems>;
  using StagedGradient = StagedRow<Gradient, kVector, kItems>;
  constexpr int kSums = kInputBias ? 3 : 2;
  const int row_threads = kWarpRow ? 32 : kCluster ? block_threads() : a.row_threads;
  const int groups = kCluster ? 1 : block_threads() / row_threads;
  const int group_index = kCluster ? 0 : thread_index() / row_threads, blocks = kCluster ? cluster_blocks() : 1;
  const int rank = kCluster ? cluster_rank() : 0;
  const RowGroup<kWarpRow ? 32 : 0, kCluster> group{kCluster ? thread_index() : thread_index() % row_threads,
                                                    row_threads, group_index + 1};
  const int tiles = grid_blocks() / blocks, tile = block_index() / blocks;
  const std::int64_t row_step = static_cast<std::int64_t>(tiles) * groups;
  const int step = row_threads * kVector;
  const bool has_grad_sum = kAdds && a.grad_sum != nullptr;

  const auto staged_x = [&](int stage) { return shared_memory() + stage * a.stage_bytes; };
  const auto staged_gradient = [&](int stage) { return staged_x(stage) + StagedX::kBytes * block_threads(); };
  const auto staged_grad_sum = [&](int stage) {
    return staged_gradient(stage) + StagedGradient::kBytes * block_threads();
  };
  const int slot_size = decltype(group)::slot_size(row_threads, blocks, 3);
  float* const slots = reinterpret_cast<float*>(shared_memory() + a.staged_bytes) + group_index * 2 * slot_size;

  const auto column_of = [&](int i) { return (rank * kItems + i) * step + group.thread * kVector; };
  const auto fetch = [&](std::int64_t row, int stage, int i) {
    const int column = column_of(i);
    if (row >= a.rows || column >= a.cols) return;
    StagedX::fetch(staged_x(stage), static_cast<const Sum*>(a.x) + row * a.x_stride + column, i);
    StagedGradient::fetch(staged_gradient(stage),
                          static_cast<const Gradient*>(a.grad_output) + row * a.grad_output_stride + column, i);
    if (!has_grad_sum) return;
    StagedX::fetch(staged_grad_sum(stage), static_cast<const Sum*>(a.grad_sum) + row * a.grad_sum_stride + column, i);
  };

  if constexpr (kCluster) cluster_arrive();  // nobody may write into a block that has not started
#pragma unroll
  for (int stage = 0; stage < kBackwardStages; ++stage) {
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      fetch(static_cast<std::int64_t>(tile) * groups + group_index + stage * row_step, stage, i);
    }
    async_commit();
  }
  const auto seed = kDrops ? static_cast<std::uint64_t>(*a.seed) : 0;
  if constexpr (kCluster) cluster_wait();

  float sums[kSums][kItems][kVector] = {};
  int stage = 0;  // the slots of row sums are taken in turns as the stages are
  static_assert(kBackwardStages == 2);
  // The same number of rounds for all threads, because row sums and clusters meet in each.
  for (std::int64_t first_row = static_cast<std::int64_t>(tile) * groups; first_row < a.rows; first_row += row_step) {
    const std::int64_t row = first_row + group_index;
    const bool live = row < a.rows;
    const float mean = live ? a.mean[row] : 0.0F, rstd = live ? a.rstd[row] : 0.0F;
    const auto read = [&](int i, float (&x)[kVector], float (&gradient)[kVector], float (&weighted)[kVector]) {
      StagedX::read(staged_x(stage), i, x);
      StagedGradient::read(staged_gradient(stage), i, gradient);
      float weight[kVector];
      if (a.weight != nullptr) {  // from L1 each time: in registers, beside the sums, it would spill
        load_parameter<Gradient, kVector, false>(a.weight, a.float32_parameters, column_of(i), a.cols, weight);
      }
#pragma unroll
      for (int k = 0; k < kVector; ++k) {
        x[k] -= mean;
        weighted[k] = a.weight != nullptr ? gradient[k] * weight[k] : gradient[k];
      }
    };

    async_wait<kBackwardStages - 1>();
    float totals[3] = {0.0F, 0.0F, 0.0F};  // of g, g * (x - mean), x - mean
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      if (!live || column_of(i) >= a.cols) continue;
      float x[kVector], gradient[kVector], weighted[kVector];
      read(i, x, gradient, weighted);
#pragma unroll
      for (int k = 0; k < kVector; ++k) {
        totals[0] += weighted[k];
        totals[1] += weighted[k] * x[k];
        totals[2] += x[k];
      }
    }
    group.sum(totals, slots + stage * slot_size);
    const float delta = totals[2] * a.reciprocal_cols, mean_g = totals[0] * a.reciprocal_cols;
    const float mean_gn = (totals[1] - delta * totals[0]) * rstd * a.reciprocal_cols;

#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      const int column = column_of(i);
      if (live && column < a.cols) {
        float x[kVector], gradient[kVector], weighted[kVector], result[kVector];
        read(i, x, gradient, weighted);
        if (has_grad_sum) {
          StagedX::read(staged_grad_sum(stage), i, result);
        } else {
#pragma unroll
          for (int k = 0; k < kVector; ++k) result[k] = 0.0F;
        }
#pragma unroll
        for (int k = 0; k < kVector; ++k) {
          const float normalized = (x[k] - delta) * rstd;
          sums[0][i][k] += gradient[k] * normalized;
          sums[1][i][k] += gradient[k];
          result[k] += (weighted[k] - mean_g - normalized * mean_gn) * rstd;
        }
        if (kAdds && a.grad_residual != nullptr) {
          auto* to = static_cast<Residual*>(a.grad_residual) + row * a.grad_residual_stride;
          store_vector<Residual, kVector, false>(to, column, a.cols, result);
        }
        if constexpr (kDrops) apply_dropout<kVector>(result, row * a.cols + column, seed, a.threshold, a.scale);
        if (a.grad_input != nullptr) {
          auto* to = static_cast<Gradient*>(a.grad_input) + row * a.grad_input_stride;
          store_vector<Gradient, kVector, false>(to, column, a.cols, result);
        }
        if constexpr (kInputBias) {
#pragma unroll
          for (int k = 0; k < kVector; ++k) sums[2][i][k] += result[k];
        }
      }
      fetch(row + kBackwardStages * row_step, stage, i);
    }
    async_commit();
    stage = stage + 1 == kBackwardStages ? 0 : stage + 1;
  }
  async_wait<0>();

  // The groups of a block meet where rows were staged, and are added in their order.
  float* const partials = a.partials + static_cast<std::int64_t>(tile) * kSums * a.cols;
  float* const meeting = reinterpret_cast<float*>(shared_memory());
  const int group_values = row_threads * kItems * kVector;
#pragma unroll
  for (int sum = 0; sum < kSums; ++sum) {
    barrier(0, block_threads());  // nobody needs any more what lies there
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
#pragma unroll
      for (int k = 0; k < kVector; ++k) {
        meeting[group_index * group_values + (i * kVector + k) * row_threads + group.thread] = sums[sum][i][k];
      }
    }
    barrier(0, block_threads());
    for (int value = thread_index(); value < group_values; value += block_threads()) {
      float total = 0.0F;
      for (int other = 0; other < groups; ++other) total += meeting[other * group_values + value];
      const int item = value / row_threads / kVector, k = value / row_threads % kVector;
      const int column = (rank * kItems + item) * step + value % row_threads * kVector + k;
      if (column < a.cols) partials[static_cast<std::int64_t>(sum) * a.cols + column] = total;
    }
  }
}

}  // namespace resnorm::cuda
