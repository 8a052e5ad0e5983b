// SPDX-License-Identifier: BSD-3-Clause
#include "scheduler.h"

#include <unistd.h>

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstring>

namespace resnorm::simt {

namespace {

constexpr int kMaxBlockThreads = 1024;
constexpr int kMaxClusterBlocks = 8;
constexpr int kMaxSharedBytes = 227 * 1024;  // of an H100
constexpr std::size_t kSharedAlignment = 128;

// The threads that could go on.
class ReadyThreads {
 public:
  void reset(Order order, int warps, int threads) {
    order_ = order;
    ring_.assign(static_cast<std::size_t>(threads), nullptr);
    head_ = tail_ = 0;
    warps_.assign(static_cast<std::size_t>(warps), Lanes{});
    running_warp_ = 0;
    ready_ = 0;
  }

  void seed(std::uint64_t seed) { random_ = seed * 2654435761U + 1; }

  void push(Thread* thread) {
    ++ready_;
    if (order_ == Order::kRandom) {
      Lanes& lanes = warps_[thread->warp];
      lanes.threads[lanes.count++] = thread;
    } else {
      ring_[tail_++ % ring_.size()] = thread;
    }
  }

  // nullptr when there is none.
  Thread* pop() {
    if (ready_ == 0) return nullptr;
    --ready_;
    if (order_ == Order::kForward) return ring_[head_++ % ring_.size()];
    if (order_ == Order::kReverse) return ring_[--tail_ % ring_.size()];
    // Now and then a warp is interrupted all the same, as one is that waits for memory.
    constexpr unsigned kStepsPerWarp = 256;
    if (warps_[running_warp_].count == 0 || draw(kStepsPerWarp) == 0) {
      running_warp_ = draw(static_cast<unsigned>(warps_.size()));
      while (warps_[running_warp_].count == 0) running_warp_ = (running_warp_ + 1) % warps_.size();
    }
    Lanes& lanes = warps_[running_warp_];
    std::swap(lanes.threads[draw(static_cast<unsigned>(lanes.count))], lanes.threads[lanes.count - 1]);
    return lanes.threads[--lanes.count];
  }

  // Knuth's linear congruential generator: its low bits are poor.
  unsigned draw(unsigned limit) {
    random_ = random_ * 6364136223846793005U + 1442695040888963407U;
    return static_cast<unsigned>((random_ >> 33) % limit);
  }

 private:
  struct Lanes {
    Thread* threads[kWarpThreads];
    int count = 0;
  };

