// SPDX-License-Identifier: BSD-3-Clause
// The emulation itself: small kernels that are right pass in every order, and small kernels with the classic faults are
// reported. What only a sanitizer sees is checked where the tests are built with it.
#include "simt.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <numeric>
#include <ostream>
#include <string>
#include <vector>

#include "buffer.h"

namespace resnorm::simt {
namespace {

using ::testing::ExitedWithCode;

struct NamedSchedule {
  const char* name;
  Order order;
  std::uint64_t seed;
};

void PrintTo(const NamedSchedule& schedule, std::ostream* out) { *out << schedule.name; }

constexpr NamedSchedule kSchedules[] = {
    {"forward", Order::kForward, 0},
    {"reverse", Order::kReverse, 0},
    {"random1", Order::kRandom, 1},
    {"random2", Order::kRandom, 2},
};

struct alignas(16) Words4 {
  std::uint32_t words[4];
};

float float_at(const Words4& words, int i) { return cuda::bits_to_float(words.words[i]); }
int lane() { return cuda::thread_index() % 32; }
int warp() { return cuda::thread_index() / 32; }
float* shared_floats() { return reinterpret_cast<float*>(cuda::shared_memory()); }

template <class T>
T warp_sum(T value) {
  for (int distance = 16; distance > 0; distance /= 2) value += cuda::shuffle_xor(value, distance);
  return value;
}

Buffer<float> consecutive(std::size_t size, std::size_t offset = 0) {
  Buffer<float> buffer(size, offset);
  std::iota(buffer.begin(), buffer.end(), 1.0f);
  return buffer;
}

class Simt : public ::testing::TestWithParam<NamedSchedule> {
 protected:
  void run(const Launch& configuration, const std::function<void()>& kernel) {
    launch(configuration, kernel, GetParam().order, GetParam().seed);
  }

