// SPDX-License-Identifier: BSD-3-Clause
// What the tests of the emulation share.
#pragma once

#include <gtest/gtest.h>

#include <numeric>

#include "buffer.h"
#include "schedules.h"
#include "simt.h"

namespace resnorm::simt {

using ::testing::ExitedWithCode;

inline constexpr Schedule kSchedules[] = {
    {Order::kForward, 0}, {Order::kReverse, 0}, {Order::kRandom, 1}, {Order::kRandom, 2}};

struct alignas(16) Words4 {
  std::uint32_t words[4];
};

inline float float_at(const Words4& words, int i) { return cuda::bits_to_float(words.words[i]); }
inline int lane() { return cuda::thread_index() % 32; }
inline int warp() { return cuda::thread_index() / 32; }
inline float* shared_floats() { return reinterpret_cast<float*>(cuda::shared_memory()); }

// Two at the start of shared memory, and what comes behind them.
inline cuda::TransactionBarrier* transaction_barriers() {
  return reinterpret_cast<cuda::TransactionBarrier*>(cuda::shared_memory());
}
inline constexpr int kTransactionBytes = 2 * sizeof(cuda::TransactionBarrier);
inline float* slots() { return reinterpret_cast<float*>(cuda::shared_memory() + kTransactionBytes); }

// Every thread calls it, at the start.
inline void init_transaction_barriers() {
  if (cuda::thread_index() == 0) {
    cuda::init_barrier(transaction_barriers());
    cuda::init_barrier(transaction_barriers() + 1);
  }
  cuda::cluster_arrive();
  cuda::cluster_wait();
}

inline void store_one(float* at, cuda::TransactionBarrier* barrier, int rank, float value) {
  const float values[1] = {value};
  cuda::store_async(at, barrier, rank, values);
}

template <class T>
T warp_sum(T value) {
  for (int distance = 16; distance > 0; distance /= 2) value += cuda::shuffle_xor(value, distance);
  return value;
}

inline Buffer<float> consecutive(std::size_t size, std::size_t offset = 0) {
  Buffer<float> buffer(size, offset);
  std::iota(buffer.begin(), buffer.end(), 1.0f);
  return buffer;
}

class SimtTest : public ::testing::TestWithParam<Schedule> {
 protected:
  void run(const Launch& configuration, const std::function<void()>& kernel) {
    launch(configuration, kernel, GetParam());
  }

  // The process ends with a message in which `pattern` is found.
  void expect_fault(const Launch& configuration, const char* pattern, const std::function<void()>& kernel) {
    EXPECT_EXIT(run(configuration, kernel), ExitedWithCode(kFailureStatus), pattern);
  }
};

}  // namespace resnorm::simt
