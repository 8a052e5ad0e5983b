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

// The sums of a row in each round, which every warp tells every block. Barriers and slots take turns: who is in one
// round knows that all have read what came in the round before the last one.
template <int kCount>
void exchange_in_clusters(const Schedule& schedule) {
  constexpr int kGrid = 8, kCluster = 4, kWarps = 2, kRounds = 5, kSlots = kCluster * kWarps;
  std::vector<float> sums(kRounds * kGrid * kWarps * 32);
  launch(
      {kGrid, kCluster, 32 * kWarps, kTransactionBytes + 2 * kSlots * kCount * static_cast<int>(sizeof(float))},
      [&] {
        init_transaction_barriers();
        for (int round = 0; round < kRounds; ++round) {
          auto* const barrier = transaction_barriers() + round % 2;
          float* const slot = slots() + round % 2 * kSlots * kCount;
          if (cuda::thread_index() == 0) cuda::expect_bytes(barrier, kSlots * kCount * sizeof(float));
          cuda::warp_barrier();  // all lanes have read the slots, before one of them says so
          if (lane() < kCluster) {
            float values[kCount];
            for (int i = 0; i < kCount; ++i) values[i] = static_cast<float>(cuda::block_index() + 10 * round + i);
            cuda::store_async(slot + (cuda::cluster_rank() * kWarps + warp()) * kCount, barrier, lane(), values);
          }
          cuda::wait_for_bytes(barrier, round / 2 % 2);
          float sum = 0.0f;
          for (int i = 0; i < kCount; ++i) sum += warp_sum(lane() < kSlots ? slot[lane() * kCount + i] : 0.0f);
          sums[(round * kGrid + cuda::block_index()) * 32 * kWarps + cuda::thread_index()] = sum;
        }
      },
      schedule);
  for (int i = 0; i < static_cast<int>(sums.size()); ++i) {
    const int block = i / (32 * kWarps) % kGrid, round = i / (32 * kWarps * kGrid);
    const int ranks = block < kCluster ? 0 + 1 + 2 + 3 : 4 + 5 + 6 + 7;
    const int expected = kCount * kWarps * (ranks + kCluster * 10 * round) + kSlots * kCount * (kCount - 1) / 2;
    ASSERT_EQ(sums[i], static_cast<float>(expected)) << "block " << block << ", round " << round;
  }
}

TEST_P(Simt, ClusterExchange) {
  exchange_in_clusters<1>(GetParam());
  exchange_in_clusters<2>(GetParam());
  exchange_in_clusters<4>(GetParam());
}

