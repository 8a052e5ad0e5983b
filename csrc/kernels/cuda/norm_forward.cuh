// SPDX-License-Identifier: BSD-3-Clause
// output = norm(x) * weight, + bias where centered, of x = residual + dropout(input + input_bias), or of x = input: one
// read and one write of every element.
//
//   centered:  norm(x) = (x - mean) * rstd,  rstd = 1 / sqrt(variance + eps);  two sums over a row after another.
//   else:      norm(x) = x * rstd,           rstd = 1 / sqrt(mean of x^2 + eps);  one.
//
// A row lives in registers as float32, loaded whole before anything is computed, because loads in flight are what keeps
// the memory busy. kLanes threads of a warp share a row; kLanes == 0: a block, or with kCluster a cluster of blocks.
// Each thread owns kItems vectors of kVector elements, so threads * kVector * kItems * blocks of the cluster >= cols.
// Bytes moved: rows * (cols * (input, output, residual, the sum if stored) + mean and rstd if stored); the parameters
// stay in L1.
//
// Numerics, as on the CPU: with d = x - mean and delta = sum(d) / N, which is what rounding left in the mean,
// variance = sum(d^2) / N - delta^2 and norm(x) = (d - delta) * rstd.
#pragma once

#include "dropout.cuh"
#include "pairs.cuh"
#include "plan.h"
#include "row_access.cuh"
#include "row_sum.cuh"

namespace resnorm::cuda {

// Strides in elements. What is absent is null.
struct NormForwardArguments {
  const void *input, *residual, *input_bias, *weight, *bias;
  void *output, *sum;
  float *mean, *rstd;
  const std::int64_t* seed;  // on the device, so that a captured graph draws anew with each replay
  std::int64_t rows, input_stride, residual_stride, output_stride, sum_stride;
  int cols;
  bool float32_parameters;  // beside a half-precision input
  int first_element;        // of row 0, modulo kVector; of row r it is r * input_stride more
  float reciprocal_cols, eps;
  std::uint32_t threshold;
  float scale;
};

// As plan.h counts them: of an element of the residual or the sum, whichever is wider; 0 where there is none.
template <class Types, bool kAdds>
inline constexpr int kForwardResidualBytes = !kAdds ? 0
                                             : sizeof(typename Types::Residual) > sizeof(typename Types::Sum)
                                                 ? sizeof(typename Types::Residual)
                                                 : sizeof(typename Types::Sum);

// Types: ElementTypes.
template <class Types, int kVector, int kLanes, int kItems, bool kCluster, bool kShifted, bool kCentered, bool kAdds,
          bool kDrops, int kMaxThreads>
RESNORM_KERNEL(kMaxThreads, kThreadsAtOnce / kMaxThreads)
norm_forward(const NormForwardArguments a) {
  using Input = typename Types::Branch;
  using Residual = typename Types::Residual;
  using Sum = typename Types::Sum;
#ifdef __CUDA_ARCH__
  // No plan for this architecture asks for it.
  if constexpr (kLanes == 0 && kItems != block_row_items(sizeof(Input), kForwardResidualBytes<Types, kAdds>, kShifted,
                                                         __CUDA_ARCH__ / 10)) {
    return;
  }
#endif
  const int row_threads = kLanes == 0 ? block_threads() : kLanes;
  const RowGroup<kLanes, kCluster> group{kLanes == 0 ? thread_index() : thread_index() % kLanes, row_threads, 1};
  const int rank = kCluster ? cluster_rank() : 0;
  const std::int64_t first_row = kCluster      ? cluster_index()
                                 : kLanes == 0 ? block_index()
                                               : std::int64_t{block_index()} * (block_threads() / kLanes);
  const std::int64_t row = first_row + (kLanes == 0 ? 0 : thread_index() / row_threads);
  const bool live = row < a.rows;  // threads without a row stay, because shuffles take the whole warp

  // In a cluster two barriers, then the slots of both sums.
  auto* const barriers = reinterpret_cast<TransactionBarrier*>(shared_memory());
  if constexpr (kCluster) {
    if (thread_index() == 0) {
      init_barrier(barriers);
      init_barrier(barriers + 1);
    }
    cluster_arrive();
  }

  await_previous_kernel();
  const int step = row_threads * kVector;
  int base = rank * step * kItems + group.thread * kVector;
  if constexpr (kShifted) base -= static_cast<int>((a.first_element + row * a.input_stride) % kVector);
  const int cols = live ? a.cols : 0;  // without a row, no column is inside
  const auto* input = static_cast<const Input*>(a.input) + row * a.input_stride + base;
  const auto* residual = kAdds ? static_cast<const Residual*>(a.residual) + row * a.residual_stride + base : nullptr;

  Words<kVector * sizeof(Input)> input_words[kItems];
  Words<kVector * sizeof(Residual)> residual_words[kAdds ? kItems : 1];
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    input_words[i] = load_vector<Input, kVector, kShifted>(input + i * step, base + i * step, cols);
    if constexpr (kAdds) {
      residual_words[i] = load_vector<Residual, kVector, kShifted>(residual + i * step, base + i * step, cols);
    }
  }
  const auto seed = kDrops ? static_cast<std::uint64_t>(*a.seed) : 0;

