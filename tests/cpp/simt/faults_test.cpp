// SPDX-License-Identifier: BSD-3-Clause
// Small kernels with the classic faults, which the emulation reports.
#include <utility>

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

TEST_P(SimtFaults, MisuseOfTheClusterIsAnError) {
  expect_fault({1, 1, 1, 4}, "without having arrived", [] { cuda::cluster_wait(); });
  expect_fault({2, 2, 1, 4}, "twice", [] {
    cuda::cluster_arrive();
    cuda::cluster_arrive();
  });
}

// For asynchronous stores: two barriers, and room for a vector.
constexpr Launch kAlone = {1, 1, 1, kTransactionBytes + 16}, kTwoBlocks = {2, 2, 1, kTransactionBytes + 16};

TEST_P(SimtFaults, AsynchronousStoreToABlockThatMayNotHaveStartedIsAnError) {
  const auto send = [] { store_one(slots(), transaction_barriers(), 1 - cuda::cluster_rank(), 1.0f); };
  expect_fault(kTwoBlocks, "may not have started", [&] {
    cuda::init_barrier(transaction_barriers());
    send();
  });
  // To arrive is not enough.
  expect_fault(kTwoBlocks, "may not have started", [&] {
    cuda::init_barrier(transaction_barriers());
    cuda::cluster_arrive();
    send();
  });
}

TEST_P(SimtFaults, AsynchronousStoreToABlockThatHasLeftIsAnError) {
  // It leaves once it has arrived: a block of one thread, so that it has left when the other one stores in any order.
  expect_fault(kTwoBlocks, "which has left", [] {
    init_transaction_barriers();
    cuda::cluster_arrive();
    if (cuda::cluster_rank() == 0) return;
    cuda::cluster_wait();
    store_one(slots(), transaction_barriers(), 0, 1.0f);
  });
}

TEST_P(SimtFaults, LeavingWithAnAsynchronousStoreInFlightIsAnError) {
  // By the order, before it is sent or after.
  expect_fault({2, 2, 64, kTransactionBytes + 16}, "which has left|left with asynchronous stores to it in flight", [] {
    init_transaction_barriers();
    if (cuda::cluster_rank() == 1 && cuda::thread_index() == 0) cuda::expect_bytes(transaction_barriers(), 4);
    if (cuda::cluster_rank() == 0 && cuda::thread_index() == 0) store_one(slots(), transaction_barriers(), 1, 1.0f);
  });
  expect_fault(kAlone, "left with asynchronous stores to it in flight: nobody has waited for 8 bytes", [] {
    init_transaction_barriers();
    cuda::store_async(slots(), transaction_barriers() + 1, 0, {1.0f, 2.0f});
  });
  // That all bytes have been sent does not mean that they are there.
  expect_fault(kAlone, "left with asynchronous stores to it in flight", [] {
    init_transaction_barriers();
    store_one(slots(), transaction_barriers(), 0, 1.0f);
    cuda::expect_bytes(transaction_barriers(), 4);
  });
  // To have waited for the phase before is not enough.
  expect_fault(kAlone, "left with asynchronous stores to it in flight", [] {
    init_transaction_barriers();
    store_one(slots(), transaction_barriers(), 0, 1.0f);
    cuda::expect_bytes(transaction_barriers(), 4);
    cuda::wait_for_bytes(transaction_barriers(), 0);
    store_one(slots(), transaction_barriers(), 0, 1.0f);
    cuda::wait_for_bytes(transaction_barriers(), 0);
  });
}

TEST_P(SimtFaults, BytesThatAreNotExpectedAreAnError) {
  expect_fault(kAlone, "8 bytes have come in phase 0, which expects 4", [] {
    init_transaction_barriers();
    cuda::expect_bytes(transaction_barriers(), 4);
    cuda::store_async(slots(), transaction_barriers(), 0, {1.0f, 2.0f});
  });
  expect_fault(kAlone, "8 bytes have come in phase 0, which expects 4", [] {
    init_transaction_barriers();
    cuda::store_async(slots(), transaction_barriers(), 0, {1.0f, 2.0f});
    cuda::expect_bytes(transaction_barriers(), 4);
  });
  // Nobody has waited, so the second store may be the first to arrive.
  expect_fault(kTwoBlocks, "8 bytes have come in phase 0, which expects 4", [] {
    init_transaction_barriers();
    if (cuda::cluster_rank() == 0) {
      store_one(slots(), transaction_barriers(), 1, 1.0f);
      store_one(slots(), transaction_barriers(), 1, 2.0f);
    } else {
      cuda::expect_bytes(transaction_barriers(), 4);
      cuda::wait_for_bytes(transaction_barriers(), 0);
    }
  });
}