  Order order_ = Order::kForward;
  std::vector<Thread*> ring_;
  std::size_t head_ = 0, tail_ = 0;
  std::vector<Lanes> warps_;
  std::size_t running_warp_ = 0;
  int ready_ = 0;
  std::uint64_t random_ = 0;
};

struct {
  Launch launch;
  const std::function<void()>* body = nullptr;
  Schedule schedule;
  Cluster cluster;
  Thread* current = nullptr;  // nullptr: the caller of launch()
  Fiber caller;
  char tag = 0;
} running;

std::vector<std::unique_ptr<Thread>> threads;  // kept from launch to launch, because of their stacks
ReadyThreads ready_threads;
Counters all_counters;
Schedule chosen_schedule;

[[noreturn]] void fail_deadlock() {
  int in_warp = 0, at_barrier = 0, at_cluster = 0, for_bytes = 0;
  const Thread* waits_for_bytes = nullptr;
  for (const auto& thread : threads) {
    in_warp += thread->state == State::kInWarp;
    at_barrier += thread->state == State::kAtBarrier;
    at_cluster += thread->state == State::kAtCluster;
    if (thread->state != State::kForBytes) continue;
    ++for_bytes;
    if (waits_for_bytes == nullptr) waits_for_bytes = thread.get();
  }
  char bytes[160] = "";
  if (waits_for_bytes != nullptr) describe_waiting(*waits_for_bytes, bytes, sizeof bytes);
  fail(
      "deadlock: of %d threads that have not left, %d wait in a warp operation, %d at a barrier, %d at the cluster's, "
      "%d for bytes%s",
      running.cluster.live, in_warp, at_barrier, at_cluster, for_bytes, bytes);
}

void go_on() {
  Thread* const from = running.current;
  Thread* const to = ready_threads.pop();
  if (to == from) return;
  if (to == nullptr && running.cluster.live > 0) fail_deadlock();
  running.current = to;
  Fiber& target = to == nullptr ? running.caller : to->fiber;
  if (from->state == State::kLeft) {
    leave_fiber(from->fiber, target);
  } else {
    switch_fiber(from->fiber, target);
  }
}

// noexcept: there is nothing above it that an exception could unwind.
void run_thread() noexcept {
  entered();
  (*running.body)();
  Thread& thread = self();
  check_leaving(thread);
  --own_warp().live;
  --own_block().live;
  --running.cluster.live;
  thread.state = State::kLeft;
  release(&running.tag);
  go_on();
  __builtin_unreachable();
}

Block make_block(const Launch& launch) {
  Block block;
  void* shared = nullptr;
  const auto bytes = static_cast<std::size_t>(std::max(launch.shared_bytes, 1));
  if (posix_memalign(&shared, kSharedAlignment, bytes) != 0) fail("no shared memory");
  std::memset(shared, 0xFF, bytes);
  block.shared.reset(static_cast<unsigned char*>(shared));
  block.live = launch.block;
  block.warps.resize(static_cast<std::size_t>((launch.block + kWarpThreads - 1) / kWarpThreads));
  for (int i = 0; i < launch.block; ++i) ++block.warps[i / kWarpThreads].live;
  return block;
}

void run_cluster(int first_block) {
  const Launch& launch = running.launch;
  const int count = launch.block * launch.cluster;
  running.cluster = Cluster{};
  running.cluster.live = count;
  for (int rank = 0; rank < launch.cluster; ++rank) running.cluster.blocks.push_back(make_block(launch));
  const int warps = static_cast<int>(running.cluster.blocks[0].warps.size());
  ready_threads.reset(running.schedule.order, warps * launch.cluster, count);
  release(&running.tag);
  for (int i = 0; i < count; ++i) {
    Thread& thread = *threads[i];
    Thread fresh;
    fresh.fiber = thread.fiber;
    fresh.rank = i / launch.block;
    fresh.index = i % launch.block;
    fresh.block = first_block + fresh.rank;
    fresh.warp = fresh.rank * warps + fresh.index / kWarpThreads;
    thread = std::move(fresh);
    prepare(thread.fiber, run_thread);
    acquire_for(thread.fiber, &running.tag);
    make_ready(thread);
  }
  running.current = ready_threads.pop();
  switch_fiber(running.caller, running.current->fiber);
  acquire(&running.tag);
}

const char* name_of(Order order) {
  return order == Order::kForward ? "forward" : order == Order::kReverse ? "reverse" : "random";
}

}  // namespace

const Launch& current_launch() { return running.launch; }
Order current_order() { return running.schedule.order; }
Cluster& cluster() { return running.cluster; }
Counters& counters() { return all_counters; }
Schedule& schedule() { return chosen_schedule; }

Thread& self() {
  if (running.current == nullptr) fail("a kernel's function is called outside of a launch");
  return *running.current;
}

Thread& thread_at(int rank, int index) { return *threads[rank * running.launch.block + index]; }

void make_ready(Thread& thread) {
  thread.state = State::kReady;
  ready_threads.push(&thread);
}

void wait_as(State state) {
  self().state = state;
  go_on();
}

void give_way() {
  make_ready(self());
  go_on();
}

unsigned draw(unsigned limit) { return ready_threads.draw(limit); }

void fail(const char* format, ...) {
  std::fflush(stdout);
  std::fputs("SIMT: ", stderr);
  va_list arguments;
  va_start(arguments, format);
  std::vfprintf(stderr, format, arguments);
  va_end(arguments);
  if (const Thread* thread = running.current) {
    std::fprintf(stderr, " (thread %d of block %d, %s order, seed %llu)", thread->index, thread->block,
                 name_of(running.schedule.order), static_cast<unsigned long long>(running.schedule.seed));
  }
  std::fputc('\n', stderr);
  _exit(kFailureStatus);
}

void launch(const Launch& launch, const std::function<void()>& body, const Schedule& schedule) {
  if (running.current != nullptr) fail("a launch inside a kernel");
  if (launch.block < 1 || launch.block > kMaxBlockThreads) fail("a block of %d threads", launch.block);
  if (launch.shared_bytes < 0 || launch.shared_bytes > kMaxSharedBytes) {
    fail("%d bytes of shared memory", launch.shared_bytes);
  }
  if (launch.cluster < 1 || launch.cluster > kMaxClusterBlocks) fail("a cluster of %d blocks", launch.cluster);
  if (launch.grid < 1 || launch.grid % launch.cluster != 0) {
    fail("a grid of %d blocks in clusters of %d", launch.grid, launch.cluster);
  }
  running.launch = launch;
  running.body = &body;
  running.schedule = schedule;
  ready_threads.seed(schedule.seed);
  adopt_caller(running.caller);
  while (threads.size() < static_cast<std::size_t>(launch.block) * launch.cluster) {
    threads.push_back(std::make_unique<Thread>());
    allocate(threads.back()->fiber);
  }
  const int clusters = launch.grid / launch.cluster, count = std::min(schedule.last_clusters, clusters);
  for (int i = 0; i < count; ++i) {
    run_cluster((schedule.order == Order::kReverse ? clusters - 1 - i : clusters - count + i) * launch.cluster);
  }
  running.cluster = Cluster{};
}

}  // namespace resnorm::simt
