// SPDX-License-Identifier: BSD-3-Clause
// The backward pass of norm_forward.cuh: with x the sum and g = grad_output * weight,
//
//   centered:  n = (x - mean) * rstd,  grad_residual = grad_sum + rstd * (g - mean of g - n * mean of g * n),
//   else:      n = x * rstd,           grad_residual = grad_sum + rstd * (g - n * mean of g * n),
//
// grad_input = dropout'(grad_residual), and the columns' sums grad_weight = sum of grad_output * n, where centered
// grad_bias = sum of grad_output, and grad_input_bias = sum of grad_input, as float32 partial sums, one row of them a
// block (a cluster); column_sums_finish adds those.
//
// Persistent blocks, cut into groups of threads that share a row. A thread owns the same columns of every row, so the
// columns' sums stay in registers. x and the gradients are read once, by asynchronous copies kBackwardStages rounds
// ahead. What is staged is private: a thread reads only what it copied itself, so no barrier orders it, and refills it
// as soon as its results are written. Bytes moved: rows * cols * (x, grad_output, grad_sum, grad_residual, grad_input,
// as far as present) + rows * (mean and rstd, as far as present) + the partial sums.
//
// Where rows do not start at multiples of a vector, those of one block are kVector rows apart: all of them start at the
// same element of a vector, so that a thread owns the same columns in each.
//
// Numerics, as on the CPU: a mean is corrected by delta = sum(x - mean) / N, taken along in the first sweep.
#pragma once

#include "column_sums.cuh"
#include "dropout.cuh"
#include "row_access.cuh"
#include "row_sum.cuh"

namespace resnorm::cuda {

// Strides in elements. What is absent is null; a column's sum that is not wanted is computed all the same.
struct NormBackwardArguments {
  const void *x, *grad_output, *grad_sum, *weight;
  const float *mean, *rstd;
  void *grad_input, *grad_residual;
  float* partials;  // [blocks or clusters][backward_column_sums][cols]
  const std::int64_t* seed;
  std::int64_t rows, x_stride, grad_output_stride, grad_sum_stride, grad_input_stride, grad_residual_stride;
  int cols, row_threads, stage_bytes, staged_bytes;  // of all threads: one stage, and all of them
  int first_element;                                 // of row 0, modulo kVector; of row r it is r * x_stride more
  bool float32_parameters;
  float reciprocal_cols;
  std::uint32_t threshold;
  float scale;
};

// A row's vectors on their way from memory to registers, through shared memory.
template <class T, int kVector, int kItems>
class StagedRow {
 public:
  static constexpr int kBytes = kItems * kVector * static_cast<int>(sizeof(T));  // a thread, a stage