TEST_P(SimtFaults, BytesExpectedTwiceAreAnError) {
  expect_fault(kAlone, "expected twice in phase 0", [] {
    init_transaction_barriers();
    cuda::expect_bytes(transaction_barriers(), 4);
    cuda::expect_bytes(transaction_barriers(), 4);
  });
  expect_fault(kAlone, "expected twice in phase 0, whose end nobody has seen", [] {
    init_transaction_barriers();
    store_one(slots(), transaction_barriers(), 0, 1.0f);
    cuda::expect_bytes(transaction_barriers(), 4);
    cuda::expect_bytes(transaction_barriers(), 4);
  });
  expect_fault(kAlone, "-4 bytes are expected", [] {
    init_transaction_barriers();
    cuda::expect_bytes(transaction_barriers(), -4);
  });
  expect_fault(kAlone, "1048576 bytes are expected", [] {
    init_transaction_barriers();
    cuda::expect_bytes(transaction_barriers(), 1 << 20);
  });
}

TEST_P(SimtFaults, BarrierThatIsNotInitialisedIsAnError) {
  const auto meet = [] {
    cuda::cluster_arrive();
    cuda::cluster_wait();
  };
  expect_fault(kAlone, "byte 0 .* is not initialised", [] { cuda::expect_bytes(transaction_barriers(), 4); });
  expect_fault(kAlone, "byte 8 .* is not initialised", [] { cuda::wait_for_bytes(transaction_barriers() + 1, 0); });
  expect_fault(kTwoBlocks, "byte 0 of block 1 of the cluster is not initialised", [&] {
    if (cuda::cluster_rank() == 0) cuda::init_barrier(transaction_barriers());
    meet();
    if (cuda::cluster_rank() == 0) store_one(slots(), transaction_barriers(), 1, 1.0f);
    meet();
  });
  // Another thread has initialised it, but nothing says when.
  expect_fault({1, 1, 2, kTransactionBytes}, "(is not|may not be) initialised", [] {
    if (cuda::thread_index() == 0) cuda::init_barrier(transaction_barriers());
    if (cuda::thread_index() == 1) cuda::expect_bytes(transaction_barriers(), 4);
  });
  // Between arrival and wait: others need not have waited for that.
  expect_fault({1, 1, 2, kTransactionBytes}, "(is not|may not be) initialised", [] {
    cuda::cluster_arrive();
    if (cuda::thread_index() == 0) cuda::init_barrier(transaction_barriers());
    cuda::cluster_wait();
    if (cuda::thread_index() == 1) cuda::expect_bytes(transaction_barriers(), 4);
  });
  expect_fault(kAlone, "byte 0 is initialised twice", [] {
    cuda::init_barrier(transaction_barriers());
    cuda::init_barrier(transaction_barriers());
  });
}

TEST_P(SimtFaults, BarrierThatIsOverwrittenIsAnError) {
  expect_fault(kAlone, "asynchronous store over the barrier at byte 8", [] {
    init_transaction_barriers();
    cuda::store_async(slots() - 2, transaction_barriers(), 0, {1.0f, 2.0f});
  });
#ifndef __SANITIZE_ADDRESS__  // which sees it when it happens
  expect_fault(kAlone, "byte 0 of block 0 of the cluster was overwritten", [] {
    init_transaction_barriers();
    shared_floats()[1] = 1.0f;
    cuda::wait_for_bytes(transaction_barriers(), 0);
  });
  expect_fault(kAlone, "byte 8 of block 0 of the cluster was overwritten", [] {
    init_transaction_barriers();
    shared_floats()[2] = 1.0f;
  });
#endif
}

TEST_P(SimtFaults, WaitThatMayBeTooLateIsAnError) {
  const auto phase = [](int parity) {
    cuda::expect_bytes(transaction_barriers(), 4);
    store_one(slots(), transaction_barriers(), 0, 1.0f);
    cuda::wait_for_bytes(transaction_barriers(), parity);
  };
  // The first phase is over, now or soon: then this is a wait for the next one.
  expect_fault(kAlone, "waits for parity 1, while phase 0 may be over", [&] {
    init_transaction_barriers();
    phase(1);
  });
  expect_fault(kAlone, "waits for parity 0, while phase 1 may be over", [&] {
    init_transaction_barriers();
    phase(0);
    phase(0);
  });
  expect_fault(kAlone, "a phase of parity 2", [&] {
    init_transaction_barriers();
    phase(2);
  });
}

