// SPDX-License-Identifier: BSD-3-Clause
// What AddressSanitizer sees in the emulation, where the tests are built with it.
#ifdef __SANITIZE_ADDRESS__

#include "simt_test.h"

namespace resnorm::simt {
namespace {

class SimtMemory : public SimtTest {};
RESNORM_FOR_SCHEDULES(SimtMemory, kSchedules);

TEST_P(SimtMemory, AddressSanitizerSeesOneByteTooMany) {
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

// Neither reads nor writes: nobody knows what a barrier looks like.
TEST_P(SimtMemory, AddressSanitizerSeesAccessesOfATransactionBarrier) {
  Buffer<float> output(4);
  EXPECT_DEATH(run({1, 1, 1, kTransactionBytes},
                   [&] {
                     init_transaction_barriers();
                     output[0] = shared_floats()[1];
                   }),
               "use-after-poison");
  EXPECT_DEATH(run({1, 1, 1, kTransactionBytes},
                   [] {
                     init_transaction_barriers();
                     shared_floats()[3] = 1.0f;
                   }),
               "use-after-poison");
  EXPECT_DEATH(run({1, 1, 1, kTransactionBytes},
                   [&] {
                     init_transaction_barriers();
                     cuda::store(output.data(), cuda::load_staged<Words4>(cuda::shared_memory()));
                   }),
               "use-after-poison");
}

}  // namespace
}  // namespace resnorm::simt

#endif
