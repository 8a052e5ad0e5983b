// SPDX-License-Identifier: BSD-3-Clause
#include "kernels/philox.h"

#include <gtest/gtest.h>

#include <set>

namespace resnorm::philox {
namespace {

void expect_words(std::uint64_t counter, std::uint64_t key, const std::uint32_t (&words)[4]) {
  const Block actual = block(counter, key);
  for (int word = 0; word < 4; ++word) EXPECT_EQ(actual.words[word], words[word]) << "word " << word;
}

// The vector of zeros is Random123's published known answer.
TEST(Philox, KnownAnswers) { expect_words(0, 0, {0x6627E8D5U, 0xE169C58DU, 0xBC57AC4CU, 0x9B00DBD8U}); }

// The rounds written out with 128 bits of counter, as in the paper: counter words beyond the second are zero.
TEST(Philox, AgreesWithThePapersRounds) {
  for (const std::uint64_t counter : {0ULL, 1ULL, 0xFFFFFFFFULL, 0x123456789ABCDEFULL, ~0ULL}) {
    for (const std::uint64_t key : {0ULL, 42ULL, 0xDEADBEEF00000001ULL, ~0ULL}) {
      std::uint32_t x[4] = {std::uint32_t(counter), std::uint32_t(counter >> 32), 0, 0};
      std::uint32_t k[2] = {std::uint32_t(key), std::uint32_t(key >> 32)};
      for (int round = 0; round < 10; ++round) {
        const unsigned __int128 left = static_cast<unsigned __int128>(x[0]) * 0xD2511F53U;
        const unsigned __int128 right = static_cast<unsigned __int128>(x[2]) * 0xCD9E8D57U;
        const std::uint32_t next[4] = {std::uint32_t(right >> 32) ^ x[1] ^ k[0], std::uint32_t(right),
                                       std::uint32_t(left >> 32) ^ x[3] ^ k[1], std::uint32_t(left)};
        std::copy(next, next + 4, x);
        k[0] += 0x9E3779B9U;
        k[1] += 0xBB67AE85U;
      }
      expect_words(counter, key, x);
    }
  }
}

TEST(Philox, EveryCounterBitAndKeyBitCounts) {
  std::set<std::uint64_t> seen;
  const auto insert = [&](const Block& block) {
    seen.insert(block.words[0] | static_cast<std::uint64_t>(block.words[1]) << 32);
  };
  for (int bit = 0; bit < 64; ++bit) {
    insert(block(std::uint64_t{1} << bit, 7));
    insert(block(7, std::uint64_t{1} << bit));
  }
  EXPECT_EQ(seen.size(), 128U);
}

}  // namespace
}  // namespace resnorm::philox