TEST_P(Simt, CountersTellBytesAndCalls) {
  auto input = consecutive(4 * 64), output = consecutive(4 * 64);
  counters() = {};
  run({2, 1, 32, 32 * 16 + kTransactionBytes}, [&] {
    const int at = 4 * (32 * cuda::block_index() + lane());
    auto* const barrier = reinterpret_cast<cuda::TransactionBarrier*>(cuda::shared_memory() + 32 * 16);
    if (lane() == 0) cuda::init_barrier(barrier);
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
    if (lane() == 0) cuda::expect_bytes(barrier, 16 * 16);
    if (lane() < 16) cuda::store_async(shared_floats() + 4 * lane(), barrier, 0, {1.0f, 2.0f, 3.0f, 4.0f});
    cuda::wait_for_bytes(barrier, 0);
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
  EXPECT_EQ(counters().asynchronous_stores, 2 * 16);
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

// As late as the block that gets it lets it be. To come before they are expected is what the bytes may do.
TEST_P(Simt, AsynchronousStoreIsLateAndLeavesNaN) {
  run({1, 1, 1, kTransactionBytes + 16}, [] {
    init_transaction_barriers();
    for (int i = 0; i < 4; ++i) slots()[i] = 7.0f;
    auto* const barrier = transaction_barriers();
    cuda::store_async(slots(), barrier, 0, {1.0f, 2.0f});
    EXPECT_TRUE(std::isnan(slots()[0]) && std::isnan(slots()[1])) << "before they are expected";
    EXPECT_EQ(slots()[2], 7.0f);
    cuda::expect_bytes(barrier, 12);
    store_one(slots() + 2, barrier, 0, 3.0f);
    for (int i = 0; i < 3; ++i) EXPECT_TRUE(std::isnan(slots()[i])) << "before the wait";
    cuda::wait_for_bytes(barrier, 0);
    for (int i = 0; i < 3; ++i) EXPECT_EQ(slots()[i], 1.0f + static_cast<float>(i));
    EXPECT_EQ(slots()[3], 7.0f);
    cuda::wait_for_bytes(barrier, 0);  // of a phase that is over
  });
}

TEST_P(Simt, AsynchronousStoresOfAnotherBarrierStayInFlight) {
  run({1, 1, 1, kTransactionBytes + 4}, [] {
    init_transaction_barriers();
    for (int i = 0; i < 2; ++i) {
      store_one(slots(), transaction_barriers() + i, 0, 1.0f + static_cast<float>(i));
      cuda::expect_bytes(transaction_barriers() + i, 4);
    }
    cuda::wait_for_bytes(transaction_barriers(), 0);
    EXPECT_TRUE(std::isnan(slots()[0]));
    cuda::wait_for_bytes(transaction_barriers() + 1, 0);
    EXPECT_EQ(slots()[0], 2.0f);
  });
}

TEST_P(Simt, PhasesOfOneBarrierTakeTurnsInParity) {
  run({1, 1, 1, kTransactionBytes + 4}, [] {
    init_transaction_barriers();
    cuda::wait_for_bytes(transaction_barriers(), 1);  // as if a phase had been before the first one
    for (int phase = 0; phase < 5; ++phase) {
      cuda::expect_bytes(transaction_barriers(), 4);
      store_one(slots(), transaction_barriers(), 0, static_cast<float>(phase));
      cuda::wait_for_bytes(transaction_barriers(), phase % 2);
      EXPECT_EQ(slots()[0], static_cast<float>(phase));
    }
    cuda::expect_bytes(transaction_barriers(), 0);  // all bytes are there
    cuda::wait_for_bytes(transaction_barriers(), 1);
  });
}

// What was sent arrives all the same, where some thread of the other block waits for it.
TEST_P(Simt, SenderMayLeaveWithoutWaiting) {
  constexpr int kCluster = 3;
  std::vector<float> results(16, 0.0f);
  run({kCluster, kCluster, 32, kTransactionBytes + kCluster * 4}, [&] {
    init_transaction_barriers();
    if (cuda::cluster_rank() != 0) {
      if (lane() == 0) store_one(slots() + cuda::cluster_rank(), transaction_barriers(), 0, 5.0f);
      return;
    }
    if (lane() == 7) cuda::expect_bytes(transaction_barriers(), 2 * 4);
    if (lane() >= 16) return;
    cuda::wait_for_bytes(transaction_barriers(), 0);
    results[lane()] = slots()[1] + slots()[2];
  });
  for (const float result : results) EXPECT_EQ(result, 10.0f);
}

// Who waits sees as well what the others did before they sent and before they expected.
TEST_P(Simt, WaitForBytesOrdersMemory) {
  Buffer<float> sent(1), expected(1);
  std::vector<float> results(64, 0.0f);
  run({2, 2, 64, kTransactionBytes + 4}, [&] {
    init_transaction_barriers();
    if (cuda::cluster_rank() == 0) {
      if (cuda::thread_index() == 0) {
        sent[0] = 1.0f;
        store_one(slots(), transaction_barriers(), 1, 2.0f);
      }
    } else {
      if (cuda::thread_index() == 63) {
        expected[0] = 3.0f;
        cuda::expect_bytes(transaction_barriers(), 4);
      }
      cuda::wait_for_bytes(transaction_barriers(), 0);
      results[cuda::thread_index()] = sent[0] + slots()[0] + expected[0];
    }
  });
  for (const float result : results) EXPECT_EQ(result, 6.0f);
}

}  // namespace
}  // namespace resnorm::simt
