// SPDX-License-Identifier: BSD-3-Clause
// How a kernel is spread over threads: by the row's length, the elements' sizes and the architecture (90 for sm_90).
// The limits are those within which the kernels keep a row in registers without a spill.
#pragma once

#include <cstdint>

#include "../arguments.h"
#include "../host_device.h"

namespace resnorm::cuda {

struct Plan {
  bool generic = false;    // no kernel holds such a row: the one that goes through any row element by element
  bool shifted = false;    // rows do not start or end at multiples of a vector
  int row_threads = 0;     // of a block that share a row: a piece of a warp, warps, or the whole block
  int items = 0;           // vectors that a thread holds
  int threads = 0;         // of a block
  int cluster = 1;         // blocks that share a row
  std::int64_t tiles = 1;  // pieces of a row that go to different blocks, where nothing is summed over a row
  int row_subsets = 0;     // each with its own partial sums of the columns; 0 where there are none
  bool overlaps = false;   // the last kernel begins while the one before it ends

  int groups() const { return threads / row_threads; }  // of threads that share a row
};

// Whether kernels of their own are compiled for these types of a branch (input and output) and of the residual stream
// before and after: the branch's, float32 beside a half-precision branch, or one that becomes float32 here.
constexpr bool has_kernels(DType branch, DType residual, DType sum) {
  if (branch == DType::kFloat64) return false;
  const bool same = residual == branch && sum == branch;
  return same ||
         (sum == DType::kFloat32 && branch != DType::kFloat32 && (residual == DType::kFloat32 || residual == branch));
}

// Whether a kernel may begin while the one before it ends.
constexpr bool has_overlapping_kernels(int architecture) { return architecture >= 90; }

inline constexpr int kVectorBytes = 16;
inline constexpr int kMaxCluster = 8;

constexpr int rounded_up(int value, int multiple) { return (value + multiple - 1) / multiple * multiple; }

// Vectors of a row; a shift may add elements before it.
constexpr std::int64_t vectors_of(std::int64_t cols, int vector, bool shifted) {
  return (cols + (shifted ? vector - 1 : 0) + vector - 1) / vector;
}

// ---- The norms, forward

inline constexpr int kWarpRowThreads = 128;
inline constexpr int kThreadsAtOnce = 1024;  // of a multiprocessor, at the 64 registers that they may have

// Bytes of shared memory before the slots of the row sums.
RESNORM_HOST_DEVICE constexpr int forward_barrier_bytes(bool cluster) { return cluster ? 16 : 0; }

// How many vectors a thread of a warp may hold: 64 registers hold the raw words of all operands at once.
constexpr int max_warp_items(int input_bytes, int residual_bytes, bool drops) {
  if (input_bytes == 4 || residual_bytes == 0) return 4;
  return residual_bytes == 2 && !drops ? 3 : 2;
}

// The same where a row has a block or more: by the architecture too, because beside a residual four spill everywhere
// but on sm_90. A block of 512 threads with four vectors each leaves room for another one; else it has 1024.
RESNORM_HOST_DEVICE constexpr int block_row_items(int input_bytes, int residual_bytes, bool shifted, int architecture) {
  if (input_bytes == 4) return 4;
  const bool fits = residual_bytes == 0 || (residual_bytes == 2 && architecture == 90);
  return fits && !shifted ? 4 : 2;
}
constexpr int max_block_row_threads(int items) { return 2048 / items; }

// `residual_bytes` of an element of the residual or the sum, whichever is wider; 0 where there is no residual.
//
// Few threads with several vectors each, rather than many with one: the more each holds, the fewer shuffles an element
// costs, and the more loads are in flight.
inline Plan forward_plan(int cols, int input_bytes, int residual_bytes, bool drops, bool shifted, int architecture) {
  const auto vectors = static_cast<int>(vectors_of(cols, kVectorBytes / input_bytes, shifted));
  const int max_items = max_warp_items(input_bytes, residual_bytes, drops);
  const auto warp_plan = [&](int row_threads, int items) {
    return Plan{.shifted = shifted, .row_threads = row_threads, .items = items, .threads = kWarpRowThreads};
  };
  if (vectors <= 8) return warp_plan(8, 1);
  if (vectors <= 16) return warp_plan(8, 2);
  const int part_items = max_items >= 4 ? 4 : 2;
  if (vectors <= 8 * part_items) return warp_plan(8, part_items);
  if (vectors <= 16 * part_items) return warp_plan(16, part_items);
  if (vectors <= 32 * max_items) return warp_plan(32, (vectors + 31) / 32);
  const int items = block_row_items(input_bytes, residual_bytes, shifted, architecture);
  for (int cluster = 1; cluster <= (architecture >= 90 ? kMaxCluster : 1); cluster *= 2) {
    const int threads = rounded_up(vectors, 32 * items * cluster) / (items * cluster);
    if (threads > max_block_row_threads(items)) continue;
    return {.shifted = shifted, .row_threads = threads, .items = items, .threads = threads, .cluster = cluster};
  }
  return {.generic = true};
}

// ---- The norms, backward

// 128 registers a thread; 168 where rows are shifted, whose bounds take some of them.
inline constexpr int kBackwardThreads = 512, kShiftedBackwardThreads = 384, kBackwardStages = 2;

// Sums that are taken over a row, and those over the columns: of the weight's gradient, where the norm is centered the
// bias's, and last the input bias's.
RESNORM_HOST_DEVICE constexpr int backward_row_sums(bool centered) { return centered ? 3 : 1; }
RESNORM_HOST_DEVICE constexpr int backward_column_sums(bool centered, bool input_bias) {
  return (centered ? 2 : 1) + (input_bias ? 1 : 0);
}

// Bytes of shared memory between the stages and the slots of the row sums.
RESNORM_HOST_DEVICE constexpr int backward_barrier_bytes(bool cluster) { return cluster ? 16 : 0; }

// What a thread may hold in one row, of columns whose sums it keeps: more would not fit its registers.
inline constexpr int kBackwardElements = 16;

// Bytes of shared memory that a block may have, for plans that are made without a GPU, which would say so itself.
constexpr int max_shared_bytes(int architecture) {
  switch (architecture) {
    case 75:
      return 64 << 10;
    case 80:
    case 87:
      return 163 << 10;
    case 90:
    case 100:
    case 103:
      return 227 << 10;
    default:
      return 99 << 10;
  }
}

// Floats that a group of threads needs where the groups' sums of the columns meet, one vector a thread at a time. The
// pitch keeps a warp that goes through columns, and one that goes through threads, from hitting a bank twice.
RESNORM_HOST_DEVICE constexpr int exchange_pitch(int row_threads, int vector) { return row_threads + 32 / vector; }
RESNORM_HOST_DEVICE constexpr int exchange_size(int row_threads, int vector) {
  return exchange_pitch(row_threads, vector) * vector;
}

// Bytes of shared memory for the rows of one stage, and for all stages or the exchange, whichever is larger.
struct Staging {
  int stage_bytes, total_bytes;
};

// `row_bytes` of an element of each matrix that is read, together.
inline Staging staging_of(const Plan& plan, int vector, int row_bytes) {
  const int stage = plan.items * vector * plan.threads * row_bytes;
  const int exchange = plan.groups() * exchange_size(plan.row_threads, vector) * 4;
  return {stage, kBackwardStages * stage > exchange ? kBackwardStages * stage : exchange};
}

// `gradient_bytes` of an element of the output's gradient.
inline Plan backward_plan(int cols, int gradient_bytes, int row_bytes, bool shifted, int architecture,
                          int shared_bytes) {
  constexpr int kSlotBytes = 8 << 10;  // more than the row sums take
  const int vector = kVectorBytes / gradient_bytes, max_items = kBackwardElements / vector;
  const auto vectors = static_cast<int>(vectors_of(cols, vector, shifted));
  int threads = shifted ? kShiftedBackwardThreads : kBackwardThreads;
  const auto plan_of = [&](int items, int row_threads, int cluster) {
    return Plan{.shifted = shifted,
                .row_threads = row_threads,
                .items = items,
                .threads = threads / row_threads * row_threads,
                .cluster = cluster};
  };
  while (staging_of(plan_of(max_items, 32, 1), vector, row_bytes).total_bytes + kSlotBytes > shared_bytes) {
    threads /= 2;
  }
  if (vectors <= 16 * max_items && !shifted) return plan_of(max_items / 2, 32, 1);
  const int row_threads = rounded_up(vectors, 32 * max_items) / max_items;
  if (row_threads <= threads) return plan_of(max_items, row_threads, 1);
  for (int cluster = 2; architecture >= 90 && cluster <= kMaxCluster; cluster *= 2) {
    const int of_block = rounded_up(vectors, 32 * max_items * cluster) / (max_items * cluster);
    if (of_block <= threads) return plan_of(max_items, of_block, cluster);
  }
  return {.generic = true};
}

// ---- residual_add: nothing is summed over a row, so a row may be cut into tiles

inline constexpr int kElementwiseThreads = 256, kElementwiseItems = 2;

// The backward pass with an input bias, where one block a multiprocessor keeps the columns' sums.
inline constexpr int kColumnSumThreads = 512, kColumnSumItems = 4;

inline Plan elementwise_plan(std::int64_t cols, int element_bytes, bool shifted, int max_threads, int items) {
  const std::int64_t vectors = vectors_of(cols, kVectorBytes / element_bytes, shifted);
  const int row_threads = vectors >= static_cast<std::int64_t>(max_threads) * items
                              ? max_threads
                              : rounded_up(static_cast<int>(vectors), 32 * items) / items;
  return {.shifted = shifted,
          .row_threads = row_threads,
          .items = items,
          .threads = max_threads / row_threads * row_threads,
          .tiles = (vectors + row_threads * items - 1) / (row_threads * items)};
}

}  // namespace resnorm::cuda
