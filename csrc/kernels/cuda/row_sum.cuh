// SPDX-License-Identifier: BSD-3-Clause
// Sums over the threads that share a row: a part of a warp, a group of warps, a block, or a cluster of blocks.
#pragma once

#include "plan.h"
#include "primitives.cuh"

namespace resnorm::cuda {

// Where warps put their sums for one another. In a cluster they arrive asynchronously: `barrier` counts them, and
// `parity` says how often it was used before, modulo 2.
template <class Value>
struct SumSlot {
  Value* values;
  TransactionBarrier* barrier = nullptr;
  int parity = 0;
};

// kLanes threads of a warp share a row; kLanes == 0: `threads` threads (a multiple of 32) of each block of the cluster.
template <int kLanes, bool kCluster>
struct RowGroup {
  int thread;  // among the row's threads of this block
  int threads;
  int barrier_id;

  // Values of shared memory that one sum of `count` values needs.
  static RESNORM_HOST_DEVICE constexpr int slot_size(int threads, int cluster_blocks, int count) {
    return kLanes == 0 ? threads / 32 * cluster_blocks * stored_count(count) : 0;
  }

  // Each of `values` becomes its sum over the row's threads, the same in all of them. `slot` may be used again once
  // another sum has been taken through another one: one barrier a sum is enough because consecutive ones alternate.
  template <int kCount, class Value>
  RESNORM_DEVICE void sum(Value (&values)[kCount], const SumSlot<Value>& slot) const {
    sum_in_warp<kLanes == 0 ? 32 : kLanes>(values);
    if constexpr (kLanes == 0) {
      constexpr int kStored = stored_count(kCount);
      const int warp = thread / 32, lane = thread % 32, warps = threads / 32;
      int slots = warps;
      if constexpr (kCluster) {
        const int rank = cluster_rank(), blocks = cluster_blocks();
        slots *= blocks;
        warp_barrier();  // who sends tells that this warp has read the slot of the sum before, all its lanes
        if (thread == 0) expect_bytes(slot.barrier, slots * kStored * static_cast<int>(sizeof(Value)));
        if (lane < blocks) {  // each lane tells another block
          Value stored[kStored] = {};
#pragma unroll
          for (int i = 0; i < kCount; ++i) stored[i] = values[i];
          store_async(slot.values + (rank * warps + warp) * kStored, slot.barrier, lane, stored);
        }
        wait_for_bytes(slot.barrier, slot.parity);
      } else {
        if (lane == 0) {
#pragma unroll
          for (int i = 0; i < kCount; ++i) slot.values[warp * kStored + i] = values[i];
        }
        barrier(barrier_id, threads);
      }
      // A slot for each lane and a second tree of shuffles: no loop over the slots in every thread.
#pragma unroll
      for (int i = 0; i < kCount; ++i) values[i] = lane < slots ? slot.values[lane * kStored + i] : Value(0);
      if constexpr (kCluster) {
        for (int other = lane + 32; other < slots; other += 32) {
#pragma unroll
          for (int i = 0; i < kCount; ++i) values[i] += slot.values[other * kStored + i];
        }
      }
      sum_in_warp<32>(values);
    }
  }

 private:
  // One vector, so that one asynchronous store sends them all.
  static RESNORM_HOST_DEVICE constexpr int stored_count(int count) { return kCluster && count == 3 ? 4 : count; }

  template <int kWidth, int kCount, class Value>
  static RESNORM_DEVICE void sum_in_warp(Value (&values)[kCount]) {
#pragma unroll
    for (int distance = kWidth / 2; distance > 0; distance /= 2) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) values[i] += shuffle_xor(values[i], distance);
    }
  }
};

// Values of shared memory that a sum of `count` values takes where a row has one block or more.
inline int slot_size_of(const Plan& plan, int count) {
  return plan.cluster > 1 ? RowGroup<0, true>::slot_size(plan.row_threads, plan.cluster, count)
                          : RowGroup<0, false>::slot_size(plan.row_threads, 1, count);
}

}  // namespace resnorm::cuda
