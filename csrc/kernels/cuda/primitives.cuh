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

// For `threads` threads, a multiple of 32; id 0 is __syncthreads's, 1 to 15 are free.
RESNORM_DEVICE void barrier(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

RESNORM_DEVICE float reciprocal_sqrt(float x) { return 1.0F / sqrtf(x); }
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

// What every row reads: weights.
template <class Words>
RESNORM_DEVICE Words load_kept(const void* from) {
  if constexpr (sizeof(Words) < 16) {
    return *static_cast<const Words*>(from);
  } else {
    Words words;
#pragma unroll
    for (int i = 0; i < static_cast<int>(sizeof(Words) / 16); ++i) {
      const uint4 quad = __ldg(static_cast<const uint4*>(from) + i);
      words.word[4 * i] = quad.x;
      words.word[4 * i + 1] = quad.y;
      words.word[4 * i + 2] = quad.z;
      words.word[4 * i + 3] = quad.w;
    }
    return words;
  }
}

template <class Words>
RESNORM_DEVICE void store(void* to, const Words& words) {
  if constexpr (sizeof(Words) < 16) {
    *static_cast<Words*>(to) = words;
  } else {
#pragma unroll
    for (int i = 0; i < static_cast<int>(sizeof(Words) / 16); ++i) {
      static_cast<uint4*>(to)[i] =
          make_uint4(words.word[4 * i], words.word[4 * i + 1], words.word[4 * i + 2], words.word[4 * i + 3]);
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
RESNORM_DEVICE void cluster_arrive() { asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory"); }
RESNORM_DEVICE void cluster_wait() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }

// `at` is this block's; `value` goes to the same place in block `rank` of the cluster.
RESNORM_DEVICE void store_remote(float* at, int rank, float value) {
  std::uint32_t remote;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;"
               : "=r"(remote)
               : "r"(static_cast<std::uint32_t>(__cvta_generic_to_shared(at))), "r"(rank));
  asm volatile("st.shared::cluster.f32 [%0], %1;" ::"r"(remote), "f"(value) : "memory");
}
#else
RESNORM_DEVICE int cluster_rank() { return 0; }
RESNORM_DEVICE int cluster_blocks() { return 1; }
RESNORM_DEVICE void cluster_arrive() {}
RESNORM_DEVICE void cluster_wait() {}
RESNORM_DEVICE void store_remote(float*, int, float) {}
#endif

}  // namespace resnorm::cuda
#endif
