// SPDX-License-Identifier: BSD-3-Clause
// Small kernels that are right pass in every order; and what the emulation makes of late copies.
#include "simt_test.h"

#include <cmath>
#include <vector>

namespace resnorm::simt {
namespace {

class Simt : public SimtTest {};
RESNORM_FOR_SCHEDULES(Simt, kSchedules);

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

}  // namespace
}  // namespace resnorm::simt
