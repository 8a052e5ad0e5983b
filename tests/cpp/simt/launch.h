// SPDX-License-Identifier: BSD-3-Clause
// Runs a CUDA kernel on the CPU, one fiber per CUDA thread: what the tests of the kernels call. The kernels themselves
// see simt.h only.
//
// All blocks of a cluster are alive together; clusters run one after another, from start to end.
#pragma once

#include <cstdint>
#include <functional>
#include <limits>

namespace resnorm::simt {

// `grid` counts blocks, not clusters.
struct Launch {
  int grid = 1, cluster = 1, block = 1, shared_bytes = 0;
  bool overlaps = false;  // the kernel before it, until a thread awaits that
};

// Which thread goes on when one has to wait.
enum class Order {
  kForward,  // first come, first served: warps proceed in lockstep
  kReverse,  // last come, first served, and clusters from the last to the first
  // One warp runs until it can go no further, then another one, picked at random. Only so does a warp get ahead of the
  // others by a whole interval between barriers; picking single threads at random would keep the warps in lockstep.
  kRandom,
};

// What launches have done since the counters were last reset. Bytes of global memory and 16-byte copies ...
struct Counters {
  std::int64_t loaded_once = 0, loaded_kept = 0, stored = 0, copied_asynchronously = 0;
  std::int64_t narrow_accesses = 0;  // loads and stores of global memory that moved less than 16 bytes
  // ... and calls, one per thread.
  std::int64_t shuffles = 0, barriers = 0, cluster_barriers = 0, asynchronous_stores = 0;
};

// To be assigned to as well: counters() = {} resets them.
Counters& counters();

struct Schedule {
  Order order = Order::kForward;
  std::uint64_t seed = 0;
  // How many clusters of each grid run, the last ones: so the end of a grid is reached that would take days in whole.
  int last_clusters = std::numeric_limits<int>::max();
};

// The schedule of launches that the code under test makes. Tests assign to it.
Schedule& schedule();

// Runs `body` once per thread. Returns when all have left; a fault that the emulation sees ends the process. Only one
// thread of the host may launch.
void launch(const Launch& launch, const std::function<void()>& body, const Schedule& schedule = simt::schedule());

// Writes "SIMT: ", the message and where it happened to the standard error and ends the process at once with
// kFailureStatus: there is no way to unwind the other fibers. Tests expect it with EXPECT_EXIT or EXPECT_DEATH.
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

inline constexpr int kFailureStatus = 3;

}  // namespace resnorm::simt
