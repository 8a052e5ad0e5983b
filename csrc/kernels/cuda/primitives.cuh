// SPDX-License-Identifier: BSD-3-Clause
// The primitives that the kernels are written with. A kernel that uses nothing else compiles for a GPU and, with the
// host's versions in simt.h, for the emulation that the tests run. What orders memory, moves vectors or finishes later
// must be here.
#pragma once

#include <cstdint>

#ifndef __CUDACC__
#include "simt.h"
#define RESNORM_DEVICE inline
#define RESNORM_KERNEL(max_threads, min_blocks) inline void
#else
#define RESNORM_DEVICE __device__ __forceinline__
#define RESNORM_KERNEL(max_threads, min_blocks) __global__ void __launch_bounds__(max_threads, min_blocks)

namespace resnorm::cuda {

RESNORM_DEVICE int thread_index() { return static_cast<int>(threadIdx.x); }
RESNORM_DEVICE int block_index() { return static_cast<int>(blockIdx.x); }
RESNORM_DEVICE int grid_blocks() { return static_cast<int>(gridDim.x); }
RESNORM_DEVICE int block_threads() { return static_cast<int>(blockDim.x); }

RESNORM_DEVICE unsigned char* shared_memory() {
  extern __shared__ __align__(128) unsigned char memory[];
  return memory;
}

// Every lane of the warp calls it.
RESNORM_DEVICE float shuffle_xor(float value, int distance) { return __shfl_xor_sync(0xFFFFFFFFU, value, distance); }
RESNORM_DEVICE double shuffle_xor(double value, int distance) { return __shfl_xor_sync(0xFFFFFFFFU, value, distance); }

RESNORM_DEVICE void warp_barrier() { __syncwarp(); }

// For `threads` threads, a multiple of 32; id 0 is __syncthreads's, 1 to 15 are free.
RESNORM_DEVICE void barrier(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

RESNORM_DEVICE float reciprocal_sqrt(float x) { return rsqrtf(x); }
RESNORM_DEVICE double reciprocal_sqrt(double x) { return 1.0 / sqrt(x); }

RESNORM_DEVICE float bits_to_float(std::uint32_t bits) { return __uint_as_float(bits); }
RESNORM_DEVICE std::uint32_t float_to_bits(float value) { return __float_as_uint(value); }

// What is read once does not stay in L1. Not by the read-only path (.nc), because results may be written over inputs.
template <class Words>
RESNORM_DEVICE Words load_once(const void* from) {
  if constexpr (sizeof(Words) < 16) {
    return *static_cast<const Words*>(from);
  } else {
    Words words;
#pragma unroll
    for (int i = 0; i < static_cast<int>(sizeof(Words) / 16); ++i) {
      asm volatile("ld.global.L1::no_allocate.v4.b32 {%0,%1,%2,%3}, [%4];"
                   : "=r"(words.word[4 * i]), "=r"(words.word[4 * i + 1]), "=r"(words.word[4 * i + 2]),
                     "=r"(words.word[4 * i + 3])
                   : "l"(static_cast<const char*>(from) + 16 * i));
    }
    return words;
  }
}

// What every row reads: weights. By the read-only path, unless the kernel may overlap the one before it, which may be
// writing them.
template <class Words, bool kOverlaps = false>
RESNORM_DEVICE Words load_kept(const void* from) {
  if constexpr (sizeof(Words) < 16) {
    return *static_cast<const Words*>(from);
  } else {
    Words words;
#pragma unroll
    for (int i = 0; i < static_cast<int>(sizeof(Words) / 16); ++i) {
      if constexpr (kOverlaps) {
        asm volatile("ld.global.v4.b32 {%0,%1,%2,%3}, [%4];"
                     : "=r"(words.word[4 * i]), "=r"(words.word[4 * i + 1]), "=r"(words.word[4 * i + 2]),
                       "=r"(words.word[4 * i + 3])
                     : "l"(static_cast<const char*>(from) + 16 * i));
      } else {
        const uint4 quad = __ldg(static_cast<const uint4*>(from) + i);
        words.word[4 * i] = quad.x;
        words.word[4 * i + 1] = quad.y;
        words.word[4 * i + 2] = quad.z;
        words.word[4 * i + 3] = quad.w;
      }
    }
    return words;
  }
}

// Not moved past what comes after it: results that wait in registers leave none for the next loads.
template <class Words>
RESNORM_DEVICE void store(void* to, const Words& words) {
  if constexpr (sizeof(Words) < 16) {
    *static_cast<Words*>(to) = words;
  } else {
#pragma unroll
    for (int i = 0; i < static_cast<int>(sizeof(Words) / 16); ++i) {
      asm volatile("st.global.v4.b32 [%0], {%1,%2,%3,%4};" ::"l"(static_cast<char*>(to) + 16 * i),
                   "r"(words.word[4 * i]), "r"(words.word[4 * i + 1]), "r"(words.word[4 * i + 2]),
                   "r"(words.word[4 * i + 3])
                   : "memory");
    }
  }
}

// A vector in shared memory.
template <class Words>
RESNORM_DEVICE Words load_staged(const void* from) {
  static_assert(sizeof(Words) == 16);
  const uint4 quad = *static_cast<const uint4*>(from);
  return {{quad.x, quad.y, quad.z, quad.w}};
}

template <class Words>
RESNORM_DEVICE void store_staged(void* to, const Words& words) {
  static_assert(sizeof(Words) == 16);
  *static_cast<uint4*>(to) = make_uint4(words.word[0], words.word[1], words.word[2], words.word[3]);
}

// An asynchronous copy of 16 bytes. Whoever issued it may read it after async_wait has left no more than kPending later
// groups open; others need a barrier after that. Before sm_80 it is done at once.
RESNORM_DEVICE void async_copy16(void* shared, const void* global) {
#if __CUDA_ARCH__ >= 800
  asm volatile(
      "cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(static_cast<std::uint32_t>(__cvta_generic_to_shared(shared))),
      "l"(global)
      : "memory");
#else
  *static_cast<uint4*>(shared) = *static_cast<const uint4*>(global);
#endif
}
RESNORM_DEVICE void async_commit() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}
template <int kPending>
RESNORM_DEVICE void async_wait() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
#endif
}

