// SPDX-License-Identifier: BSD-3-Clause
// How a kernel is spread over threads: by the row's length, the element's size and the architecture. The limits are
// those within which the kernels keep a row in registers without a spill.
#pragma once

namespace resnorm::cuda {

struct ForwardPlan {
  bool any;      // no kernel holds such a row: norm_forward_any
  bool shifted;  // rows do not start or end at multiples of a vector
  int lanes;     // of a warp that share a row; 0: the block is the row
  int items;     // vectors that a thread holds
  int threads;   // of a block
  int cluster;   // blocks that share a row
};

inline constexpr int kVectorBytes = 16;
inline constexpr int kWarpRowThreads = 128, kBlockRowThreads = 1024, kBlockRowItems = 2, kMaxCluster = 8;

// How many vectors a thread of a row's only warp may hold: 64 registers hold the raw words of all operands at once.
constexpr int max_warp_items(int input_bytes, int stream_bytes, bool drops) {
  if (input_bytes == 4 || stream_bytes == 0) return 4;
  return stream_bytes == 2 && !drops ? 3 : 2;
}

// `stream_bytes` of an element of the residual or the sum, whichever is wider; 0 where there is no residual.
// `architecture` as 90 for sm_90.
inline ForwardPlan forward_plan(int cols, int input_bytes, int stream_bytes, bool drops, bool shifted,
                                int architecture) {
  const int vector = kVectorBytes / input_bytes;
  const long reach = cols + (shifted ? vector - 1 : 0);  // what a shift may add before the row
  const auto vectors = static_cast<int>((reach + vector - 1) / vector);
  const auto rounded = [](int value, int multiple) { return (value + multiple - 1) / multiple * multiple; };
  if (vectors <= 8) return {false, shifted, 8, 1, kWarpRowThreads, 1};
  const int warp_items = (vectors + 31) / 32;
  if (warp_items <= max_warp_items(input_bytes, stream_bytes, drops)) {
    return {false, shifted, 32, warp_items, kWarpRowThreads, 1};
  }
  constexpr int kBlockVectors = kBlockRowThreads * kBlockRowItems;
  if (vectors <= kBlockVectors) {
    return {false, shifted, 0, kBlockRowItems, rounded(vectors, 32 * kBlockRowItems) / kBlockRowItems, 1};
  }
  if (architecture >= 90) {
    for (int cluster = 2; cluster <= kMaxCluster; cluster *= 2) {
      if (vectors <= kBlockVectors * cluster) return {false, shifted, 0, kBlockRowItems, kBlockRowThreads, cluster};
    }
  }
  return {true, shifted, 0, 0, 0, 1};
}

struct BackwardPlan {
  bool any = false;      // no kernel holds such a row: norm_backward_any
  int items = 0;         // vectors that a thread holds
  int row_threads = 0;   // of each block of the cluster that share a row; 32: a warp alone
  int threads = 0;       // of a block
  int cluster = 1;       // blocks that share a row
  int stage_bytes = 0;   // of shared memory, for the rows of one stage
  int staged_bytes = 0;  // and of all
};

inline constexpr int kBackwardThreads = 512, kBackwardStages = 2;

// What a thread may hold in one row, of columns whose sums it keeps: more would not fit 128 registers.
inline constexpr int kBackwardElements = 16;

// Bytes of shared memory that a block may have.
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

// `gradient_bytes` of an element of the output's gradient, `row_bytes` of one of each matrix that is read, together.
inline BackwardPlan backward_plan(int cols, int gradient_bytes, int row_bytes, int architecture) {
  const int vector = kVectorBytes / gradient_bytes, max_items = kBackwardElements / vector;
  const int vectors = (cols + vector - 1) / vector;
  const auto plan_of = [&](int items, int row_threads, int threads, int cluster) {
    const int elements = items * vector * threads;
    const int staged = kBackwardStages * elements * row_bytes, meeting = elements * 4;
    return BackwardPlan{
        false, items, row_threads, threads, cluster, elements * row_bytes, staged > meeting ? staged : meeting};
  };
  constexpr int kSlotBytes = 8 << 10;  // more than the row sums take
  int threads = kBackwardThreads;
  while (plan_of(max_items, 32, threads, 1).staged_bytes + kSlotBytes > max_shared_bytes(architecture)) threads /= 2;
  if (vectors <= 32 * max_items) return plan_of(vectors <= 16 * max_items ? max_items / 2 : max_items, 32, threads, 1);
  const int row_threads = (vectors + 32 * max_items - 1) / (32 * max_items) * 32;
  if (row_threads <= threads) return plan_of(max_items, row_threads, threads / row_threads * row_threads, 1);
  if (architecture >= 90) {
    for (int cluster = 2; cluster <= kMaxCluster; cluster *= 2) {
      if (row_threads <= threads * cluster) return plan_of(max_items, threads, threads, cluster);
    }
  }
  return {.any = true};
}

}  // namespace resnorm::cuda
