// SPDX-License-Identifier: BSD-3-Clause
// What the inline functions of simt.h ask the scheduler to do. Those are compiled with the kernels, and instrumented
// with them by the sanitizers; these are not, so that their own bookkeeping is neither checked nor an ordering.
#pragma once

#include <cstddef>
#include <cstdint>

#include "launch.h"

namespace resnorm::simt {

struct Position {
  int thread, block, rank;
};
Position position();
const Launch& current_launch();

unsigned char* shared_memory();

enum class Access { kLoadOnce, kLoadKept, kLoadStaged, kStore, kStoreStaged, kCopyFrom, kCopyTo };

// Fails where the device would fault, counts the bytes, and tells ThreadSanitizer of the access.
void note_access(Access access, const void* at, std::size_t bytes, std::size_t alignment);

// The value of the lane whose number differs in the bits of `distance`. `bytes` tells one type from another.
std::uint64_t exchange(std::uint64_t bits, int distance, int bytes);
void meet_warp();
void meet_barrier(int id, int threads);

void await_previous_kernel();

void arrive_at_cluster();
void wait_for_cluster();

// A TransactionBarrier is known by its place in shared memory.
void init_barrier(void* barrier);
void expect_bytes(void* barrier, int bytes);
// `count` values, which leave NaN in block `rank` until its barrier's phase ends.
void store_async(float* at, void* barrier, int rank, const float* values, int count);
void wait_for_bytes(void* barrier, int parity);

// The asynchronous copies of one thread, which are made when it waits for them and no earlier.
struct Copy {
  void* to;
  const void* from;
  int group;
};
void begin_copy(void* to, const void* from);
void commit_copies();
// False when none but the last `pending` groups and what is not committed is left.
bool take_copy(int pending, Copy& copy);

}  // namespace resnorm::simt