  const auto is_inside = [&](int i) {
    const int column = base + i * step;
    return kShifted ? column + kVector > 0 && column < cols : column < cols;
  };
  // Whether element k of a vector that is inside belongs to the row.
  const auto is_element = [&](int i, int k) {
    return !kShifted || (base + i * step + k >= 0 && base + i * step + k < cols);
  };

  float x[kItems][kVector], total[1] = {0.0F};  // of x, or of x^2
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    const int column = base + i * step;
    ElementWords<Input>::template unpack<kVector>(input_words[i], x[i]);
    if constexpr (kAdds) {
      const auto add_residual = [&] {
        float addend[kVector];
        ElementWords<Residual>::template unpack<kVector>(residual_words[i], addend);
#pragma unroll
        for (int k = 0; k < kVector; k += 2) put_pair(x[i], k, pair_at(x[i], k) + pair_at(addend, k));
      };
      if constexpr (!kDrops) add_residual();  // before the bias takes registers, where nothing stands against it
      if (a.input_bias != nullptr && is_inside(i)) {
        float bias[kVector];
        load_parameter<Input, kVector, kShifted, true>(a.input_bias, a.float32_parameters, column, cols, bias);
#pragma unroll
        for (int k = 0; k < kVector; k += 2) put_pair(x[i], k, pair_at(x[i], k) + pair_at(bias, k));
      }
      if constexpr (kDrops) {
        apply_dropout<!kShifted>(x[i], row * a.cols + column, seed, a.threshold, a.scale);
        add_residual();
      }
      if (a.sum != nullptr && is_inside(i)) {
        auto* const to = static_cast<Sum*>(a.sum) + row * a.sum_stride + base + i * step;
        store_vector<Sum, kVector, kShifted>(to, column, cols, x[i]);
      }
    }
    total[0] += kCentered ? sum_of(x[i]) : sum_of_squares(x[i]);
  }

  float* const slots = reinterpret_cast<float*>(shared_memory() + forward_barrier_bytes(kCluster));
  if constexpr (kCluster) cluster_wait();
  group.sum(total, SumSlot<float>{slots, barriers});
  const float average = total[0] * a.reciprocal_cols;
  const float rounded_mean = kCentered ? average : 0.0F;
  float delta = 0.0F, variance = average;  // where the norm is not centered: about zero
  if constexpr (kCentered) {
    // Of the deviations: two chains each, because trees over all vectors would take more registers.
    Pair deviations = both(0.0F), squares = both(0.0F);
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      const float mean = is_inside(i) ? rounded_mean : 0.0F;  // outside everything is 0 and stays so
#pragma unroll
      for (int k = 0; k < kVector; k += 2) {
        Pair deviation = pair_at(x[i], k) + both(-mean);
        if (!is_element(i, k)) deviation.lower = 0.0F;
        if (!is_element(i, k + 1)) deviation.upper = 0.0F;
        put_pair(x[i], k, deviation);
        deviations = deviations + deviation;
        squares = multiply_add(deviation, deviation, squares);
      }
    }
    float moments[2] = {sum_of(deviations), sum_of(squares)};
    group.sum(moments,
              SumSlot<float>{slots + decltype(group)::slot_size(row_threads, kCluster ? cluster_blocks() : 1, 1),
                             barriers + 1});
    // Divided, which is exact where all deviations are alike: a constant row gives the bias.
    delta = moments[0] / static_cast<float>(a.cols);
    variance = moments[1] * a.reciprocal_cols - delta * delta;
    variance = variance < 0.0F ? 0.0F : variance;  // a NaN stays one
  }
  const float rstd = reciprocal_sqrt(variance + a.eps);
  if (live && rank == 0 && group.thread == 0 && a.rstd != nullptr) {
    if constexpr (kCentered) a.mean[row] = rounded_mean + delta;
    a.rstd[row] = rstd;
  }

  // The parameters last: loaded early they take registers from the loads of the rows, and L1 has them.
  auto* const output = static_cast<Input*>(a.output) + row * a.output_stride + base;
  const bool has_all = a.weight != nullptr && (!kCentered || a.bias != nullptr);
  if (kShifted || !has_all || a.float32_parameters) {
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      if (!is_inside(i)) continue;
      int column = base + i * step;
      hide(column);
      float parameter[kVector];
      if (a.weight != nullptr) {
        load_parameter<Input, kVector, kShifted, true>(a.weight, a.float32_parameters, column, cols, parameter);
#pragma unroll
        for (int k = 0; k < kVector; ++k) x[i][k] = (x[i][k] - delta) * rstd * parameter[k];
      } else {
#pragma unroll
        for (int k = 0; k < kVector; ++k) x[i][k] = (x[i][k] - delta) * rstd;
      }
      if (kCentered && a.bias != nullptr) {
        load_parameter<Input, kVector, kShifted, true>(a.bias, a.float32_parameters, column, cols, parameter);
#pragma unroll
        for (int k = 0; k < kVector; ++k) x[i][k] += parameter[k];
      }
      store_vector<Input, kVector, kShifted>(output + i * step, column, cols, x[i]);
    }
    return;
  }
  Input* to = output;
  hide(to);
  using ParameterWords = Words<kVector * sizeof(Input)>;
  // Vectors whose loads wait together: as many as fit into registers.
  constexpr int kBatch = kCluster && kDrops ? 1 : 2;