// Of a launch that overlaps the kernel before it on the stream, every thread calls it before it touches global memory:
// it waits until that kernel has ended and all that it wrote can be seen. Else it does nothing.
RESNORM_DEVICE void await_previous_kernel() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
// Once all blocks have come here or left, a kernel that overlaps this one may begin.
RESNORM_DEVICE void begin_next_kernel() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// In shared memory, 8 bytes aligned. A phase is complete when one thread has said how many bytes it has and so many
// have been stored asynchronously with it; the next one begins at once.
struct TransactionBarrier {
  std::uint64_t state;
};

// Clusters, of sm_90 and newer. Plans for older ones have none; there the functions only let the templates compile.
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
RESNORM_DEVICE int cluster_rank() {
  std::uint32_t rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return static_cast<int>(rank);
}
RESNORM_DEVICE int cluster_blocks() {
  std::uint32_t blocks;
  asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(blocks));
  return static_cast<int>(blocks);
}
// Which cluster of the grid this is, where all have a power of two of blocks. Not %clusterid: compilers compute that in
// float32, which is wrong from 2^24 blocks on.
RESNORM_DEVICE int cluster_index() { return block_index() >> (31 - __clz(cluster_blocks())); }
// Once all threads have passed both, the blocks of the cluster have started and their TransactionBarriers are there.
// Orders nothing else: a release here would be a fence for the whole GPU.
RESNORM_DEVICE void cluster_arrive() { asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory"); }
RESNORM_DEVICE void cluster_wait() { asm volatile("barrier.cluster.wait.aligned;" ::: "memory"); }

RESNORM_DEVICE std::uint32_t shared_address(const void* at) {
  return static_cast<std::uint32_t>(__cvta_generic_to_shared(at));
}
RESNORM_DEVICE std::uint32_t remote_address(const void* at, int rank) {
  std::uint32_t remote;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(shared_address(at)), "r"(rank));
  return remote;
}

RESNORM_DEVICE void init_barrier(TransactionBarrier* barrier) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(barrier)) : "memory");
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
RESNORM_DEVICE void expect_bytes(TransactionBarrier* barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
               : "memory");
}
RESNORM_DEVICE void store_async(float* at, TransactionBarrier* barrier, int rank, const float (&values)[1]) {
  asm volatile(
      "st.async.shared::cluster.mbarrier::complete_tx::bytes.b32 [%0], %1, [%2];" ::"r"(remote_address(at, rank)),
      "r"(float_to_bits(values[0])), "r"(remote_address(barrier, rank))
      : "memory");
}
RESNORM_DEVICE void store_async(float* at, TransactionBarrier* barrier, int rank, const float (&values)[2]) {
  asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v2.b32 [%0], {%1,%2}, [%3];" ::"r"(
                   remote_address(at, rank)),
               "r"(float_to_bits(values[0])), "r"(float_to_bits(values[1])), "r"(remote_address(barrier, rank))
               : "memory");
}
RESNORM_DEVICE void store_async(float* at, TransactionBarrier* barrier, int rank, const float (&values)[4]) {
  asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1,%2,%3,%4}, [%5];" ::"r"(
                   remote_address(at, rank)),
               "r"(float_to_bits(values[0])), "r"(float_to_bits(values[1])), "r"(float_to_bits(values[2])),
               "r"(float_to_bits(values[3])), "r"(remote_address(barrier, rank))
               : "memory");
}
RESNORM_DEVICE void wait_for_bytes(TransactionBarrier* barrier, int parity) {
  asm volatile(
      "{\n"
      ".reg .pred complete;\n"
      "WAIT:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 complete, [%0], %1;\n"
      "@!complete bra WAIT;\n"
      "}" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
}
#else
RESNORM_DEVICE int cluster_rank() { return 0; }
RESNORM_DEVICE int cluster_index() { return block_index(); }
RESNORM_DEVICE int cluster_blocks() { return 1; }
RESNORM_DEVICE void cluster_arrive() {}
RESNORM_DEVICE void cluster_wait() {}
RESNORM_DEVICE void init_barrier(TransactionBarrier*) {}
RESNORM_DEVICE void expect_bytes(TransactionBarrier*, int) {}
template <int kCount>
RESNORM_DEVICE void store_async(float*, TransactionBarrier*, int, const float (&)[kCount]) {}
RESNORM_DEVICE void wait_for_bytes(TransactionBarrier*, int) {}
#endif

}  // namespace resnorm::cuda
#endif

namespace resnorm::cuda {

// The compiler takes the value, a pointer or an int, for another than the one that was computed, so it computes nothing
// from it ahead of this place: addresses take registers.
template <class Value>
RESNORM_DEVICE void hide([[maybe_unused]] Value& value) {
#ifdef __CUDACC__
  if constexpr (sizeof(value) == 8) {
    asm volatile("" : "+l"(value));
  } else {
    asm volatile("" : "+r"(value));
  }
#endif
}

}  // namespace resnorm::cuda