  // `staged` is this operand's piece of shared memory in one stage, kBytes for each thread of the block. kShifted: the
  // vector may reach beyond the row; one that does is put together here and now.
  template <bool kShifted>
  static RESNORM_DEVICE void fetch(unsigned char* staged, const T* row, int column, int cols, int item) {
    if (kShifted && (column < 0 || column + kVector > cols)) {
      const auto vector = load_vector<T, kVector, true>(row, column, cols);
#pragma unroll
      for (int quad = 0; quad < kQuads; ++quad) {
        Words<16> words;
#pragma unroll
        for (int i = 0; i < 4; ++i) words.word[i] = vector.word[4 * quad + i];
        store_staged(at(staged, item, quad), words);
      }
      return;
    }
#pragma unroll
    for (int quad = 0; quad < kQuads; ++quad) {
      async_copy16(at(staged, item, quad), reinterpret_cast<const char*>(row + column) + 16 * quad);
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
    ElementWords<T>::template unpack<kVector>(words, values);
  }

 private:
  static constexpr int kQuads = kVector * static_cast<int>(sizeof(T)) / 16;

  // Threads side by side, so that a warp's accesses meet no bank twice.
  static RESNORM_DEVICE unsigned char* at(unsigned char* staged, int item, int quad) {
    return staged + ((item * kQuads + quad) * block_threads() + thread_index()) * 16;
  }
};

// kWarpRow: a row's threads are one warp; else `row_threads`, a multiple of 32, of each block of the cluster.
// Types: ElementTypes. kShifted: rows do not start and end at multiples of a vector; the blocks (clusters) are a
// multiple of kVector then.
template <class Types, int kVector, bool kWarpRow, int kItems, bool kCluster, bool kShifted, bool kCentered, bool kAdds,
          bool kDrops, bool kInputBias>
RESNORM_KERNEL(kShifted ? kShiftedBackwardThreads : kBackwardThreads, 1)
norm_backward(const NormBackwardArguments a) {
  using Gradient = typename Types::Branch;
  using Residual = typename Types::Residual;
  using Sum = typename Types::Sum;
  using StagedX = StagedRow<Sum, kVector, kItems>;
  using StagedGradient = StagedRow<Gradient, kVector, kItems>;
  constexpr int kSums = backward_column_sums(kCentered, kInputBias), kRowSums = backward_row_sums(kCentered);
  const int row_threads = kWarpRow ? 32 : kCluster ? block_threads() : a.row_threads;
  const int groups = kCluster ? 1 : block_threads() / row_threads;
  const int group_index = kCluster ? 0 : thread_index() / row_threads, blocks = kCluster ? cluster_blocks() : 1;
  const int rank = kCluster ? cluster_rank() : 0;
  const RowGroup<kWarpRow ? 32 : 0, kCluster> group{kCluster ? thread_index() : thread_index() % row_threads,
                                                    row_threads, group_index + 1};
  const int row_subsets = grid_blocks() / blocks, subset = block_index() / blocks;
  constexpr int kApart = kShifted ? kVector : 1;  // the distance between the rows of neighbouring groups
  const std::int64_t subset_row = static_cast<std::int64_t>(subset / kApart) * kApart * groups + subset % kApart;
  const std::int64_t row_step = static_cast<std::int64_t>(row_subsets) * groups;
  const int step = row_threads * kVector;
  const int shift = kShifted ? static_cast<int>((a.first_element + subset_row * a.x_stride) % kVector) : 0;
  const int first_column = rank * kItems * step - shift;
  const bool has_grad_sum = kAdds && a.grad_sum != nullptr;

  const auto staged_x = [&](int stage) { return shared_memory() + stage * a.stage_bytes; };
  const auto staged_gradient = [&](int stage) { return staged_x(stage) + StagedX::kBytes * block_threads(); };
  const auto staged_grad_sum = [&](int stage) {
    return staged_gradient(stage) + StagedGradient::kBytes * block_threads();
  };
  const int slot_size = decltype(group)::slot_size(row_threads, blocks, kRowSums);
  float* const slots = reinterpret_cast<float*>(shared_memory() + a.staged_bytes) + group_index * 2 * slot_size;

  const auto column_of = [&](int i) { return first_column + i * step + group.thread * kVector; };
  const auto fetch = [&](std::int64_t row, int stage, int i) {
    const int column = column_of(i);
    if (row >= a.rows || column >= a.cols) return;
    const auto* x = static_cast<const Sum*>(a.x) + row * a.x_stride;
    StagedX::template fetch<kShifted>(staged_x(stage), x, column, a.cols, i);
    const auto* gradient = static_cast<const Gradient*>(a.grad_output) + row * a.grad_output_stride;
    StagedGradient::template fetch<kShifted>(staged_gradient(stage), gradient, column, a.cols, i);
    if (!has_grad_sum) return;
    const auto* grad_sum = static_cast<const Sum*>(a.grad_sum) + row * a.grad_sum_stride;
    StagedX::template fetch<kShifted>(staged_grad_sum(stage), grad_sum, column, a.cols, i);
  };

  if constexpr (kCluster) cluster_arrive();  // nobody may write into a block that has not started
#pragma unroll
  for (int stage = 0; stage < kBackwardStages; ++stage) {
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      fetch(subset_row + group_index * kApart + stage * row_step, stage, i);
    }
    async_commit();
  }
  const auto seed = kDrops ? static_cast<std::uint64_t>(*a.seed) : 0;
  if constexpr (kCluster) cluster_wait();

