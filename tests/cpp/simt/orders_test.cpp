// SPDX-License-Identifier: BSD-3-Clause
// The orders, and the faults that show in some of them alone. Those are races, so not for ThreadSanitizer.
#ifndef __SANITIZE_THREAD__

#include <algorithm>
#include <cmath>
#include <vector>

#include "simt_test.h"

namespace resnorm::simt {
namespace {

// One slot, read and written again without a barrier between: right in lockstep, which is why there are other orders.
TEST(SimtOrders, MissingBarrierShowsInOneOrderAtLeast) {
  const auto wrong_values = [](const Schedule& schedule) {
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
        schedule);
    return wrong;
  };
  EXPECT_EQ(wrong_values({Order::kForward}), 0);
  EXPECT_GT(wrong_values({Order::kReverse}) + wrong_values({Order::kRandom, 1}) + wrong_values({Order::kRandom, 2}), 0);
}

// A slot that is read where no barrier was at all.
TEST(SimtOrders, RandomOrderLetsAWarpRunAhead) {
  int late = 0;
  for (std::uint64_t seed = 0; seed < 8; ++seed) {
    launch({1, 1, 64, sizeof(float)},
           [&] {
             if (warp() == 0) {
               const float sum = warp_sum(1.0f);
               if (lane() == 0) shared_floats()[0] = sum;
             } else if (std::isnan(shared_floats()[0] + warp_sum(0.0f))) {
               ++late;
             }
           },
           {Order::kRandom, seed});
  }
  EXPECT_GT(late, 0);
  EXPECT_LT(late, 8 * 32);
}

// What an exchange takes in turn, and the parity of a round's phase: with two barriers and two slots it is right.
struct Turns {
  int barriers = 2, slots = 2;
  int (*parity)(int round) = [](int round) { return round / 2 % 2; };
};

// Four blocks tell each other the number of the round and add up what they hear.
int wrong_sums_of_exchange(const Turns& turns, const Schedule& schedule) {
  constexpr int kCluster = 4, kRounds = 6;
  int wrong = 0;
  launch(
      {kCluster, kCluster, 32, kTransactionBytes + 2 * kCluster * static_cast<int>(sizeof(float))},
      [&] {
        init_transaction_barriers();
        for (int round = 0; round < kRounds; ++round) {
          auto* const barrier = transaction_barriers() + round % turns.barriers;
          float* const slot = slots() + round % turns.slots * kCluster;
          if (lane() == 0) cuda::expect_bytes(barrier, kCluster * sizeof(float));
          const float value = warp_sum(static_cast<float>(round));
          if (lane() < kCluster) store_one(slot + cuda::cluster_rank(), barrier, lane(), value);
          cuda::wait_for_bytes(barrier, turns.parity(round));
          const float sum = warp_sum(lane() < kCluster ? slot[lane()] : 0.0f);
          wrong += sum != static_cast<float>(32 * kCluster * round);
        }
      },
      schedule);
  return wrong;
}

TEST(SimtOrders, ExchangeThatTakesTurnsIsRight) {
  for (const Schedule& schedule : kSchedules) EXPECT_EQ(wrong_sums_of_exchange({}, schedule), 0);
}

// What arrives while the slot is still being read.
TEST(SimtOrders, SlotThatDoesNotAlternateShowsInOneOrderAtLeast) {
  int wrong = 0;
  for (const Schedule& schedule : kSchedules) wrong += wrong_sums_of_exchange({.slots = 1}, schedule);
  EXPECT_GT(wrong, 0);
}

// What arrives in the phase before its own.
TEST(SimtOrders, BarrierThatDoesNotAlternateIsAFaultInOneOrderAtLeast) {
  EXPECT_EXIT(
      {
        for (const Schedule& schedule : kSchedules) {
          wrong_sums_of_exchange({.barriers = 1, .parity = [](int round) { return round % 2; }}, schedule);
        }
      },
      ExitedWithCode(kFailureStatus), "bytes have come in phase");
}

// It goes on without the data, or waits for a phase that does not begin. Right in some rounds, but not in all.
TEST(SimtOrders, WaitForTheWrongParityShowsInEveryOrder) {
  for (const Schedule& schedule : kSchedules) {
    for (const auto parity : {+[](int) { return 0; }, +[](int) { return 1; }, +[](int round) { return round % 2; }}) {
      EXPECT_EXIT(if (wrong_sums_of_exchange({.parity = parity}, schedule) > 0) fail("wrong sums"),
                  ExitedWithCode(kFailureStatus), "wrong sums|waits for parity|deadlock|bytes .* in");
    }
  }
}

TEST(SimtOrders, MissingWaitForBytesShowsInEveryOrder) {
  for (const Schedule& schedule : kSchedules) {
    int sums = 0, late = 0;
    launch(
        {2, 2, 32, kTransactionBytes + 4},
        [&] {
          init_transaction_barriers();
          if (lane() == 0) {
            cuda::expect_bytes(transaction_barriers(), 4);
            store_one(slots(), transaction_barriers(), 1 - cuda::cluster_rank(), 1.0f);
          }
          sums += warp_sum(slots()[0]) == 32.0f;
          late += std::isnan(slots()[0]);
          cuda::wait_for_bytes(transaction_barriers(), 0);
        },
        schedule);
    EXPECT_EQ(sums, 0);
    EXPECT_GT(late, 0);
  }
}

// By the time it looks the second phase is over as well, and the third one looks to it like the first.
TEST(SimtOrders, WaiterThatIsLappedWaitsForEver) {
  for (const Order order : {Order::kForward, Order::kReverse}) {
    EXPECT_EXIT(launch({1, 1, 2, kTransactionBytes + 4},
                       [&] {
                         init_transaction_barriers();
                         if (cuda::thread_index() == 1) return cuda::wait_for_bytes(transaction_barriers(), 0);
                         for (int phase = 0; phase < 2; ++phase) {
                           cuda::expect_bytes(transaction_barriers(), 4);
                           store_one(slots(), transaction_barriers(), 0, 1.0f);
                           cuda::wait_for_bytes(transaction_barriers(), phase);
                         }
                       },
                       {order}),
                ExitedWithCode(kFailureStatus), "deadlock: of 1 .* 1 for bytes; .* phase 2, where 0 bytes");
  }
}

TEST(SimtOrders, AsynchronousStoresArriveInTheOrderOfTheSchedule) {
  const auto last_of_three = [](const Schedule& schedule) {
    float last = 0.0f;
    launch(
        {1, 1, 1, kTransactionBytes + 4},
        [&] {
          init_transaction_barriers();
          for (const float value : {1.0f, 2.0f, 3.0f}) store_one(slots(), transaction_barriers(), 0, value);
          cuda::expect_bytes(transaction_barriers(), 12);
          cuda::wait_for_bytes(transaction_barriers(), 0);
          last = slots()[0];
        },
        schedule);
    return last;
  };
  EXPECT_EQ(last_of_three({Order::kForward}), 3.0f);
  EXPECT_EQ(last_of_three({Order::kReverse}), 1.0f);
  bool seen[4] = {};
  for (std::uint64_t seed = 0; seed < 16; ++seed) seen[static_cast<int>(last_of_three({Order::kRandom, seed}))] = true;
  EXPECT_TRUE(seen[1] && seen[2] && seen[3]);
}

TEST(SimtOrders, ReverseOrderBeginsWithTheLastBlockAndThread) {
  for (const Order order : {Order::kForward, Order::kReverse}) {
    std::vector<int> ran;
    launch({3, 1, 2, 0}, [&] { ran.push_back(10 * cuda::block_index() + cuda::thread_index()); }, {order});
    std::vector<int> expected = {0, 1, 10, 11, 20, 21};
    if (order == Order::kReverse) std::reverse(expected.begin(), expected.end());
    EXPECT_EQ(ran, expected);
  }
}

TEST(SimtOrders, LastClustersAloneKnowTheirPlaceInTheGrid) {
  for (const Order order : {Order::kForward, Order::kReverse}) {
    std::vector<int> ran;
    launch({2'000'000'000, 2, 1, 0},
           [&] {
             EXPECT_EQ(cuda::grid_blocks(), 2'000'000'000);
             ran.push_back(cuda::block_index() - 2'000'000'000);
           },
           {.order = order, .last_clusters = 2});
    std::vector<int> expected = {-4, -3, -2, -1};
    if (order == Order::kReverse) std::reverse(expected.begin(), expected.end());
    EXPECT_EQ(ran, expected);
  }
}

TEST(SimtOrders, ChosenScheduleIsTheDefault) {
  std::vector<int> ran;
  schedule() = {Order::kReverse};
  launch({1, 1, 3, 0}, [&] { ran.push_back(cuda::thread_index()); });
  schedule() = {};
  launch({1, 1, 3, 0}, [&] { ran.push_back(cuda::thread_index()); });
  EXPECT_EQ(ran, (std::vector<int>{2, 1, 0, 0, 1, 2}));
}

TEST(SimtOrders, RandomOrderRepeatsWithItsSeed) {
  const auto order_of = [](std::uint64_t seed) {
    std::vector<int> ran;
    launch({1, 1, 128, 0}, [&] { ran.push_back(cuda::thread_index()); }, {Order::kRandom, seed});
    return ran;
  };
  EXPECT_EQ(order_of(1), order_of(1));
  EXPECT_NE(order_of(1), order_of(2));
}
}  // namespace
}  // namespace resnorm::simt

#endif
