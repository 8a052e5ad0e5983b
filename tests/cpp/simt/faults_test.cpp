// SPDX-License-Identifier: BSD-3-Clause
// Small kernels with the classic faults, which the emulation reports.
#include "simt_test.h"

namespace resnorm::simt {
namespace {

class SimtFaults : public SimtTest {};
RESNORM_FOR_SCHEDULES(SimtFaults, kSchedules);

TEST_P(SimtFaults, MisalignedAccessIsAnError) {
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

TEST_P(SimtFaults, WrongKindOfMemoryIsAnError) {
  auto buffer = consecutive(4);
  expect_fault({1, 1, 1, 16}, "is in shared memory", [] { cuda::load_once<Words4>(cuda::shared_memory()); });
  expect_fault({1, 1, 1, 16}, "is in shared memory", [] { cuda::load_kept<Words4>(cuda::shared_memory()); });
  expect_fault({1, 1, 1, 16}, "outside of it", [&] { cuda::load_staged<Words4>(buffer.data()); });
  expect_fault({1, 1, 1, 16}, "outside of it", [&] { cuda::load_staged<Words4>(cuda::shared_memory() + 16); });
  expect_fault({1, 1, 1, 16}, "outside of it", [&] { cuda::async_copy16(cuda::shared_memory() + 16, buffer.data()); });
}

TEST_P(SimtFaults, DivergentWarpIsAnError) {
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

TEST_P(SimtFaults, BarriersThatDoNotAgreeAreAnError) {
  expect_fault({1, 1, 96, 0}, "barrier 1 for (64|96) threads here, and for (64|96)",
               [] { cuda::barrier(1, warp() == 0 ? 64 : 96); });
  expect_fault({1, 1, 64, 0}, "barrier 1 for 96 threads of 64", [] { cuda::barrier(1, 96); });
  expect_fault({1, 1, 64, 0}, "barrier 1 for 40 threads", [] { cuda::barrier(1, 40); });
  expect_fault({1, 1, 64, 0}, "barrier 16", [] { cuda::barrier(16, 64); });
}

TEST_P(SimtFaults, DeadlockIsAnError) {
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

TEST_P(SimtFaults, CopyInFlightAtTheEndIsAnError) {
  auto input = consecutive(4);
  expect_fault({1, 1, 1, 16}, "copy in flight", [&] { cuda::async_copy16(cuda::shared_memory(), input.data()); });
  expect_fault({1, 1, 1, 16}, "copy in flight", [&] {
    cuda::async_copy16(cuda::shared_memory(), input.data());
    cuda::async_commit();
    cuda::async_wait<1>();
  });
}

TEST_P(SimtFaults, TouchingABlockThatMayNotHaveStartedIsAnError) {
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

TEST_P(SimtFaults, TouchingABlockThatMayHaveLeftIsAnError) {
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

TEST_P(SimtFaults, MisuseOfTheClusterIsAnError) {
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

TEST_P(SimtFaults, MessageSaysWhereAndWhen) {
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

}  // namespace
}  // namespace resnorm::simt
