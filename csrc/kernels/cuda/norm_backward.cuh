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
// as soon as it is not read again. Mean, rstd and weights are asked for before the wait for a row. Bytes moved: rows *
// cols * (x, grad_output, grad_sum, grad_residual, grad_input, as far as present) + rows * (mean and rstd, as far as
// present) + the partial sums.
//
// Where rows do not start at multiples of a vector, those of one block are kVector rows apart: all of them start at the
// same element of a vector, so that a thread owns the same columns in each.
//
// Numerics, as on the CPU: a mean is corrected by delta = sum(x - mean) / N, taken along in the first sweep.
#pragma once

#include "column_sums.cuh"
#include "dropout.cuh"
#include "pairs.cuh"
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

  // `staged` is this operand's piece of shared memory in one stage, kBytes for each thread of the block; `from` points
  // at `column`. kShifted: the vector may reach beyond the row; one that does is put together here and now.
  template <bool kShifted>
  static RESNORM_DEVICE void fetch(unsigned char* staged, const T* from, int column, int cols, int item) {
    if (kShifted && (column < 0 || column + kVector > cols)) {
      const auto vector = load_vector<T, kVector, true>(from, column, cols);
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
      async_copy16(at(staged, item, quad), reinterpret_cast<const char*>(from) + 16 * quad);
    }
  }

  static RESNORM_DEVICE Words<kVector * sizeof(T)> read(unsigned char* staged, int item) {
    Words<kVector * sizeof(T)> words;
#pragma unroll
    for (int quad = 0; quad < kQuads; ++quad) {
      const auto loaded = load_staged<Words<16>>(at(staged, item, quad));
#pragma unroll
      for (int i = 0; i < 4; ++i) words.word[4 * quad + i] = loaded.word[i];
    }
    return words;
  }

  static RESNORM_DEVICE void unpack(const Words<kVector * sizeof(T)>& words, float (&values)[kVector]) {
    ElementWords<T>::template unpack<kVector>(words, values);
  }

 private:
  static constexpr int kQuads = kVector * static_cast<int>(sizeof(T)) / 16;

  // Threads side by side, so that a warp's accesses meet no bank twice.
  static RESNORM_DEVICE unsigned char* at(unsigned char* staged, int item, int quad) {
    return staged + ((item * kQuads + quad) * block_threads() + thread_index()) * 16;
  }
};

// Where a thread's columns of a matrix begin, row after row. kMoves: the address moves on, which takes registers; else
// it is computed from the row. As a number, because the matrix may be absent.
template <class T, bool kMoves>
class RowPointer {
 public:
  RESNORM_DEVICE RowPointer(T* matrix, std::int64_t stride, std::int64_t row, int column)
      : address_(reinterpret_cast<std::uintptr_t>(matrix)) {
    if constexpr (kMoves) move(row * stride + column);
  }
  RESNORM_DEVICE T* at(std::int64_t stride, std::int64_t row, int column) const {
    auto* const matrix = reinterpret_cast<T*>(address_);
    return kMoves ? matrix : matrix + row * stride + column;
  }
  RESNORM_DEVICE void move(std::int64_t elements) {
    if constexpr (kMoves) address_ += static_cast<std::uintptr_t>(elements) * sizeof(T);
  }