  float sums[kSums][kItems][kVector] = {};
  int stage = 0;  // the slots of row sums are taken in turns as the stages are
  static_assert(kBackwardStages == 2);
  // The same number of rounds for all groups, also for one that has no row in the last: on sm_100 a loop over a group's
  // own rows spills.
  for (std::int64_t first_row = subset_row; first_row < a.rows; first_row += row_step) {
    const std::int64_t row = first_row + group_index * kApart;
    const bool live = row < a.rows;
    const float mean = kCentered && live ? a.mean[row] : 0.0F, rstd = live ? a.rstd[row] : 0.0F;
    const auto read = [&](int i, float (&x)[kVector], float (&gradient)[kVector], float (&weighted)[kVector]) {
      StagedX::read(staged_x(stage), i, x);
      StagedGradient::read(staged_gradient(stage), i, gradient);
      float weight[kVector];
      if (a.weight != nullptr) {  // from L1 each time: in registers, beside the sums, it would spill
        load_parameter<Gradient, kVector, kShifted>(a.weight, a.float32_parameters, column_of(i), a.cols, weight);
      }
#pragma unroll
      for (int k = 0; k < kVector; ++k) {
        x[k] -= mean;
        weighted[k] = a.weight != nullptr ? gradient[k] * weight[k] : gradient[k];
      }
    };

    async_wait<kBackwardStages - 1>();
    float totals[kRowSums] = {};  // of g * (x - mean), g, x - mean; the first alone where the mean is 0
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      if (!live || column_of(i) >= a.cols) continue;
      float x[kVector], gradient[kVector], weighted[kVector];
      read(i, x, gradient, weighted);
#pragma unroll
      for (int k = 0; k < kVector; ++k) {
        totals[0] += weighted[k] * x[k];
        if constexpr (kCentered) {
          totals[1] += weighted[k];
          const auto column = static_cast<unsigned>(column_of(i) + k);  // a column before the row is a huge one
          totals[2] += kShifted && column >= static_cast<unsigned>(a.cols) ? 0.0F : x[k];  // there alone all count
        }
      }
    }
    group.sum(totals, slots + stage * slot_size);
    float delta = 0.0F, mean_g = 0.0F;
    if constexpr (kCentered) {
      delta = totals[2] * a.reciprocal_cols, mean_g = totals[1] * a.reciprocal_cols;
      totals[0] -= delta * totals[1];
    }
    const float mean_gn = totals[0] * rstd * a.reciprocal_cols;

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
          if constexpr (kCentered) {
            sums[1][i][k] += gradient[k];
            result[k] += (weighted[k] - mean_g - normalized * mean_gn) * rstd;
          } else {  // grouped so, nothing spills on sm_100
            result[k] += weighted[k] * rstd - normalized * (mean_gn * rstd);
          }
        }
        if (kAdds && a.grad_residual != nullptr) {
          auto* to = static_cast<Residual*>(a.grad_residual) + row * a.grad_residual_stride;
          store_vector<Residual, kVector, kShifted>(to, column, a.cols, result);
        }
        if constexpr (kDrops) apply_dropout<!kShifted>(result, row * a.cols + column, seed, a.threshold, a.scale);
        if (a.grad_input != nullptr) {
          auto* to = static_cast<Gradient*>(a.grad_input) + row * a.grad_input_stride;
          store_vector<Gradient, kVector, kShifted>(to, column, a.cols, result);
        }
        if constexpr (kInputBias) {
#pragma unroll
          for (int k = 0; k < kVector; ++k) sums[kSums - 1][i][k] += result[k];
        }
      }
      fetch(row + kBackwardStages * row_step, stage, i);
    }
    async_commit();
    stage = stage + 1 == kBackwardStages ? 0 : stage + 1;
  }
  async_wait<0>();

  float* const partials = a.partials + static_cast<std::int64_t>(subset) * kSums * a.cols;
  float* const exchange = reinterpret_cast<float*>(shared_memory());  // where rows were staged
#pragma unroll
  for (int sum = 0; sum < kSums; ++sum) {
    store_column_sums<kVector, kItems>(sums[sum], exchange, row_threads, first_column, a.cols,
                                       partials + static_cast<std::int64_t>(sum) * a.cols);
  }
}

}  // namespace resnorm::cuda