#pragma unroll
  for (int first = 0; first < kItems; first += kBatch) {
    int batch_base = base;
    hide(batch_base);
    ParameterWords weight_words[kBatch], bias_words[kBatch];
#pragma unroll
    for (int j = 0; j < kBatch && first + j < kItems; ++j) {
      if (!is_inside(first + j)) continue;
      const int column = batch_base + (first + j) * step;
      weight_words[j] = load_kept<ParameterWords, true>(static_cast<const Input*>(a.weight) + column);
      if constexpr (kCentered)
        bias_words[j] = load_kept<ParameterWords, true>(static_cast<const Input*>(a.bias) + column);
    }
#pragma unroll
    for (int j = 0; j < kBatch && first + j < kItems; ++j) {
      const int i = first + j;
      float weights[kVector], biases[kVector] = {};
      ElementWords<Input>::template unpack<kVector>(weight_words[j], weights);
      if constexpr (kCentered) ElementWords<Input>::template unpack<kVector>(bias_words[j], biases);
#pragma unroll
      for (int k = 0; k < kVector; k += 2) {
        const Pair normalized = (pair_at(x[i], k) + both(-delta)) * both(rstd);
        put_pair(x[i], k, multiply_add(normalized, pair_at(weights, k), pair_at(biases, k)));
      }
      store_vector<Input, kVector, kShifted>(to + i * step, base + i * step, cols, x[i]);
    }
  }
}

}  // namespace resnorm::cuda
