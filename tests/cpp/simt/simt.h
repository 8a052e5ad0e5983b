// SPDX-License-Identifier: BSD-3-Clause
// The primitives of primitives.cuh on the CPU, for kernels that are compiled by the host's compiler and run by
// simt::launch. Where the device would do whatever it likes, these fail: see tests/cpp/simt/simt_test.cpp.
//
// They order memory as little as CUDA promises. A shuffle orders nothing, nor does the cluster's barrier, but the other
// barriers do. An asynchronous copy is made as late as it may be: when the thread that issued it waits; an asynchronous
// store when a thread of the block that gets it waits. Until then its destination is NaN.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "launch.h"
#include "operations.h"

namespace resnorm::cuda {

inline int thread_index() { return simt::position().thread; }
inline int block_index() { return simt::position().block; }
inline int grid_blocks() { return simt::current_launch().grid; }
inline int block_threads() { return simt::current_launch().block; }

// NaN until written, and of the exact size, so that AddressSanitizer sees one byte too many.
inline unsigned char* shared_memory() { return simt::shared_memory(); }

inline float bits_to_float(std::uint32_t bits) { return std::bit_cast<float>(bits); }
inline std::uint32_t float_to_bits(float value) { return std::bit_cast<std::uint32_t>(value); }

inline float reciprocal_sqrt(float x) { return 1.0f / std::sqrt(x); }
inline double reciprocal_sqrt(double x) { return 1.0 / std::sqrt(x); }

inline float shuffle_xor(float value, int distance) {
  return bits_to_float(static_cast<std::uint32_t>(simt::exchange(float_to_bits(value), distance, sizeof value)));
}
inline double shuffle_xor(double value, int distance) {
  return std::bit_cast<double>(simt::exchange(std::bit_cast<std::uint64_t>(value), distance, sizeof value));
}

inline void warp_barrier() { simt::meet_warp(); }
inline void barrier(int id, int threads) { simt::meet_barrier(id, threads); }

inline int cluster_rank() { return simt::position().rank; }
inline int cluster_index() { return block_index() / simt::current_launch().cluster; }
inline int cluster_blocks() { return simt::current_launch().cluster; }
inline void cluster_arrive() { simt::arrive_at_cluster(); }
inline void cluster_wait() { simt::wait_for_cluster(); }

inline void await_previous_kernel() { simt::await_previous_kernel(); }
inline void begin_next_kernel() {}  // launches follow each other here

// What is in it is the emulation's own affair: see operations.cpp.
struct TransactionBarrier {
  std::uint64_t state;
};

inline void init_barrier(TransactionBarrier* barrier) { simt::init_barrier(barrier); }
inline void expect_bytes(TransactionBarrier* barrier, int bytes) { simt::expect_bytes(barrier, bytes); }
template <int kCount>
void store_async(float* at, TransactionBarrier* barrier, int rank, const float (&values)[kCount]) {
  static_assert(kCount == 1 || kCount == 2 || kCount == 4, "there are no other vectors");
  simt::store_async(at, barrier, rank, values, kCount);
}
inline void wait_for_bytes(TransactionBarrier* barrier, int parity) { simt::wait_for_bytes(barrier, parity); }

// Copies, because the words were written as numbers of another type.
template <class Words>
Words load_words(simt::Access access, const void* from, std::size_t alignment) {
  static_assert(std::is_trivially_copyable_v<Words>);
  simt::note_access(access, from, sizeof(Words), alignment);
  Words words;
  std::memcpy(static_cast<void*>(&words), from, sizeof words);
  return words;
}

template <class Words>
Words load_once(const void* from) {
  return load_words<Words>(simt::Access::kLoadOnce, from, alignof(Words));
}
template <class Words, bool kOverlaps = false>
Words load_kept(const void* from) {
  if (simt::current_launch().overlaps && !kOverlaps) simt::fail("a read-only load, while the kernel before may write");
  return load_words<Words>(simt::Access::kLoadKept, from, alignof(Words));
}
template <class Words>
Words load_staged(const void* from) {
  static_assert(sizeof(Words) == 16);
  return load_words<Words>(simt::Access::kLoadStaged, from, 16);
}
template <class Words>
void store(void* to, const Words& words) {
  static_assert(std::is_trivially_copyable_v<Words>);
  simt::note_access(simt::Access::kStore, to, sizeof words, alignof(Words));
  std::memcpy(to, static_cast<const void*>(&words), sizeof words);
}

template <class Words>
void store_staged(void* to, const Words& words) {
  static_assert(sizeof(Words) == 16);
  simt::note_access(simt::Access::kStoreStaged, to, sizeof words, 16);
  std::memcpy(to, static_cast<const void*>(&words), sizeof words);
}

inline void async_copy16(void* shared, const void* global) {
  simt::begin_copy(shared, global);
  simt::note_access(simt::Access::kCopyTo, shared, 16, 16);
  std::memset(shared, 0xFF, 16);
}
inline void async_commit() { simt::commit_copies(); }
template <int kPending>
void async_wait() {
  simt::Copy copy;
  while (simt::take_copy(kPending, copy)) {
    simt::note_access(simt::Access::kCopyTo, copy.to, 16, 16);
    simt::note_access(simt::Access::kCopyFrom, copy.from, 16, 16);
    std::memcpy(copy.to, copy.from, 16);
  }
}

}  // namespace resnorm::cuda