 private:
  std::uintptr_t address_;
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
  // What the first sweep over a row has read is kept for the second where that does not spill: all, or x and the
  // weighted gradient.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1200
  constexpr bool kFits = false;
#else
  constexpr bool kFits = sizeof(Gradient) == 2;
#endif
  constexpr bool kKeeps = !kAdds, kKeepsGradient = kKeeps && kFits;
  constexpr int kSums = backward_column_sums(kCentered, kInputBias), kRowSums = backward_row_sums(kCentered);
  const int row_threads = kWarpRow ? 32 : kCluster ? block_threads() : a.row_threads;
  const int groups = kCluster ? 1 : block_threads() / row_threads;
  const int group_index = kCluster ? 0 : thread_index() / row_threads, blocks = kCluster ? cluster_blocks() : 1;
  const int rank = kCluster ? cluster_rank() : 0;
  const RowGroup<kWarpRow ? 32 : 0, kCluster> group{kCluster ? thread_index() : thread_index() % row_threads,
                                                    row_threads, group_index + 1};
  const int row_subsets = grid_blocks() / blocks, subset = kCluster ? cluster_index() : block_index();
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
  // Behind the stages in a cluster two barriers, then the slots, two a group.
  const int slot_size = decltype(group)::slot_size(row_threads, blocks, kRowSums);
  auto* const barriers = reinterpret_cast<TransactionBarrier*>(shared_memory() + a.staged_bytes);
  float* const slots = reinterpret_cast<float*>(shared_memory() + a.staged_bytes + backward_barrier_bytes(kCluster)) +
                       group_index * 2 * slot_size;
  if constexpr (kCluster) {
    if (thread_index() == 0) {
      init_barrier(barriers);
      init_barrier(barriers + 1);
    }
    cluster_arrive();
  }

  const int thread_column = first_column + group.thread * kVector;
  const auto column_of = [&](int i) { return thread_column + i * step; };
  const auto is_inside = [&](int i) { return column_of(i) < a.cols; };

  std::int64_t row = subset_row + group_index * kApart;
  constexpr bool kMoves = !kDrops && !kInputBias;  // with those there are no registers left
  const auto pointer_to = [&]<class T>(T* matrix, std::int64_t stride) {
    return RowPointer<T, kMoves>(matrix, stride, row, thread_column);
  };
  auto x_rows = pointer_to(static_cast<const Sum*>(a.x), a.x_stride);
  auto gradient_rows = pointer_to(static_cast<const Gradient*>(a.grad_output), a.grad_output_stride);
  auto grad_sum_rows = pointer_to(static_cast<const Sum*>(a.grad_sum), a.grad_sum_stride);
  auto grad_input_rows = pointer_to(static_cast<Gradient*>(a.grad_input), a.grad_input_stride);
  auto grad_residual_rows = pointer_to(static_cast<Residual*>(a.grad_residual), a.grad_residual_stride);
  const auto fetch = [&](std::int64_t from_row, int stage) {
    const auto* x = x_rows.at(a.x_stride, from_row, thread_column);
    const auto* gradient = gradient_rows.at(a.grad_output_stride, from_row, thread_column);
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      if (from_row >= a.rows || !is_inside(i)) continue;
      StagedX::template fetch<kShifted>(staged_x(stage), x + i * step, column_of(i), a.cols, i);
      StagedGradient::template fetch<kShifted>(staged_gradient(stage), gradient + i * step, column_of(i), a.cols, i);
    }
    x_rows.move(row_step * a.x_stride);
    gradient_rows.move(row_step * a.grad_output_stride);
  };
  const auto fetch_grad_sum = [&](std::int64_t from_row, int stage) {
    if (!has_grad_sum) return;
    const auto* grad_sum = grad_sum_rows.at(a.grad_sum_stride, from_row, thread_column);
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      if (from_row >= a.rows || !is_inside(i)) continue;
      StagedX::template fetch<kShifted>(staged_grad_sum(stage), grad_sum + i * step, column_of(i), a.cols, i);
    }
    grad_sum_rows.move(row_step * a.grad_sum_stride);
  };
