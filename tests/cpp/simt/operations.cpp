// SPDX-License-Identifier: BSD-3-Clause
#include "operations.h"

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <utility>

#include "scheduler.h"

namespace resnorm::simt {

namespace {

bool lies_in(const Block& block, const void* at, std::size_t bytes) {
  const auto begin = reinterpret_cast<std::uintptr_t>(block.shared.get());
  const auto first = reinterpret_cast<std::uintptr_t>(at);
  return first >= begin && first + bytes <= begin + static_cast<std::size_t>(current_launch().shared_bytes);
}

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

// What TransactionBarriers hold: NaN, for who reads it as numbers.
constexpr std::uint64_t kBarrierBits = 0x7FBA11ED'7FBA11EDU;
constexpr int kMaxPhaseBytes = (1 << 20) - 1;

void check_place(const char* what, const void* at, std::size_t bytes, std::size_t alignment) {
  if (reinterpret_cast<std::uintptr_t>(at) % alignment != 0) {
    fail("misaligned %s: %p is no multiple of %zu bytes", what, at, alignment);
  }
  if (!lies_in(own_block(), at, bytes)) fail("%s: %p is outside of shared memory", what, at);
}

int byte_of(int rank, const unsigned char* at) { return static_cast<int>(at - cluster().blocks[rank].shared.get()); }

// Where `at`, of the shared memory of this block, lies in that of another one.
unsigned char* place_in(int rank, void* at) {
  return cluster().blocks[rank].shared.get() + byte_of(self().rank, static_cast<unsigned char*>(at));
}

TransactionState* find_transactions(Block& block, const unsigned char* at) {
  for (TransactionState& state : block.transactions) {
    if (state.at == at) return &state;
  }
  return nullptr;
}

void check_untouched(int rank, const TransactionState& state) {
  std::uint64_t bits;
  std::memcpy(&bits, state.at, sizeof bits);
  if (bits == kBarrierBits) return;
  fail("the barrier at byte %d of block %d of the cluster was overwritten", byte_of(rank, state.at), rank);
}

// The barrier at the same place in block `rank`, which this thread must know to be there.
TransactionState& transactions_at(int rank, void* barrier) {
  const Thread& thread = self();
  check_place("barrier", barrier, sizeof kBarrierBits, sizeof kBarrierBits);
  TransactionState* const state = find_transactions(cluster().blocks[rank], place_in(rank, barrier));
  const int byte = byte_of(thread.rank, static_cast<unsigned char*>(barrier));
  if (state == nullptr) fail("the barrier at byte %d of block %d of the cluster is not initialised", byte, rank);
  if (state->initialised_by != &thread && thread.cluster_passes <= state->cluster_phase) {
    fail(
        "the barrier at byte %d of block %d of the cluster may not be initialised yet: no barrier of the cluster since",
        byte, rank);
  }
  check_untouched(rank, *state);
  return *state;
}

bool has_come(const TransactionState& state) { return state.expects && state.come == state.expected; }

void wake_waiters(int rank, const TransactionState& state) {
  if (!has_come(state)) return;
  for (int i = 0; i < current_launch().block; ++i) {
    Thread& other = thread_at(rank, i);
    if (other.state == State::kForBytes && other.transactions == &state) make_ready(other);
  }
}

void leave_nan(const Store& store) { std::memset(store.to, 0xFF, static_cast<std::size_t>(store.bytes)); }
void arrive(const Store& store) { std::memcpy(store.to, store.values, static_cast<std::size_t>(store.bytes)); }

void end_phase(Block& block, TransactionState& state) {
  const Unwatched unwatched;
  auto& stores = state.stores;
  if (current_order() == Order::kReverse) std::reverse(stores.begin(), stores.end());
  if (current_order() == Order::kRandom) {
    for (std::size_t i = stores.size(); i > 1; --i) std::swap(stores[i - 1], stores[draw(static_cast<unsigned>(i))]);
  }
  for (const Store& store : stores) arrive(store);
  stores.clear();
  ++state.phase;
  state.expects = false;
  state.expected = state.come = 0;
  // Those of other barriers are still under way, and may be on their way into the same place.
  for (const TransactionState& other : block.transactions) {
    for (const Store& store : other.stores) leave_nan(store);
  }
}

}  // namespace

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

void init_barrier(void* barrier) {
  Thread& thread = self();
  check_place("barrier", barrier, sizeof kBarrierBits, sizeof kBarrierBits);
  auto* const at = static_cast<unsigned char*>(barrier);
  if (find_transactions(own_block(), at) != nullptr) {
    fail("the barrier at byte %d is initialised twice", byte_of(thread.rank, at));
  }
  announce_write(at, sizeof kBarrierBits);
  std::memcpy(at, &kBarrierBits, sizeof kBarrierBits);
  forbid(at, sizeof kBarrierBits);
  const Unwatched unwatched;
  TransactionState& state = own_block().transactions.emplace_back();
  state.at = at;
  state.initialised_by = &thread;
  state.cluster_phase = thread.arrived_at_cluster ? thread.cluster_phase + 1 : cluster().phase;  // of its next arrival
}

void expect_bytes(void* barrier, int bytes) {
  Thread& thread = self();
  TransactionState& state = transactions_at(thread.rank, barrier);
  if (bytes < 0 || bytes > kMaxPhaseBytes) fail("%d bytes are expected in a phase", bytes);
  if (state.expects) fail("bytes are expected twice in phase %u, whose end nobody has seen", state.phase);
  if (state.come > bytes) fail("%d bytes have come in phase %u, which expects %d", state.come, state.phase, bytes);
  release(&state.tags[state.phase % 2]);
  state.expects = true;
  state.expected = bytes;
  wake_waiters(thread.rank, state);
}

void store_async(float* at, void* barrier, int rank, const float* values, int count) {
  const Thread& thread = self();
  const int bytes = count * static_cast<int>(sizeof *values);
  if (rank < 0 || rank >= current_launch().cluster) fail("block %d of a cluster of %d", rank, current_launch().cluster);
  check_place("asynchronous store", at, static_cast<std::size_t>(bytes), static_cast<std::size_t>(bytes));
  if (rank != thread.rank && thread.cluster_passes == 0) {
    fail("asynchronous store to block %d of the cluster, which may not have started", rank);
  }
  Block& block = cluster().blocks[rank];
  if (block.live == 0) fail("asynchronous store to block %d of the cluster, which has left", rank);
  TransactionState& state = transactions_at(rank, barrier);
  Store store = {.to = place_in(rank, at), .bytes = bytes};
  std::memcpy(store.values, values, static_cast<std::size_t>(bytes));
  for (const TransactionState& other : block.transactions) {
    const auto distance = other.at - store.to;
    if (distance < bytes && distance > -static_cast<int>(sizeof kBarrierBits)) {
      fail("asynchronous store over the barrier at byte %d", byte_of(rank, other.at));
    }
  }
  if (state.expects && state.come + bytes > state.expected) {
    fail("%d bytes have come in phase %u, which expects %d and whose end nobody has seen", state.come + bytes,
         state.phase, state.expected);
  }
  ++counters().asynchronous_stores;
  announce_write(store.to, static_cast<std::size_t>(bytes));
  release(&state.tags[state.phase % 2]);
  const Unwatched unwatched;
  leave_nan(store);
  state.stores.push_back(store);
  state.come += bytes;
  wake_waiters(rank, state);
}

void wait_for_bytes(void* barrier, int parity) {
  Thread& thread = self();
  TransactionState& state = transactions_at(thread.rank, barrier);
  if (parity != 0 && parity != 1) fail("a phase of parity %d", parity);
  const auto is_parity_of_phase = [&] { return static_cast<int>(state.phase % 2) == parity; };
  // Again after it was woken: who is so late that the next phase is over as well waits for the one after that.
  while (is_parity_of_phase() && !has_come(state)) {
    thread.transactions = &state;
    wait_as(State::kForBytes);
  }
  if (is_parity_of_phase()) {
    end_phase(own_block(), state);
  } else if (has_come(state)) {
    fail("waits for parity %d, while phase %u may be over at any time: it goes on or not, as it happens", parity,
         state.phase);
  }
  acquire(&state.tags[(state.phase + 1) % 2]);  // of the phase before
  if (current_order() != Order::kForward) give_way();
}

void begin_copy(void* to, const void* from) {
  Thread& thread = self();
  if (reinterpret_cast<std::uintptr_t>(from) % 16 != 0) {
    fail("misaligned %s: %p is no multiple of 16 bytes", name_of(Access::kCopyFrom), from);
  }
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
  if (own_warp().arrived != 0) fail("left while other lanes of the warp wait in a warp operation");
  if (thread.copies_taken != thread.copies.size()) fail("left with an asynchronous copy in flight");
  if (own_block().live > 1) return;
  for (const TransactionState& state : own_block().transactions) {
    check_untouched(thread.rank, state);
    if (!state.stores.empty()) {
      fail(
          "the block has left with asynchronous stores to it in flight: nobody has waited for %d bytes at the barrier "
          "at byte %d",
          state.come, byte_of(thread.rank, state.at));
    }
  }
}

void describe_waiting(const Thread& thread, char* text, std::size_t size) {
  const TransactionState& state = *thread.transactions;
  const int length =
      std::snprintf(text, size, "; the barrier at byte %d of block %d is in phase %u, where %d bytes have come",
                    byte_of(thread.rank, state.at), thread.block, state.phase, state.come);
  if (length < 0 || static_cast<std::size_t>(length) >= size) return;
  if (state.expects) {
    std::snprintf(text + length, size - static_cast<std::size_t>(length), " of %d", state.expected);
  } else {
    std::snprintf(text + length, size - static_cast<std::size_t>(length), " and none are expected yet");
  }
}

}  // namespace resnorm::simt