  // The process ends with a message in which `pattern` is found.
  void expect_fault(const Launch& configuration, const char* pattern, const std::function<void()>& kernel) {
    EXPECT_EXIT(run(configuration, kernel), ExitedWithCode(kFailureStatus), pattern);
  }
};

INSTANTIATE_TEST_SUITE_P(Orders, Simt, ::testing::ValuesIn(kSchedules),
                         [](const auto& info) { return std::string(info.param.name); });

// ---- What is right

TEST_P(Simt, EveryThreadRunsOnceAndKnowsItsPlace) {
  constexpr int kGrid = 6, kCluster = 2, kBlock = 48;
  std::vector<int> runs(kGrid * kBlock), blocks(kGrid * kBlock), ranks(kGrid * kBlock);
  run({kGrid, kCluster, kBlock, 0}, [&] {
    const int i = cuda::block_index() * cuda::block_threads() + cuda::thread_index();
    runs[i] += 1;
    blocks[i] = cuda::grid_blocks();
    ranks[i] = cuda::cluster_rank() + 10 * cuda::cluster_blocks();
  });
  for (int i = 0; i < kGrid * kBlock; ++i) {
    EXPECT_EQ(runs[i], 1);
    EXPECT_EQ(blocks[i], kGrid);
    EXPECT_EQ(ranks[i], i / kBlock % kCluster + 10 * kCluster);
  }
}

TEST_P(Simt, ShufflesSumOverEachWarp) {
  std::vector<float> sums(96);
  std::vector<double> wide_sums(96);
  run({1, 1, 96, 0}, [&] {
    const int i = cuda::thread_index();
    sums[i] = warp_sum(static_cast<float>(i));
    wide_sums[i] = warp_sum(i + 0x1p-40);
  });
  for (int i = 0; i < 96; ++i) {
    const int sum = 32 * (i / 32 * 32) + 496;
    EXPECT_EQ(sums[i], static_cast<float>(sum));
    EXPECT_EQ(wide_sums[i], sum + 0x1p-35);
  }
}

TEST_P(Simt, ShuffleMovesBitsAsTheyAre) {
  std::vector<std::uint32_t> bits(32);
  run({1, 1, 32, 0}, [&] {
    const auto mine = 0x7F800001U + static_cast<std::uint32_t>(lane());
    bits[lane()] = cuda::float_to_bits(cuda::shuffle_xor(cuda::bits_to_float(mine), 5));
  });
  for (std::uint32_t i = 0; i < 32; ++i) EXPECT_EQ(bits[i], 0x7F800001U + (i ^ 5));
}

// A sum over a block: one slot per warp, and a barrier before the slots are read.
TEST_P(Simt, BarrierOverTheBlock) {
  std::vector<float> sums(2 * 256);
  run({2, 1, 256, 8 * sizeof(float)}, [&] {
    const float sum = warp_sum(1.0f + static_cast<float>(warp()));
    if (lane() == 0) shared_floats()[warp()] = sum;
    cuda::barrier(0, 256);
    sums[cuda::block_index() * 256 + cuda::thread_index()] = warp_sum(lane() < 8 ? shared_floats()[lane()] : 0.0f);
  });
  for (const float sum : sums) EXPECT_EQ(sum, 32.0f * 36.0f);
}

// Two groups of two warps each, which pass their own barrier a different number of times.
TEST_P(Simt, NamedBarriersOverPartsOfABlock) {
  std::vector<float> results(128);
  run({1, 1, 128, 2 * sizeof(float)}, [&] {
    const int i = cuda::thread_index(), group = i / 64;
    for (int round = 0; round < 3 + 2 * group; ++round) {
      if (i % 64 == 0) shared_floats()[group] = static_cast<float>(10 * group + round);
      cuda::barrier(1 + group, 64);
      results[i] = shared_floats()[group];
      cuda::barrier(1 + group, 64);
    }
  });
  for (int i = 0; i < 128; ++i) EXPECT_EQ(results[i], i < 64 ? 2.0f : 14.0f);
}

TEST_P(Simt, WarpBarrierOrdersTheMemoryOfAWarp) {
  std::vector<float> results(64);
  run({1, 1, 64, 64 * sizeof(float)}, [&] {
    for (int round = 0; round < 4; ++round) {
      shared_floats()[cuda::thread_index()] = static_cast<float>(lane() + round);
      cuda::warp_barrier();
      results[cuda::thread_index()] = shared_floats()[32 * warp() + 31 - lane()];
      cuda::warp_barrier();
    }
  });
  for (int i = 0; i < 64; ++i) EXPECT_EQ(results[i], static_cast<float>(31 - i % 32 + 3));
}

TEST_P(Simt, LoadsAndStoresMoveTheWords) {
  auto input = consecutive(4 * 32);
  Buffer<float> output(4 * 32);
  run({1, 1, 32, 32 * 16}, [&] {
    const int at = 4 * cuda::thread_index();
    cuda::store(shared_floats() + at, cuda::load_kept<Words4>(input.data() + at));
    cuda::store(output.data() + at, cuda::load_staged<Words4>(shared_floats() + at));
  });
  EXPECT_EQ(std::vector<float>(input.begin(), input.end()), std::vector<float>(output.begin(), output.end()));
}

TEST_P(Simt, ReciprocalSquareRoot) {
  run({1, 1, 1, 0}, [] {
    EXPECT_EQ(cuda::reciprocal_sqrt(16.0f), 0.25f);
    EXPECT_EQ(cuda::reciprocal_sqrt(2.0), 1.0 / std::sqrt(2.0));
  });
}

// Two stages, each refilled while the other one is read: what a backward pass does with its rows.
TEST_P(Simt, AsynchronousCopiesInStages) {
  constexpr int kRounds = 5, kThreads = 64, kValues = 4 * kThreads;
  auto input = consecutive(kRounds * kValues);
  std::vector<float> sums(kThreads, 0.0f);
  run({1, 1, kThreads, 2 * kThreads * 16}, [&] {
    const int i = cuda::thread_index();
    const auto stage = [](int round, int thread) { return shared_floats() + round % 2 * kValues + 4 * thread; };
    const auto issue = [&](int round) {
      if (round < kRounds) cuda::async_copy16(stage(round, i), input.data() + round * kValues + 4 * i);
      cuda::async_commit();
    };
    issue(0);
    for (int round = 0; round < kRounds; ++round) {
      issue(round + 1);
      cuda::async_wait<1>();
      cuda::barrier(0, kThreads);
      sums[i] += float_at(cuda::load_staged<Words4>(stage(round, kThreads - 1 - i)), 0);
      cuda::barrier(0, kThreads);
    }
    cuda::async_wait<0>();
  });
  for (int i = 0; i < kThreads; ++i) {
    float expected = 0.0f;
    for (int round = 0; round < kRounds; ++round) expected += input[round * kValues + 4 * (kThreads - 1 - i)];
    EXPECT_EQ(sums[i], expected);
  }
}

TEST_P(Simt, ClusterExchange) {
  constexpr int kCluster = 4, kGrid = 8;
  std::vector<float> sums(kGrid * 32);
  std::vector<double> wide_sums(kGrid * 32);
  run({kGrid, kCluster, 32, kCluster * (sizeof(float) + sizeof(double))}, [&] {
    auto* const wide = reinterpret_cast<double*>(cuda::shared_memory());
    auto* const narrow = reinterpret_cast<float*>(wide + kCluster);
    const int rank = cuda::cluster_rank();
    cuda::cluster_arrive();
    cuda::cluster_wait();
    if (lane() < kCluster) {
      cuda::store_remote(narrow + rank, lane(), static_cast<float>(cuda::block_index()));
      cuda::store_remote(wide + rank, lane(), cuda::block_index() + 0x1p-40);
    }
    cuda::cluster_arrive();
    cuda::cluster_wait();
    sums[cuda::block_index() * 32 + lane()] = warp_sum(lane() < kCluster ? narrow[lane()] : 0.0f);
    wide_sums[cuda::block_index() * 32 + lane()] = warp_sum(lane() < kCluster ? wide[lane()] : 0.0);
  });
  for (int i = 0; i < kGrid * 32; ++i) {
    EXPECT_EQ(sums[i], i < 128 ? 6.0f : 22.0f);
    EXPECT_EQ(wide_sums[i], (i < 128 ? 6.0 : 22.0) + 0x1p-38);
  }
}

TEST_P(Simt, CountersTellBytesAndCalls) {
  auto input = consecutive(4 * 64), output = consecutive(4 * 64);
  counters() = {};
  run({2, 1, 32, 32 * 16}, [&] {
    const int at = 4 * (32 * cuda::block_index() + lane());
    cuda::async_copy16(shared_floats() + 4 * lane(), input.data() + at);
    cuda::async_commit();
    cuda::async_wait<0>();
    auto words = cuda::load_staged<Words4>(shared_floats() + 4 * lane());  // not global memory: counted nowhere
    words.words[0] ^= cuda::load_kept<std::uint32_t>(input.data());
    words.words[1] ^= cuda::load_once<Words4>(input.data() + at).words[0];
    words.words[2] ^= cuda::float_to_bits(cuda::shuffle_xor(1.0f, 1));
    cuda::barrier(0, 32);
    cuda::cluster_arrive();
    cuda::cluster_wait();
    cuda::store(output.data() + at, words);
    cuda::store(output.data() + at, std::uint16_t{1});
  });
  EXPECT_EQ(counters().loaded_once, 64 * 16);
  EXPECT_EQ(counters().loaded_kept, 64 * 4);
  EXPECT_EQ(counters().stored, 64 * (16 + 2));
  EXPECT_EQ(counters().copied_asynchronously, 64 * 16);
  EXPECT_EQ(counters().narrow_accesses, 2 * 64);
  EXPECT_EQ(counters().shuffles, 64);
  EXPECT_EQ(counters().barriers, 64);
  EXPECT_EQ(counters().cluster_barriers, 64);
}

TEST_P(Simt, SharedMemoryIsNaNUntilWritten) {
  int numbers = 0;
  for (int repetition = 0; repetition < 2; ++repetition) {
    run({3, 1, 1, 5 * sizeof(float)}, [&] {
      for (int i = 0; i < 5; ++i) numbers += !std::isnan(shared_floats()[i]);
      for (int i = 0; i < 5; ++i) shared_floats()[i] = 1.0f;
    });
  }
  EXPECT_EQ(numbers, 0);
}

TEST_P(Simt, ManyThreadsAndDeepFrames) {
  Buffer<float> sums(8 * 256);
  run({8, 8, 256, 0}, [&] {
    volatile float local[4096];
    for (int i = 0; i < 4096; ++i) local[i] = 1.0f;
    cuda::cluster_arrive();
    cuda::cluster_wait();
    float sum = 0.0f;
    for (int i = 0; i < 4096; ++i) sum += local[i];
    sums[256 * cuda::block_index() + cuda::thread_index()] = sum;
  });
  for (const float sum : sums) EXPECT_EQ(sum, 4096.0f);
}

// ---- Faults that show as wrong values

// Read by another thread and by the one that copies, before and after the wait: only the last one has the data.
TEST_P(Simt, AsynchronousCopyIsLateAndLeavesNaN) {
  auto input = consecutive(4);
  run({1, 1, 1, 16}, [&] {
    shared_floats()[0] = 7.0f;
    cuda::async_copy16(shared_floats(), input.data());
    EXPECT_TRUE(std::isnan(shared_floats()[0])) << "before the commit";
    cuda::async_wait<0>();
    EXPECT_TRUE(std::isnan(shared_floats()[0])) << "a wait is for what was committed";
    cuda::async_commit();
    EXPECT_TRUE(std::isnan(shared_floats()[0])) << "before the wait";
    cuda::async_commit();
    cuda::async_wait<2>();
    EXPECT_TRUE(std::isnan(shared_floats()[0])) << "a wait that leaves two groups pending";
    cuda::async_wait<1>();
    EXPECT_EQ(shared_floats()[0], 1.0f);
  });
}

#ifndef __SANITIZE_THREAD__
// One slot, read and written again without a barrier between: right in lockstep, which is why there are other orders.
TEST(SimtOrders, MissingBarrierShowsInOneOrderAtLeast) {
  const auto wrong_values = [](Order order, std::uint64_t seed) {
    int wrong = 0;
    launch(
        {1, 1, 128, 4 * sizeof(float)},
        [&] {
          for (int round = 0; round < 4; ++round) {
            const float sum = warp_sum(static_cast<float>(round));
            if (lane() == 0) shared_floats()[warp()] = sum;
            cuda::barrier(0, 128);
            wrong += warp_sum(lane() < 4 ? shared_floats()[lane()] : 0.0f) != 128.0f * static_cast<float>(round);
          }
        },
        order, seed);
    return wrong;
  };
  EXPECT_EQ(wrong_values(Order::kForward, 0), 0);
  EXPECT_GT(wrong_values(Order::kReverse, 0) + wrong_values(Order::kRandom, 1) + wrong_values(Order::kRandom, 2), 0);
}

// A slot that is read where no barrier was at all.
TEST(SimtOrders, RandomOrderLetsAWarpRunAhead) {
  int late = 0;
  for (std::uint64_t seed = 0; seed < 8; ++seed) {
    launch(
        {1, 1, 64, sizeof(float)},
        [&] {
          if (warp() == 0) {
            const float sum = warp_sum(1.0f);
            if (lane() == 0) shared_floats()[0] = sum;
          } else if (std::isnan(shared_floats()[0] + warp_sum(0.0f))) {
            ++late;
          }
        },
        Order::kRandom, seed);
  }
  EXPECT_GT(late, 0);
  EXPECT_LT(late, 8 * 32);
}

TEST(SimtOrders, ReverseOrderBeginsWithTheLastBlockAndThread) {
  for (const Order order : {Order::kForward, Order::kReverse}) {
    std::vector<int> ran;
    launch({3, 1, 2, 0}, [&] { ran.push_back(10 * cuda::block_index() + cuda::thread_index()); }, order);
    std::vector<int> expected = {0, 1, 10, 11, 20, 21};
    if (order == Order::kReverse) std::reverse(expected.begin(), expected.end());
    EXPECT_EQ(ran, expected);
  }
}

TEST(SimtOrders, ChosenScheduleIsTheDefault) {
  std::vector<int> ran;
  schedule() = {Order::kReverse, 0};
  launch({1, 1, 3, 0}, [&] { ran.push_back(cuda::thread_index()); });
  schedule() = {};
  launch({1, 1, 3, 0}, [&] { ran.push_back(cuda::thread_index()); });
  EXPECT_EQ(ran, (std::vector<int>{2, 1, 0, 0, 1, 2}));
}

TEST(SimtOrders, RandomOrderRepeatsWithItsSeed) {
  const auto order_of = [](std::uint64_t seed) {
    std::vector<int> ran;
    launch({1, 1, 128, 0}, [&] { ran.push_back(cuda::thread_index()); }, Order::kRandom, seed);
    return ran;
  };
  EXPECT_EQ(order_of(1), order_of(1));
  EXPECT_NE(order_of(1), order_of(2));
}
#endif

// ---- Faults that are errors

TEST_P(Simt, MisalignedAccessIsAnError) {
  auto buffer = consecutive(8, 1);
  expect_fault({1, 1, 1, 0}, "misaligned load from global", [&] { cuda::load_once<Words4>(buffer.data()); });
  expect_fault({1, 1, 1, 0}, "misaligned load from global", [&] { cuda::load_kept<Words4>(buffer.data()); });
  expect_fault({1, 1, 1, 0}, "misaligned store", [&] { cuda::store(buffer.data(), Words4{}); });
  expect_fault({1, 1, 1, 64}, "misaligned load from shared",
               [] { cuda::load_staged<Words4>(cuda::shared_memory() + 8); });
  expect_fault({1, 1, 1, 64}, "misaligned asynchronous copy from global",
               [&] { cuda::async_copy16(cuda::shared_memory(), buffer.data()); });
  expect_fault({1, 1, 1, 64}, "misaligned asynchronous copy to shared",
               [&] { cuda::async_copy16(cuda::shared_memory() + 4, buffer.data() + 3); });
}

TEST_P(Simt, WrongKindOfMemoryIsAnError) {
  auto buffer = consecutive(4);
  expect_fault({1, 1, 1, 16}, "is in shared memory", [] { cuda::load_once<Words4>(cuda::shared_memory()); });
  expect_fault({1, 1, 1, 16}, "is in shared memory", [] { cuda::load_kept<Words4>(cuda::shared_memory()); });
  expect_fault({1, 1, 1, 16}, "outside of it", [&] { cuda::load_staged<Words4>(buffer.data()); });
  expect_fault({1, 1, 1, 16}, "outside of it", [&] { cuda::load_staged<Words4>(cuda::shared_memory() + 16); });
  expect_fault({1, 1, 1, 16}, "outside of it", [&] { cuda::async_copy16(cuda::shared_memory() + 16, buffer.data()); });
}

TEST_P(Simt, DivergentWarpIsAnError) {
  expect_fault({1, 1, 32, 0}, "divergent warp: a shuffle of 4 bytes",
               [] { cuda::shuffle_xor(1.0f, lane() < 16 ? 1 : 2); });
  expect_fault({1, 1, 32, 0}, "divergent warp: a shuffle of . bytes", [] {
    if (lane() < 16) {
      cuda::shuffle_xor(1.0f, 1);
    } else {
      cuda::shuffle_xor(1.0, 1);
    }
  });
  expect_fault({1, 1, 32, 0}, "divergent warp.*barrier of the warp", [] {
    if (lane() == 7) {
      cuda::warp_barrier();
    } else {
      cuda::shuffle_xor(1.0f, 1);
    }
  });
  expect_fault({1, 1, 64, 0}, "deadlock|left while other lanes|has .* threads left of 32", [] {
    if (cuda::thread_index() != 40) cuda::shuffle_xor(1.0f, 1);
  });
  expect_fault({1, 1, 48, 0}, "16 threads left of 32", [] { cuda::shuffle_xor(1.0f, 1); });
  expect_fault({1, 1, 64, 0}, "divergent warp: 16 lanes", [] {
    if (lane() < 16) cuda::barrier(1, 32);
  });
  expect_fault({1, 1, 32, 0}, "distance 32", [] { cuda::shuffle_xor(1.0f, 32); });
}

TEST_P(Simt, BarriersThatDoNotAgreeAreAnError) {
  expect_fault({1, 1, 96, 0}, "barrier 1 for (64|96) threads here, and for (64|96)",
               [] { cuda::barrier(1, warp() == 0 ? 64 : 96); });
  expect_fault({1, 1, 64, 0}, "barrier 1 for 96 threads of 64", [] { cuda::barrier(1, 96); });
  expect_fault({1, 1, 64, 0}, "barrier 1 for 40 threads", [] { cuda::barrier(1, 40); });
  expect_fault({1, 1, 64, 0}, "barrier 16", [] { cuda::barrier(16, 64); });
}

TEST_P(Simt, DeadlockIsAnError) {
  expect_fault({1, 1, 64, 0}, "deadlock: of 32 .* 0 wait in a warp operation, 32 at a barrier, 0 at the cluster's", [] {
    if (warp() == 0) cuda::barrier(0, 64);
  });
  expect_fault({1, 1, 64, 0}, "deadlock: of 64 .* 64 at a barrier", [] { cuda::barrier(warp(), 64); });
  expect_fault({2, 2, 32, 0}, "deadlock: of 32 .* 32 at the cluster's", [] {
    if (cuda::cluster_rank() == 0) {
      cuda::cluster_arrive();
      cuda::cluster_wait();
    }
  });
}

TEST_P(Simt, CopyInFlightAtTheEndIsAnError) {
  auto input = consecutive(4);
  expect_fault({1, 1, 1, 16}, "copy in flight", [&] { cuda::async_copy16(cuda::shared_memory(), input.data()); });
  expect_fault({1, 1, 1, 16}, "copy in flight", [&] {
    cuda::async_copy16(cuda::shared_memory(), input.data());
    cuda::async_commit();
    cuda::async_wait<1>();
  });
}

TEST_P(Simt, TouchingABlockThatMayNotHaveStartedIsAnError) {
  expect_fault({2, 2, 32, 4}, "may not have started", [] {
    cuda::store_remote(shared_floats(), 1 - cuda::cluster_rank(), 1.0f);
    cuda::cluster_arrive();
    cuda::cluster_wait();
  });
  // To arrive is not enough.
  expect_fault({2, 2, 32, 4}, "may not have started", [] {
    cuda::cluster_arrive();
    cuda::store_remote(shared_floats(), 1 - cuda::cluster_rank(), 1.0f);
    cuda::cluster_wait();
  });
}

TEST_P(Simt, TouchingABlockThatMayHaveLeftIsAnError) {
  // The other block is still there, by chance.
  expect_fault({2, 2, 32, 4}, "left after a remote store", [] {
    cuda::cluster_arrive();
    cuda::cluster_wait();
    if (cuda::cluster_rank() == 0) {
      cuda::store_remote(shared_floats(), 1, 1.0f);
    } else {
      cuda::cluster_arrive();
      cuda::cluster_wait();
    }
  });
  // Block 0 leaves early: a block of one thread, so that it has left when the other one stores in any order.
  expect_fault({2, 2, 1, 4}, "which has left", [] {
    cuda::cluster_arrive();
    cuda::cluster_wait();
    if (cuda::cluster_rank() == 0) {
      cuda::cluster_arrive();
      return;
    }
    cuda::cluster_arrive();
    cuda::cluster_wait();
    cuda::store_remote(shared_floats(), 0, 1.0f);
  });
}

TEST_P(Simt, MisuseOfTheClusterIsAnError) {
  expect_fault({1, 1, 1, 4}, "without having arrived", [] { cuda::cluster_wait(); });
  expect_fault({2, 2, 1, 4}, "twice", [] {
    cuda::cluster_arrive();
    cuda::cluster_arrive();
  });
  expect_fault({2, 2, 1, 4}, "block 2 of a cluster of 2", [] { cuda::store_remote(shared_floats(), 2, 1.0f); });
  expect_fault({2, 2, 1, 4}, "outside of shared memory", [] { cuda::store_remote(shared_floats() + 1, 1, 1.0f); });
  expect_fault({2, 2, 1, 16}, "misaligned remote store",
               [] { cuda::store_remote(reinterpret_cast<double*>(cuda::shared_memory() + 4), 1, 1.0); });
}

TEST_P(Simt, MessageSaysWhereAndWhen) {
  expect_fault({4, 1, 64, 0}, "SIMT: barrier 16.*thread [0-9]+ of block [0-9]+, .* order, seed [0-9]+",
               [] { cuda::barrier(16, 64); });
}

TEST(SimtLaunch, ImpossibleLaunchIsAnError) {
  const auto nothing = [] {};
  EXPECT_EXIT(launch({1, 1, 1025, 0}, nothing), ExitedWithCode(kFailureStatus), "block of 1025");
  EXPECT_EXIT(launch({1, 1, 32, 227 * 1024 + 1}, nothing), ExitedWithCode(kFailureStatus), "shared memory");
  EXPECT_EXIT(launch({16, 16, 32, 0}, nothing), ExitedWithCode(kFailureStatus), "cluster of 16");
  EXPECT_EXIT(launch({3, 2, 32, 0}, nothing), ExitedWithCode(kFailureStatus), "grid of 3");
  EXPECT_EXIT(launch({1, 1, 1, 0}, [&] { launch({}, nothing); }), ExitedWithCode(kFailureStatus), "inside a kernel");
  EXPECT_EXIT(cuda::thread_index(), ExitedWithCode(kFailureStatus), "outside of a launch");
}

// ---- What a sanitizer sees

#ifdef __SANITIZE_ADDRESS__
TEST_P(Simt, AddressSanitizerSeesOneByteTooMany) {
  Buffer<float> buffer(7);
  EXPECT_DEATH(run({1, 1, 32, 20}, [] { cuda::shared_memory()[20] = 0; }), "heap-buffer-overflow");
  EXPECT_DEATH(run({1, 1, 32, 0}, [&] { cuda::load_once<Words4>(buffer.data() + 4); }), "heap-buffer-overflow");
  EXPECT_DEATH(run({1, 1, 32, 16},
                   [&] {
                     cuda::async_copy16(cuda::shared_memory(), buffer.data() + 4);
                     cuda::async_commit();
                     cuda::async_wait<0>();
                   }),
               "heap-buffer-overflow");
  EXPECT_DEATH(run({1, 1, 32, 0}, [&] { cuda::store(buffer.data() + 4, Words4{}); }), "heap-buffer-overflow");
  EXPECT_DEATH(run({1, 1, 32, 0},
                   [] {
                     volatile int index = 4;
                     float local[4] = {};
                     local[index] = 1.0f;
                     cuda::shuffle_xor(local[index - 1], 1);
                   }),
               "stack-buffer-overflow|out of bounds");
}
#endif

#ifdef __SANITIZE_THREAD__
// Races that need not show in any order: ThreadSanitizer makes the process end with its own status.
class SimtRace : public Simt {
 protected:
  // A process that forks when it has fibers already is not watched any more.
  void SetUp() override { GTEST_FLAG_SET(death_test_style, "threadsafe"); }
  void TearDown() override { GTEST_FLAG_SET(death_test_style, "fast"); }