#pragma unroll
  for (int stage = 0; stage < kBackwardStages; ++stage) {
    fetch(row + stage * row_step, stage);
    fetch_grad_sum(row + stage * row_step, stage);
    async_commit();
  }
  constexpr bool kReloadsSeed = kDrops && kInputBias && sizeof(Gradient) == 2;  // it would spill
  std::uint64_t seed = kDrops && !kReloadsSeed ? static_cast<std::uint64_t>(*a.seed) : 0;
  if constexpr (kCluster) cluster_wait();

  float sums[kSums][kItems][kVector] = {};
  int stage = 0, parity = 0;  // the slots of row sums are taken in turns as the stages are
  static_assert(kBackwardStages == 2);
  float next_mean = 0.0F, next_rstd = 0.0F;
  const auto fetch_statistics = [&](std::int64_t of_row) {
    const bool live = of_row < a.rows;
    if (kCentered && live) next_mean = a.mean[of_row];
    if (live) next_rstd = a.rstd[of_row];
  };
  if constexpr (kMoves) fetch_statistics(row);
  // The same number of rounds for all groups, also for one that has no row in the last: on sm_100 a loop over a group's
  // own rows spills.
  for (std::int64_t first_row = subset_row; first_row < a.rows; first_row += row_step, row += row_step) {
    const bool live = row < a.rows;
    const std::int64_t later_row = row + kBackwardStages * row_step;  // whose data take the places of this one's
    if constexpr (!kMoves) fetch_statistics(row);
    const float mean = kCentered ? next_mean : 0.0F, rstd = next_rstd;
    if constexpr (kMoves) fetch_statistics(row + row_step);  // a round ahead: so they have come when they are needed
    Words<kVector * sizeof(Gradient)> weight_words[kKeeps ? kItems : 1];  // anew each time: kept, they would spill
    const bool has_weight_words = kKeeps && !kShifted && a.weight != nullptr && !a.float32_parameters;
    if (has_weight_words) {
#pragma unroll
      for (int i = 0; i < kItems; ++i) {
        if (!is_inside(i)) continue;
        const auto* weight = static_cast<const Gradient*>(a.weight) + column_of(i);
        weight_words[kKeeps ? i : 0] = load_kept<Words<kVector * sizeof(Gradient)>>(weight);
      }
    }
    const auto read = [&](int i, float (&x)[kVector], float (&weighted)[kVector]) {
      StagedX::unpack(StagedX::read(staged_x(stage), i), x);
#pragma unroll
      for (int k = 0; k < kVector; k += 2) put_pair(x, k, pair_at(x, k) + both(-mean));
      const auto words = StagedGradient::read(staged_gradient(stage), i);
      StagedGradient::unpack(words, weighted);
      float weight[kVector];
      if (has_weight_words) {
        StagedGradient::unpack(weight_words[kKeeps ? i : 0], weight);
      } else if (a.weight != nullptr) {
        load_parameter<Gradient, kVector, kShifted, false>(a.weight, a.float32_parameters, column_of(i), a.cols,
                                                           weight);
      }
      if (a.weight != nullptr) {
#pragma unroll
        for (int k = 0; k < kVector; k += 2) put_pair(weighted, k, pair_at(weighted, k) * pair_at(weight, k));
      }
      return words;
    };

    async_wait<kBackwardStages - 1>();
    float kept_x[kKeeps ? kItems : 1][kVector], kept_weighted[kKeeps ? kItems : 1][kVector];
    Words<kVector * sizeof(Gradient)> gradient_words[kKeepsGradient ? kItems : 1];
    PairSum row_sums[kRowSums];  // of g * (x - mean), g, x - mean; the first alone where the mean is 0
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      if (!live || !is_inside(i)) continue;
      auto& x = kept_x[kKeeps ? i : 0];
      auto& weighted = kept_weighted[kKeeps ? i : 0];
      gradient_words[kKeepsGradient ? i : 0] = read(i, x, weighted);
#pragma unroll
      for (int k = 0; k < kVector; k += 2) {
        Pair deviation = pair_at(x, k);
        const Pair g = pair_at(weighted, k);
        row_sums[0].add_product(g, deviation);
        if constexpr (kCentered) {
          row_sums[1].add(g);
          if constexpr (kShifted) {  // only there a vector has elements that do not count
            const auto column = static_cast<unsigned>(column_of(i) + k);  // a column before the row is a huge one
            if (column >= static_cast<unsigned>(a.cols)) deviation.lower = 0.0F;
            if (column + 1 >= static_cast<unsigned>(a.cols)) deviation.upper = 0.0F;
          }
          row_sums[2].add(deviation);
        }
      }
    }
    float totals[kRowSums];
