// SPDX-License-Identifier: BSD-3-Clause
// Sums over the threads that share a row: a part of a warp, a group of warps, a block, or a cluster of blocks.
#pragma once

#include "../host_device.h"
#include "primitives.cuh"

namespace resnorm::cuda {

// kLanes threads of a warp share a row; kLanes == 0: `threads` threads (a multiple of 32) of each block of the cluster.
template <int kLanes, bool kCluster>
struct RowGroup {
  int thread;  // among the row's threads of this block
  int threads;
  int barrier_id;

  // Values of shared memory that one sum of `count` values needs.
  static RESNORM_HOST_DEVICE constexpr int slot_size(int threads, int cluster_blocks, int count) {
    return kLanes == 0 ? threads / 32 * cluster_blocks * count : 0;
  }

  // Each of `values` becomes its sum over the row's threads, the same in all of them. `slot` may be used again once
  // another sum has been taken through another one: one barrier a sum is enough because consecutive ones alternate.
  template <int kCount, class Value>
  RESNORM_DEVICE void sum(Value (&values)[kCount], Value* slot) const {
    sum_in_warp<kLanes == 0 ? 32 : kLanes>(values);
    if constexpr (kLanes == 0) {
      const int warp = thread / 32, lane = thread % 32, warps = threads / 32;
      int slots = warps;
      if constexpr (kCluster) {
        const int rank = cluster_rank(), blocks = cluster_blocks();
        slots *= blocks;
        if (lane < blocks) {  // each lane tells another block
#pragma unroll
          for (int i = 0; i < kCount; ++i) store_remote(slot + (rank * warps + warp) * kCount + i, lane, values[i]);
        }
        cluster_arrive();
        cluster_wait();
      } else {
        if (lane == 0) {
#pragma unroll
          for (int i = 0; i < kCount; ++i) slot[warp * kCount + i] = values[i];
        }
        barrier(barrier_id, threads);
      }
      // A slot for each lane and a second tree of shuffles: no loop over the slots in every thread.
#pragma unroll
      for (int i = 0; i < kCount; ++i) values[i] = lane < slots ? slot[lane * kCount + i] : Value(0);
      if constexpr (kCluster) {
        for (int other = lane + 32; other < slots; other += 32) {
#pragma unroll
          for (int i = 0; i < kCount; ++i) values[i] += slot[other * kCount + i];
        }
      }
      sum_in_warp<32>(values);
    }
  }

 private:
  template <int kWidth, int kCount, class Value>
  static RESNORM_DEVICE void sum_in_warp(Value (&values)[kCount]) {
#pragma unroll
    for (int distance = kWidth / 2; distance > 0; distance /= 2) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) values[i] += shuffle_xor(values[i], distance);
    }
  }
};

}  // namespace resnorm::cuda
