// SPDX-License-Identifier: BSD-3-Clause
// output = residual + dropout(input + input_bias): one read and one write of every element. Nothing is summed over a
// row, so a long one is cut into tiles; each thread has kElementwiseItems vectors of one tile.
#pragma once

#include "dropout.cuh"
#include "plan.h"
#include "row_access.cuh"

namespace resnorm::cuda {

// Strides in elements. What is absent is null.
struct ResidualAddArguments {
  const void *input, *input_bias, *residual;
  void* output;
  const std::int64_t* seed;
  std::int64_t rows, cols, tiles, input_stride, residual_stride, output_stride;
  int row_threads;
  int first_element;  // of row 0, modulo kVector; of row r it is r * input_stride more
  bool float32_parameters;
  std::uint32_t threshold;
  float scale;
};

// Types: ElementTypes, of which Sum is the output's. kShifted: rows do not start and end at multiples of a vector.
template <class Types, int kVector, bool kShifted, bool kDrops>
RESNORM_KERNEL(kElementwiseThreads, 4)
residual_add_forward(const ResidualAddArguments a) {
  using Branch = typename Types::Branch;
  using Residual = typename Types::Residual;
  using Sum = typename Types::Sum;
  constexpr int kItems = kElementwiseItems;
  const std::int64_t groups = block_threads() / a.row_threads;
  const std::int64_t row = block_index() / a.tiles * groups + thread_index() / a.row_threads;
  if (row >= a.rows) return;
  const int step = a.row_threads * kVector;
  std::int64_t base = block_index() % a.tiles * kItems * step + thread_index() % a.row_threads * kVector;
  if constexpr (kShifted) base -= (a.first_element + row * a.input_stride) % kVector;
  const auto* input = static_cast<const Branch*>(a.input) + row * a.input_stride + base;
  const auto* residual = static_cast<const Residual*>(a.residual) + row * a.residual_stride + base;
  auto* const output = static_cast<Sum*>(a.output) + row * a.output_stride + base;

  Words<kVector * sizeof(Branch)> input_words[kItems];
  Words<kVector * sizeof(Residual)> residual_words[kItems];
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    input_words[i] = load_vector<Branch, kVector, kShifted>(input + i * step, base + i * step, a.cols);
    residual_words[i] = load_vector<Residual, kVector, kShifted>(residual + i * step, base + i * step, a.cols);
  }
  const auto seed = kDrops ? static_cast<std::uint64_t>(*a.seed) : 0;
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    const std::int64_t column = base + i * step;
    if (column >= a.cols) continue;
    float x[kVector], addend[kVector];
    ElementWords<Branch>::template unpack<kVector>(input_words[i], x);
    ElementWords<Residual>::template unpack<kVector>(residual_words[i], addend);
    if (a.input_bias != nullptr) {
      float bias[kVector];
      load_parameter<Branch, kVector, kShifted, false>(a.input_bias, a.float32_parameters, column, a.cols, bias);
#pragma unroll
      for (int k = 0; k < kVector; ++k) x[k] += bias[k];
    }
    if constexpr (kDrops) apply_dropout<!kShifted>(x, row * a.cols + column, seed, a.threshold, a.scale);
#pragma unroll
    for (int k = 0; k < kVector; ++k) x[k] += addend[k];
    store_vector<Sum, kVector, kShifted>(output + i * step, column, a.cols, x);
  }
}

}  // namespace resnorm::cuda
