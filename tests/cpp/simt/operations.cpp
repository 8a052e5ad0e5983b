// SPDX-License-Identifier: BSD-3-Clause
#include "operations.h"

#include <cstdio>

#include "scheduler.h"

namespace resnorm::simt {

namespace {

bool is_shared(const void* at) {
  for (const Block& block : cluster().blocks) {
    if (lies_in(block, at, 1)) return true;
  }
  return false;
}

const char* name_of(Access access) {
  switch (access) {
    case Access::kLoadStaged:
      return "load from shared memory";
    case Access::kStore:
      return "store";
    case Access::kStoreStaged:
      return "store to shared memory";
    case Access::kCopyFrom:
      return "asynchronous copy from global memory";
    case Access::kCopyTo:
      return "asynchronous copy to shared memory";
    default:
      return "load from global memory";
  }
}

void check_previous_kernel(const char* what) {
  if (!current_launch().overlaps || self().awaited_previous_kernel) return;
  fail("%s: the kernel before it, which it overlaps, was not awaited", what);
}

// Operations of a warp: 0 is the barrier.
int shuffle_code(int distance, int bytes) { return bytes * kWarpThreads + distance; }

void describe(int operation, char* text, std::size_t size) {
  if (operation == 0) {
    std::snprintf(text, size, "a barrier of the warp");
  } else {
    std::snprintf(text, size, "a shuffle of %d bytes at distance %d", operation / kWarpThreads,
                  operation % kWarpThreads);
  }
}

// Returns, once all lanes have called it, the bank that they wrote to.
int meet_lanes(int operation, std::uint64_t value) {
  Warp& warp = own_warp();
  const Thread& thread = self();
  const int lane = thread.index % kWarpThreads, bank = warp.bank;
  if (warp.live != kWarpThreads) fail("a warp operation, where the warp has %d threads left of 32", warp.live);
  if (warp.arrived != 0 && warp.operation != operation) {
    char theirs[64], ours[64];
    describe(warp.operation, theirs, sizeof theirs);
    describe(operation, ours, sizeof ours);
    fail("divergent warp: %s here, and %s in other lanes", ours, theirs);
  }
  warp.operation = operation;
  warp.values[bank][lane] = value;
  if (++warp.arrived < kWarpThreads) {
    wait_as(State::kInWarp);
  } else {
    warp.arrived = 0;
    warp.bank = 1 - bank;
    for (int other = 0; other < kWarpThreads; ++other) {
      if (other != lane) make_ready(thread_at(thread.rank, thread.index - lane + other));
    }
  }
  return bank;
}

// bar.sync is for whole warps: what it does where lanes of one call it apart from the others is undefined.
void check_whole_warps(int rank, int id) {
  const int block_threads = current_launch().block;
  for (int first = 0; first < block_threads; first += kWarpThreads) {
    int waiting = 0;
    for (int i = first; i < first + kWarpThreads && i < block_threads; ++i) {
      const Thread& thread = thread_at(rank, i);
      waiting += &thread == &self() || (thread.state == State::kAtBarrier && thread.barrier_id == id);
    }
    if (waiting != 0 && waiting != kWarpThreads) {
      fail("divergent warp: %d lanes of the warp of thread %d have come to barrier %d", waiting, first, id);
    }
  }
}

}  // namespace

bool lies_in(const Block& block, const void* at, std::size_t bytes) {
  const auto begin = reinterpret_cast<std::uintptr_t>(block.shared.get());
  const auto first = reinterpret_cast<std::uintptr_t>(at);
  return first >= begin && first + bytes <= begin + static_cast<std::size_t>(current_launch().shared_bytes);
}

Position position() {
  const Thread& thread = self();
  return {thread.index, thread.block, thread.rank};
}

unsigned char* shared_memory() { return own_block().shared.get(); }

void note_access(Access access, const void* at, std::size_t bytes, std::size_t alignment) {
  const char* const name = name_of(access);
  if (reinterpret_cast<std::uintptr_t>(at) % alignment != 0) {
    fail("misaligned %s: %p is no multiple of %zu bytes", name, at, alignment);
  }
  const bool to_shared = access == Access::kLoadStaged || access == Access::kStoreStaged || access == Access::kCopyTo;
  if (to_shared && !lies_in(own_block(), at, bytes)) fail("%s: %p is outside of it", name, at);
  const bool shared = is_shared(at);
  if (!to_shared && shared && access != Access::kStore) fail("%s: %p is in shared memory", name, at);
  if (access == Access::kStore || access == Access::kStoreStaged || access == Access::kCopyTo) {
    announce_write(at, bytes);
  } else {
    announce_read(at, bytes);
  }
  if (!shared) check_previous_kernel(name);
  if (shared || access == Access::kCopyFrom) return;
  Counters& all = counters();
  (access == Access::kLoadOnce   ? all.loaded_once
   : access == Access::kLoadKept ? all.loaded_kept
                                 : all.stored) += static_cast<std::int64_t>(bytes);
  all.narrow_accesses += bytes < 16;
}

std::uint64_t exchange(std::uint64_t bits, int distance, int bytes) {
  if (distance < 1 || distance >= kWarpThreads) fail("a shuffle at distance %d", distance);
  ++counters().shuffles;
  const int bank = meet_lanes(shuffle_code(distance, bytes), bits);
  return own_warp().values[bank][(self().index % kWarpThreads) ^ distance];
}

void meet_warp() {
  Warp& warp = own_warp();
  release(&warp.tags[warp.bank]);
  acquire(&warp.tags[meet_lanes(0, 0)]);
}

void meet_barrier(int id, int threads) {
  Thread& thread = self();
  const int block_threads = current_launch().block;
  if (id < 0 || id >= kMaxBarriers) fail("barrier %d: there are 16", id);
  if (threads < kWarpThreads || threads % kWarpThreads != 0 || threads > block_threads) {
    fail("barrier %d for %d threads of %d", id, threads, block_threads);
  }
  Barrier& barrier = own_block().barriers[id];
  if (barrier.arrived != 0 && barrier.threads != threads) {
    fail("barrier %d for %d threads here, and for %d elsewhere", id, threads, barrier.threads);
  }
  ++counters().barriers;
  const int bank = barrier.bank;
  release(&barrier.tags[bank]);
  barrier.threads = threads;
  thread.barrier_id = id;
  if (++barrier.arrived < threads) {
    wait_as(State::kAtBarrier);
  } else {
    check_whole_warps(thread.rank, id);
    barrier.arrived = 0;
    barrier.bank = 1 - bank;
    for (int i = 0; i < block_threads; ++i) {
      Thread& other = thread_at(thread.rank, i);
      if (other.state == State::kAtBarrier && other.barrier_id == id) make_ready(other);
    }
    if (current_order() != Order::kForward) give_way();  // the last to come need not be the first to go
  }
  acquire(&barrier.tags[bank]);
}

void await_previous_kernel() { self().awaited_previous_kernel = true; }

void arrive_at_cluster() {
  Thread& thread = self();
  Cluster& all = cluster();
  if (thread.arrived_at_cluster) fail("arrived at the cluster's barrier twice");
  ++counters().cluster_barriers;
  thread.arrived_at_cluster = true;
  thread.cluster_phase = all.phase;
  if (++all.arrived < current_launch().block * current_launch().cluster) return;
  all.arrived = 0;
  ++all.phase;
  for (int rank = 0; rank < current_launch().cluster; ++rank) {
    for (int i = 0; i < current_launch().block; ++i) {
      Thread& other = thread_at(rank, i);
      if (other.state == State::kAtCluster) make_ready(other);
    }
  }
}

void wait_for_cluster() {
  Thread& thread = self();
  if (!thread.arrived_at_cluster) fail("waits at the cluster's barrier without having arrived");
  if (thread.cluster_phase == cluster().phase) {
    wait_as(State::kAtCluster);
  } else if (current_order() != Order::kForward) {
    give_way();
  }
  thread.arrived_at_cluster = false;
  thread.cluster_passes = thread.cluster_phase + 1;
}

void begin_copy(void* to, const void* from) {
  Thread& thread = self();
  if (reinterpret_cast<std::uintptr_t>(from) % 16 != 0) {
    fail("misaligned %s: %p is no multiple of 16 bytes", name_of(Access::kCopyFrom), from);
  }
  check_previous_kernel(name_of(Access::kCopyFrom));
  counters().copied_asynchronously += 16;
  thread.copies.push_back({to, from, thread.copy_group});
}

void commit_copies() { ++self().copy_group; }

bool take_copy(int pending, Copy& copy) {
  Thread& thread = self();
  if (thread.copies_taken == thread.copies.size()) {
    thread.copies.clear();
    thread.copies_taken = 0;
    return false;
  }
  copy = thread.copies[thread.copies_taken];
  if (copy.group >= thread.copy_group - pending) return false;
  ++thread.copies_taken;
  return true;
}

void check_leaving(Thread& thread) {
  check_previous_kernel("left");
  if (own_warp().arrived != 0) fail("left while other lanes of the warp wait in a warp operation");
  if (thread.copies_taken != thread.copies.size()) fail("left with an asynchronous copy in flight");
  if (own_block().live == 1) check_transactions(own_block());
}

}  // namespace resnorm::simt
