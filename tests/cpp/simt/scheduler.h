// SPDX-License-Identifier: BSD-3-Clause
// The threads and blocks of the cluster that runs, and who goes on next.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <deque>
#include <memory>
#include <vector>

#include "fiber.h"
#include "operations.h"

namespace resnorm::simt {

inline constexpr int kWarpThreads = 32;
inline constexpr int kMaxBarriers = 16;

enum class State : std::uint8_t { kReady, kInWarp, kAtBarrier, kAtCluster, kForBytes, kLeft };

struct TransactionState;

struct Thread {
  Fiber fiber;
  State state = State::kLeft;
  int index = 0, block = 0, rank = 0;
  int warp = 0;  // in the cluster
  int barrier_id = 0;

  bool awaited_previous_kernel = false;
  bool arrived_at_cluster = false;                 // and has not waited yet
  unsigned cluster_phase = 0;                      // when it arrived
  unsigned cluster_passes = 0;                     // phases of the cluster's barrier that it knows to be over
  const TransactionState* transactions = nullptr;  // what it waits for

  std::vector<Copy> copies;
  std::size_t copies_taken = 0;
  int copy_group = 0;
};

// Two banks, taken in turn: a lane may be in the next operation while another has still to leave this one. It cannot
// get further ahead. Barriers alternate likewise between two tags for ThreadSanitizer: with one, a thread that leaves
// late would acquire what others did after they left.
struct Warp {
  int arrived = 0, live = 0, bank = 0, operation = 0;
  std::uint64_t values[2][kWarpThreads] = {};
  char tags[2] = {};
};

struct Barrier {
  int arrived = 0, threads = 0, bank = 0;
  char tags[2] = {};
};

// What an asynchronous store brings, and where.
struct Store {
  unsigned char* to;
  float values[4] = {};
  int bytes;
};

// What a TransactionBarrier stands for. Its phase ends when all bytes are there and a thread waits for that, no
// earlier: only then does anybody know that the stores have arrived. So the stores in flight are all of one phase.
struct TransactionState {
  unsigned char* at;
  const Thread* initialised_by;
  unsigned cluster_phase;  // who has passed this one of the cluster's barrier knows that it is initialised
  unsigned phase = 0;
  bool expects = false;  // somebody has said how many bytes
  int expected = 0, come = 0;
  std::vector<Store> stores;
  char tags[2] = {};  // as above
};

struct Free {
  void operator()(unsigned char* memory) const { std::free(memory); }
};

struct Block {
  std::unique_ptr<unsigned char, Free> shared;
  Barrier barriers[kMaxBarriers];
  int live = 0;
  std::vector<Warp> warps;
  std::deque<TransactionState> transactions;  // which do not move: their tags are known by their addresses
};

struct Cluster {
  std::vector<Block> blocks;
  int live = 0, arrived = 0;
  unsigned phase = 0;
};

Order current_order();
Cluster& cluster();
Thread& self();
Thread& thread_at(int rank, int index);
inline Block& own_block() { return cluster().blocks[self().rank]; }
inline Warp& own_warp() { return own_block().warps[self().index / kWarpThreads]; }

void make_ready(Thread& thread);
// Lets others go on until somebody makes this thread ready.
void wait_as(State state);
// Lets others go on.
void give_way();
// A number below `limit`, out of those that decide on a random order.
unsigned draw(unsigned limit);

// In operations.cpp: whether the thread may leave now.
void check_leaving(Thread& thread);
// In operations.cpp: whether bytes lie in the block's shared memory.
bool lies_in(const Block& block, const void* at, std::size_t bytes);
// In transactions.cpp: whether the block may leave now, its last thread being this one.
void check_transactions(const Block& block);
// In transactions.cpp: the barrier whose bytes the thread waits for.
void describe_waiting(const Thread& thread, char* text, std::size_t size);

}  // namespace resnorm::simt
