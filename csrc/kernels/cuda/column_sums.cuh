// SPDX-License-Identifier: BSD-3-Clause
// Where the groups of a block, each with sums over the rows that it had, meet: their sums are added in the groups'
// order and become the block's row of the partial sums.
#pragma once

#include "plan.h"
#include "primitives.cuh"

namespace resnorm::cuda {

// `sums[i][k]` belongs to column first_column + (i * row_threads + thread) * kVector + k; what lies outside [0, cols)
// does not count. `exchange` holds exchange_size(...) floats a group, and nothing that is still needed once all threads
// have come here; the caller has waited for its copies.
template <int kVector, int kItems>
RESNORM_DEVICE void store_column_sums(const float (&sums)[kItems][kVector], float* exchange, int row_threads,
                                      std::int64_t first_column, std::int64_t cols, float* partials) {
  const int pitch = exchange_pitch(row_threads, kVector), size = exchange_size(row_threads, kVector);
  const int groups = block_threads() / row_threads;
  const int group = thread_index() / row_threads, thread = thread_index() % row_threads;
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    barrier(0, block_threads());
#pragma unroll
    for (int k = 0; k < kVector; ++k) exchange[group * size + k * pitch + thread] = sums[i][k];
    barrier(0, block_threads());
    for (int value = thread_index(); value < kVector * row_threads; value += block_threads()) {
      const std::int64_t column = first_column + i * row_threads * kVector + value;
      if (column < 0 || column >= cols) continue;
      const int place = value % kVector * pitch + value / kVector;
      float total = 0.0F;
      for (int other = 0; other < groups; ++other) total += exchange[other * size + place];
      partials[column] = total;
    }
  }
}

}  // namespace resnorm::cuda