  void expect_race(const Launch& configuration, const std::function<void()>& kernel) {
    EXPECT_EXIT(
        {
          run(configuration, kernel);
          std::exit(0);
        },
        ExitedWithCode(66), "data race");
  }
};

INSTANTIATE_TEST_SUITE_P(Orders, SimtRace, ::testing::ValuesIn(kSchedules),
                         [](const auto& info) { return std::string(info.param.name); });

TEST_P(SimtRace, MissingBarrier) {
  expect_race({1, 1, 64, 8}, [] {
    if (lane() == 0) shared_floats()[warp()] = 1.0f;
    warp_sum(shared_floats()[1 - warp()]);
  });
}

TEST_P(SimtRace, MissingBarrierBehindABarrier) {
  expect_race({1, 1, 64, 8}, [] {
    for (int round = 0; round < 2; ++round) {
      if (lane() == 0) shared_floats()[warp()] = 1.0f;
      cuda::barrier(0, 64);
      warp_sum(shared_floats()[1 - warp()]);
    }
  });
}

TEST_P(SimtRace, ShuffleOrdersNothing) {
  expect_race({1, 1, 32, 256}, [] {
    shared_floats()[lane()] = 1.0f;
    cuda::shuffle_xor(1.0f, 1);
    shared_floats()[32 + lane()] = shared_floats()[lane() ^ 1];
  });
}

TEST_P(SimtRace, AnotherGroupsBarrierOrdersNothing) {
  expect_race({1, 1, 128, 8}, [] {
    const int group = warp() / 2;
    if (lane() == 0 && warp() % 2 == 0) shared_floats()[group] = 1.0f;
    cuda::barrier(1 + group, 64);
    warp_sum(shared_floats()[1 - group]);
  });
}

TEST_P(SimtRace, CopyThatAnotherThreadReadsWithoutABarrier) {
  auto input = consecutive(4 * 64);
  expect_race({1, 1, 64, 64 * 16}, [&] {
    const int i = cuda::thread_index();
    cuda::async_copy16(shared_floats() + 4 * i, input.data() + 4 * i);
    cuda::async_commit();
    cuda::barrier(0, 64);
    cuda::async_wait<0>();
    cuda::load_staged<Words4>(shared_floats() + 4 * (63 - i));
  });
  // And while it is under way.
  expect_race({1, 1, 64, 16}, [&] {
    if (cuda::thread_index() == 0) cuda::async_copy16(shared_floats(), input.data());
    if (cuda::thread_index() == 32) cuda::load_staged<Words4>(shared_floats());
    cuda::barrier(0, 64);
    cuda::async_commit();
    cuda::async_wait<0>();
  });
}

template <int kCount>
struct alignas(kCount < 4 ? 4 : 16) Words {
  std::uint32_t words[kCount];
};

template <int kCount>
void store_from_two_threads(Buffer<float>& output) {
  if (lane() == 0) cuda::store(output.data(), Words<kCount>{});
}

template <int kCount>
void load_while_another_stores(Buffer<float>& output) {
  if (cuda::thread_index() == 0) cuda::store(output.data(), Words<kCount>{});
  if (cuda::thread_index() == 32) cuda::store(output.data() + 32, cuda::load_once<Words<kCount>>(output.data()));
}

TEST_P(SimtRace, VectorsOfAnySize) {
  Buffer<float> output(64);
  expect_race({1, 1, 64, 0}, [&] { store_from_two_threads<1>(output); });
  expect_race({1, 1, 64, 0}, [&] { store_from_two_threads<3>(output); });
  expect_race({1, 1, 64, 0}, [&] { store_from_two_threads<4>(output); });
  expect_race({1, 1, 64, 0}, [&] { store_from_two_threads<8>(output); });
  expect_race({1, 1, 64, 0}, [&] { load_while_another_stores<1>(output); });
  expect_race({1, 1, 64, 0}, [&] { load_while_another_stores<4>(output); });
  expect_race({1, 1, 64, 0}, [&] { load_while_another_stores<8>(output); });
  expect_race({1, 1, 64, 0}, [&] { load_while_another_stores<16>(output); });
}

// The same slot is written again while the one lane that reads it may be late: nothing orders that, although each has
// passed the barriers of the other when it ends.
TEST_P(SimtRace, MissingWarpBarrierBehindAWarpBarrier) {
  expect_race({1, 1, 32, 256}, [] {
    for (int round = 0; round < 2; ++round) {
      if (lane() == 0) shared_floats()[0] = 1.0f;
      cuda::warp_barrier();
      if (lane() == 1) shared_floats()[32] = shared_floats()[0];
    }
    cuda::warp_barrier();
  });
}

TEST_P(SimtRace, MissingClusterBarrierBehindAClusterBarrier) {
  expect_race({2, 2, 32, 256}, [] {
    cuda::cluster_arrive();
    cuda::cluster_wait();
    for (int round = 0; round < 2; ++round) {
      if (cuda::cluster_rank() == 0 && lane() == 0) cuda::store_remote(shared_floats(), 1, 1.0f);
      cuda::cluster_arrive();
      cuda::cluster_wait();
      if (cuda::cluster_rank() == 1 && lane() == 0) shared_floats()[32] = shared_floats()[0];
    }
  });
}

TEST_P(SimtRace, RemoteStoreReadWithoutTheSecondClusterBarrier) {
  expect_race({2, 2, 32, 4}, [] {
    cuda::cluster_arrive();
    cuda::cluster_wait();
    if (lane() == 0) cuda::store_remote(shared_floats(), 1 - cuda::cluster_rank(), 1.0f);
    cuda::cluster_arrive();
    warp_sum(shared_floats()[0]);
    cuda::cluster_wait();
  });
}
#endif

}  // namespace
}  // namespace resnorm::simt