TEST_P(SimtFaults, BytesThatDoNotComeAreADeadlock) {
  expect_fault({1, 1, 64, kTransactionBytes},
               "deadlock: of 64 .* 64 for bytes; .* byte 8 .* block 0 .* none are expected", [] {
                 init_transaction_barriers();
                 cuda::wait_for_bytes(transaction_barriers() + 1, 0);
               });
  expect_fault({4, 2, 1, kTransactionBytes + 16}, "deadlock: of 1 .* 1 for bytes; .* phase 1, where 8 bytes .* of 12",
               [] {
                 init_transaction_barriers();
                 if (cuda::cluster_rank() == 0) return;
                 for (int phase = 0; phase < 2; ++phase) {
                   cuda::store_async(slots(), transaction_barriers(), 1, {1.0f, 2.0f});
                   cuda::expect_bytes(transaction_barriers(), 8 + 4 * phase);
                   cuda::wait_for_bytes(transaction_barriers(), phase);
                 }
               });
}

TEST_P(SimtFaults, AsynchronousStoreToTheWrongPlaceIsAnError) {
  static constexpr Launch kPlaces = {1, 1, 1, kTransactionBytes + 32};
  auto buffer = consecutive(4);
  const auto store_at = [](float* at, const auto& values) {
    init_transaction_barriers();
    cuda::store_async(at, transaction_barriers(), 0, values);
  };
  static constexpr float kOne[1] = {}, kTwo[2] = {}, kFour[4] = {};
  const auto unaligned = [] { return reinterpret_cast<float*>(cuda::shared_memory() + kTransactionBytes + 2); };
  expect_fault(kPlaces, "misaligned asynchronous store", [&] { store_at(unaligned(), kOne); });
  expect_fault(kPlaces, "misaligned asynchronous store", [&] { store_at(slots() + 1, kTwo); });
  expect_fault(kPlaces, "misaligned asynchronous store", [&] { store_at(slots() + 2, kFour); });
  expect_fault(kPlaces, "asynchronous store: .* outside of shared", [&] { store_at(slots() + 8, kOne); });
  expect_fault(kPlaces, "asynchronous store: .* outside of shared", [&] { store_at(slots() + 8, kFour); });
  expect_fault(kPlaces, "asynchronous store: .* outside of shared", [&] { store_at(buffer.data(), kOne); });
  expect_fault(kPlaces, "block 1 of a cluster of 1", [] {
    init_transaction_barriers();
    store_one(slots(), transaction_barriers(), 1, 1.0f);
  });
  expect_fault(kPlaces, "block -1 of a cluster of 1", [] {
    init_transaction_barriers();
    store_one(slots(), transaction_barriers(), -1, 1.0f);
  });
}

TEST_P(SimtFaults, TransactionBarrierInTheWrongPlaceIsAnError) {
  const auto place = [](int byte) { return reinterpret_cast<cuda::TransactionBarrier*>(cuda::shared_memory() + byte); };
  for (const auto& [byte, message] : {std::pair(4, "misaligned barrier"), {32, "barrier: .* outside of shared"}}) {
    expect_fault({1, 1, 1, 32}, message, [&, byte = byte] { cuda::init_barrier(place(byte)); });
    expect_fault({1, 1, 1, 32}, message, [&, byte = byte] { cuda::expect_bytes(place(byte), 4); });
    expect_fault({1, 1, 1, 32}, message, [&, byte = byte] { cuda::wait_for_bytes(place(byte), 0); });
    expect_fault({1, 1, 1, 32}, message, [&, byte = byte] { store_one(slots(), place(byte), 0, 1.0f); });
  }
  cuda::TransactionBarrier elsewhere;
  expect_fault({1, 1, 1, 32}, "barrier: .* outside of shared", [&] { cuda::init_barrier(&elsewhere); });
}

TEST_P(SimtFaults, OverlappedKernelThatIsNotAwaitedIsAnError) {
  auto buffer = consecutive(4);
  Launch overlapping{1, 1, 1, 16};
  overlapping.overlaps = true;
  const char* const message = "which it overlaps, was not awaited";
  expect_fault(overlapping, message, [&] { cuda::load_once<Words4>(buffer.data()); });
  expect_fault(overlapping, message, [&] { cuda::store(buffer.data(), Words4{}); });
  expect_fault(overlapping, message, [&] { cuda::async_copy16(cuda::shared_memory(), buffer.data()); });
  expect_fault(overlapping, message, [] {});
  expect_fault(overlapping, "read-only load", [&] { cuda::load_kept<Words4>(buffer.data()); });
  run(overlapping, [&] {
    cuda::await_previous_kernel();
    cuda::load_once<Words4>(buffer.data());
  });
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
