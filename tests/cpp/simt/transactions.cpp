// SPDX-License-Identifier: BSD-3-Clause
// Asynchronous stores between the blocks of a cluster, and the TransactionBarriers that count them.
#include <algorithm>
#include <cstdio>
#include <cstring>
#include <utility>

#include "operations.h"
#include "scheduler.h"

namespace resnorm::simt {

namespace {

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

void check_transactions(const Block& block) {
  for (const TransactionState& state : block.transactions) {
    check_untouched(self().rank, state);
    if (!state.stores.empty()) {
      fail(
          "the block has left with asynchronous stores to it in flight: nobody has waited for %d bytes at the barrier "
          "at byte %d",
          state.come, byte_of(self().rank, state.at));
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
