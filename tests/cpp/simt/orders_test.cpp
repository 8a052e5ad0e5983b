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