#pragma unroll
    for (int sum = 0; sum < kRowSums; ++sum) totals[sum] = row_sums[sum].total();
    if constexpr (kKeepsGradient) fetch(later_row, stage);
    group.sum(totals, SumSlot<float>{slots + stage * slot_size, barriers + stage, parity});
    float delta = 0.0F, mean_g = 0.0F;
    if constexpr (kCentered) {
      delta = totals[2] * a.reciprocal_cols, mean_g = totals[1] * a.reciprocal_cols;
      totals[0] -= delta * totals[1];
    }
    const float slope = -totals[0] * rstd * a.reciprocal_cols * rstd;  // -(mean of g * n) * rstd
    const float offset = -delta * rstd, constant = -mean_g * rstd;

#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      if (!live || !is_inside(i)) continue;
      const int column = column_of(i);
      auto& x = kept_x[kKeeps ? i : 0];
      auto& weighted = kept_weighted[kKeeps ? i : 0];
      if constexpr (!kKeeps) read(i, x, weighted);
      float gradient[kVector], result[kVector];
      StagedGradient::unpack(
          kKeepsGradient ? gradient_words[kKeepsGradient ? i : 0] : StagedGradient::read(staged_gradient(stage), i),
          gradient);
      if (has_grad_sum) {
        StagedX::unpack(StagedX::read(staged_grad_sum(stage), i), result);
      } else {
#pragma unroll
        for (int k = 0; k < kVector; ++k) result[k] = 0.0F;
      }
#pragma unroll
      for (int k = 0; k < kVector; k += 2) {
        const Pair output_gradient = pair_at(gradient, k), rstds = both(rstd), slopes = both(slope);
        Pair normalized = pair_at(x, k), change;
        if constexpr (kCentered) {
          normalized = multiply_add(normalized, rstds, both(offset));
          change = multiply_add(normalized, slopes, both(constant));
          put_pair(sums[1][i], k, pair_at(sums[1][i], k) + output_gradient);
        } else {
          normalized = normalized * rstds;
          change = normalized * slopes;
        }
        put_pair(sums[0][i], k, multiply_add(output_gradient, normalized, pair_at(sums[0][i], k)));
        put_pair(result, k, pair_at(result, k) + multiply_add(pair_at(weighted, k), rstds, change));
      }
      if (kAdds && a.grad_residual != nullptr) {
        auto* to = grad_residual_rows.at(a.grad_residual_stride, row, thread_column) + i * step;
        store_vector<Residual, kVector, kShifted>(to, column, a.cols, result);
      }
      if constexpr (kReloadsSeed) seed = static_cast<std::uint64_t>(*static_cast<const volatile std::int64_t*>(a.seed));
      if constexpr (kDrops) apply_dropout<!kShifted>(result, row * a.cols + column, seed, a.threshold, a.scale);
      if (a.grad_input != nullptr) {
        auto* to = grad_input_rows.at(a.grad_input_stride, row, thread_column) + i * step;
        store_vector<Gradient, kVector, kShifted>(to, column, a.cols, result);
      }
      if constexpr (kInputBias) {
#pragma unroll
        for (int k = 0; k < kVector; k += 2) {
          put_pair(sums[kSums - 1][i], k, pair_at(sums[kSums - 1][i], k) + pair_at(result, k));
        }
      }
    }
    grad_input_rows.move(row_step * a.grad_input_stride);
    grad_residual_rows.move(row_step * a.grad_residual_stride);
    if constexpr (!kKeepsGradient) fetch(later_row, stage);
    fetch_grad_sum(later_row, stage);
    async_commit();
    stage = 1 - stage;
    if (stage == 0) parity = 1 - parity;
  }
  async_wait<0>();
  begin_next_kernel();

  float* const partials = a.partials + static_cast<std::int64_t>(subset) * kSums * a.cols;
  float* const exchange = reinterpret_cast<float*>(shared_memory());  // where rows were staged
#pragma unroll
  for (int sum = 0; sum < kSums; ++sum) {
    store_column_sums<kVector, kItems>(sums[sum], exchange, row_threads, first_column, a.cols,
                                       partials + static_cast<std::int64_t>(sum) * a.cols);
  }
}

}  // namespace resnorm::cuda
