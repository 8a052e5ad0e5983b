// SPDX-License-Identifier: BSD-3-Clause
// What ThreadSanitizer sees in the emulation, where the tests are built with it.
#ifdef __SANITIZE_THREAD__

#include <cstdlib>

#include "simt_test.h"

namespace resnorm::simt {
namespace {

// Races that need not show in any order: ThreadSanitizer makes the process end with its own status.
class SimtRace : public SimtTest {
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

RESNORM_FOR_SCHEDULES(SimtRace, kSchedules);

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

TEST_P(SimtRace, ClusterBarrierOrdersNothing) {
  Buffer<float> output(1);
  expect_race({2, 2, 32, 0}, [&] {
    if (cuda::block_index() == 0 && lane() == 0) output[0] = 1.0f;
    cuda::cluster_arrive();
    cuda::cluster_wait();
    if (cuda::block_index() == 1) warp_sum(output[0]);
  });
}

TEST_P(SimtRace, AsynchronousStoreReadWithoutAWait) {
  expect_race({2, 2, 32, kTransactionBytes + 4}, [] {
    init_transaction_barriers();
    if (lane() == 0) {
      cuda::expect_bytes(transaction_barriers(), 4);
      store_one(slots(), transaction_barriers(), 1 - cuda::cluster_rank(), 1.0f);
    }
    warp_sum(slots()[0]);
    cuda::wait_for_bytes(transaction_barriers(), 0);
  });
  // And where another thread alone waits.
  expect_race({2, 2, 64, kTransactionBytes + 4}, [] {
    init_transaction_barriers();
    if (lane() == 0 && warp() == 0) {
      cuda::expect_bytes(transaction_barriers(), 4);
      store_one(slots(), transaction_barriers(), 1 - cuda::cluster_rank(), 1.0f);
    }
    if (warp() == 0) cuda::wait_for_bytes(transaction_barriers(), 0);
    warp_sum(slots()[0]);
  });
}

// The phase of the wrong parity is over already, so nobody waits for the one that has begun.
TEST_P(SimtRace, AsynchronousStoreReadAfterAWaitForTheWrongParity) {
  expect_race({2, 2, 32, kTransactionBytes + 4}, [] {
    init_transaction_barriers();
    if (cuda::cluster_rank() == 0) {
      if (lane() == 0) store_one(slots(), transaction_barriers(), 1, 1.0f);
    } else {
      cuda::wait_for_bytes(transaction_barriers(), 1);
      warp_sum(slots()[0]);
      if (lane() == 0) cuda::expect_bytes(transaction_barriers(), 4);
      cuda::wait_for_bytes(transaction_barriers(), 0);
    }
  });
}

// Two blocks, whose barriers take turns.
template <bool kMeet>
void exchange(int slots_in_turn) {
  init_transaction_barriers();
  for (int round = 0; round < 4; ++round) {
    auto* const barrier = transaction_barriers() + round % 2;
    float* const slot = slots() + round % slots_in_turn * 2;
    if (lane() == 0) cuda::expect_bytes(barrier, 2 * 4);
    if constexpr (kMeet) cuda::warp_barrier();
    const float value = warp_sum(1.0f);
    if (lane() < 2) store_one(slot + cuda::cluster_rank(), barrier, lane(), value);
    cuda::wait_for_bytes(barrier, round / 2 % 2);
    warp_sum(slot[lane() % 2]);
  }
}

TEST_P(SimtRace, SlotOfAsynchronousStoresThatDoesNotAlternate) {
  run({2, 2, 32, kTransactionBytes + 16}, [] { exchange<true>(2); });
  expect_race({2, 2, 32, kTransactionBytes + 16}, [] { exchange<true>(1); });
}

// That all lanes have read their slots is what the other block takes the store of one lane for. A shuffle before it
// is not enough.
TEST_P(SimtRace, ShuffleOrdersNoReadsBeforeAnAsynchronousStore) {
  expect_race({2, 2, 32, kTransactionBytes + 16}, [] { exchange<false>(2); });
}

// What is written between two phases is not for threads that have waited for the first one alone, late as they may be.
TEST_P(SimtRace, LateWaiterOfTheLastPhaseKnowsNothingOfThisOne) {
  Buffer<float> output(2);
  expect_race({2, 2, 64, kTransactionBytes + 4}, [&] {
    auto* const barrier = transaction_barriers();
    init_transaction_barriers();
    const int thread = cuda::thread_index();
    if (cuda::cluster_rank() == 0) {
      if (thread != 0) return;
      store_one(slots(), barrier, 1, 1.0f);
      cuda::expect_bytes(barrier, 4);
      cuda::wait_for_bytes(barrier, 0);
      output[0] = 1.0f;
      store_one(slots(), barrier, 1, 1.0f);
    } else {
      if (thread == 0) {
        cuda::expect_bytes(barrier, 4);
        cuda::wait_for_bytes(barrier, 0);
        store_one(slots(), barrier, 0, 1.0f);
      }
      if (thread == 32) {
        cuda::wait_for_bytes(barrier, 0);
        output[1] = output[0];
      }
      cuda::barrier(0, 64);
      if (thread == 0) {
        cuda::expect_bytes(barrier, 4);
        cuda::wait_for_bytes(barrier, 1);
      }
    }
  });
}

}  // namespace
}  // namespace resnorm::simt

#endif
