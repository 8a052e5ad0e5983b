// SPDX-License-Identifier: BSD-3-Clause
// What the tests of the CUDA kernels share: the schedules, and how many of their cases ThreadSanitizer is given.
#pragma once

#include <random>

#include "kernels/arguments.h"
#include "kernels/cuda/device.h"
#include "kernels/cuda/plan.h"
#include "schedules.h"

namespace resnorm::cuda::testing {

inline constexpr DType kF32 = DType::kFloat32, kF64 = DType::kFloat64, kBF16 = DType::kBFloat16, kF16 = DType::kFloat16;
inline constexpr std::int64_t kSeed = 0x123456789ABCDEF;

// sm_90 where nothing else is said.
constexpr Device device_of(int architecture = 90, int multiprocessors = 4) {
  return {architecture, multiprocessors, max_shared_bytes(architecture)};
}

#ifdef __SANITIZE_THREAD__
// Its vector clocks make a barrier of n threads cost n^2, so whole grids of cases would take ten minutes. It needs few:
// whether accesses race depends on neither the values nor, for the most part, the order. The stride is prime to the
// lengths of the lists that cases are made of, so every entry of a list has its turn.
inline constexpr simt::Schedule kSchedules[] = {{simt::Order::kRandom, 1}};
inline constexpr int kCaseStride = 13;
#else
inline constexpr simt::Schedule kSchedules[] = {
    {simt::Order::kForward}, {simt::Order::kReverse}, {simt::Order::kRandom, 1}};
inline constexpr int kCaseStride = 1;
#endif

class EmulatedTest : public ::testing::TestWithParam<simt::Schedule> {
 protected:
  void SetUp() override {
    simt::schedule() = GetParam();
    simt::counters() = {};
  }
  void TearDown() override { simt::schedule() = {}; }

  // To be asked once for each case of a grid, the first of which is never left out.
  bool leaves_out_case() { return cases_++ % kCaseStride != 0; }

  std::mt19937_64 generator{20240607};

 private:
  int cases_ = 0;
};

}  // namespace resnorm::cuda::testing
