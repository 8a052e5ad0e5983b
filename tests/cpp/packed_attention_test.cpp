// SPDX-License-Identifier: BSD-3-Clause
#include "packed_attention_problem.h"

namespace resnorm::cpu::testing {
namespace {

class PackedAttentionTest : public KernelTest {};
RESNORM_FOR_EVERY_ISA(PackedAttentionTest);

TEST_P(PackedAttentionTest, MatchesFloat64Reference) {
  for (const DType dtype : kAttentionDTypes) {
    for (const std::int64_t head_dim : {1, 7, 64, 80, 128, 300}) {
      for (const bool causal : {false, true}) {
        AttentionProblem problem(generator, {0, 1, 33, 0, 129, 2}, 2, head_dim, dtype, causal, kLayouts[causal]);
        SCOPED_TRACE(problem.description());
        problem.run(kernels(), serial);
        problem.expect_correct(kernels());
        if (HasFatalFailure()) return;
      }
    }
  }
}

// The softmax continues from one block of keys to the next.
TEST_P(PackedAttentionTest, SequencesOfSeveralBlocks) {
  for (const DType dtype : kAttentionDTypes) {
    for (const bool causal : {false, true}) {
      for (const std::int32_t length : {511, 512, 513, 1100}) {
        AttentionProblem problem(generator, {length}, 1, 9, dtype, causal);
        SCOPED_TRACE(problem.description() << " length " << length);
        problem.run(kernels(), serial);
        problem.expect_correct(kernels());
        if (HasFatalFailure()) return;
      }
    }
  }
}

// Beyond what one row of a group holds.
TEST_P(PackedAttentionTest, VeryWideHeads) {
  for (const DType dtype : kAttentionDTypes) {
    for (const bool causal : {false, true}) {
      AttentionProblem problem(generator, {70, 3}, 1, 1101, dtype, causal);
      SCOPED_TRACE(problem.description());
      problem.run(kernels(), serial);
      problem.expect_correct(kernels());
      if (HasFatalFailure()) return;
    }
  }
}

// Beside an output that is bitwise the same.
TEST_P(PackedAttentionTest, LogsumexpOfTheScores) {
  for (const DType dtype : kAttentionDTypes) {
    for (const bool causal : {false, true}) {
      for (const std::int64_t head_dim : {1, 24}) {
        AttentionProblem problem(generator, {0, 1, 33, 0, 600, 2}, 2, head_dim, dtype, causal), with = problem;
        with.keep_logsumexp();
        SCOPED_TRACE(problem.description());
        problem.run(kernels(), serial);
        with.run(kernels(), serial);
        EXPECT_EQ(problem.output.storage(), with.output.storage());
        with.expect_correct(kernels());
        if (HasFatalFailure()) return;
      }
    }
  }
}

TEST_P(PackedAttentionTest, Dropout) {
  const std::vector<std::pair<std::int64_t, std::vector<std::int32_t>>> cases = {
      {9, {0, 1, 2, 33, 530}}, {64, {1, 129}}, {300, {2, 250}}};
  for (const DType dtype : kAttentionDTypes) {
    for (const bool causal : {false, true}) {
      for (const auto& [head_dim, lengths] : cases) {
        AttentionProblem problem(generator, lengths, 2, head_dim, dtype, causal, kLayouts[causal]);
        problem.keep_logsumexp();
        problem.drop(0.3);
        SCOPED_TRACE(problem.description());
        problem.run(kernels(), serial);
        problem.expect_correct(kernels());
        if (HasFatalFailure()) return;
      }
    }
  }
}

// Whose logarithm of the sum is that of all weights nevertheless.
TEST_P(PackedAttentionTest, DropoutOfEverything) {
  for (const DType dtype : kAttentionDTypes) {
    AttentionProblem problem(generator, {1, 0, 600}, 2, 24, dtype, true);
    problem.keep_logsumexp();
    problem.drop(1);
    problem.run(kernels(), serial);
    problem.expect_correct(kernels());
    for (std::int64_t token = 0; token < 601; ++token) {
      for (std::int64_t i = 0; i < 48; ++i) ASSERT_EQ(problem.output(token, i), 0) << name_of(dtype);
    }
  }
}

TEST_P(PackedAttentionTest, HeadsMayLieAnywhere) {
  for (const DType dtype : kAttentionDTypes) {
    AttentionProblem problem(generator, {5, 40}, 3, 24, dtype, false);
    AttentionProblem interleaved = problem;  // (tokens, heads, 3, head_dim) in place of (tokens, 3, heads, head_dim)
    for (std::int64_t token = 0; token < 45; ++token) {
      for (std::int64_t column = 0; column < 3 * 3 * 24; ++column) {
        const std::int64_t part = column / (3 * 24), head = column / 24 % 3;
        interleaved.qkv.set(token, (head * 3 + part) * 24 + column % 24, problem.qkv(token, column));
      }
    }
    PackedAttention arguments = interleaved.arguments();
    arguments.key = static_cast<const unsigned char*>(arguments.query) + 24 * size_of(dtype);
    arguments.value = static_cast<const unsigned char*>(arguments.query) + 48 * size_of(dtype);
    arguments.head_stride = 72;
    kernels().packed_attention(arguments, serial);
    problem.run(kernels(), serial);
    EXPECT_EQ(problem.output.storage(), interleaved.output.storage()) << name_of(dtype);
  }
}

TEST_P(PackedAttentionTest, AnyScaleFromZeroUp) {
  for (const double scale : {0.0, 1e-3, 2.5}) {
    for (const DType dtype : kAttentionDTypes) {
      AttentionProblem problem(generator, {3, 50}, 1, 16, dtype, true);
      problem.scale = scale;
      problem.run(kernels(), serial);
      SCOPED_TRACE(problem.description() << " scale " << scale);
      problem.expect_correct(kernels());
    }
  }
}

// Whether what follows the last key of a thread's rows is packed depends on the threads: a NaN there shows it.
TEST_P(PackedAttentionTest, ThreadsChangeNothing) {
  for (const DType dtype : kAttentionDTypes) {
    for (const bool causal : {false, true}) {
      for (const double p : {0.0, 0.3}) {
        AttentionProblem alone(generator, {1, 633, 0, 65, 257, 12}, 2, 64, dtype, causal);
        for (std::int64_t token = 650; token < 900; token += 7) alone.set(kValue, token, token % 2, token % 64, kNan);
        alone.keep_logsumexp();
        alone.drop(p);
        AttentionProblem two = alone, five = alone;
        alone.run(kernels(), serial);
        two.run(kernels(), threaded<2>);
        five.run(kernels(), threaded<5>);
        for (const AttentionProblem& other : {two, five}) {
          EXPECT_EQ(alone.output.storage(), other.output.storage()) << alone.description();
          EXPECT_EQ(alone.logsumexp.storage(), other.logsumexp.storage()) << alone.description();
        }
      }
    }
  }
}

TEST_P(PackedAttentionTest, NothingButEmptySequences) {
  for (const std::vector<std::int32_t>& lengths : {std::vector<std::int32_t>{}, {0}, {0, 0, 0}}) {
    AttentionProblem problem(generator, lengths, 2, 8, kFloat32, false);
    problem.keep_logsumexp();
    problem.drop(0.3);
    problem.run(kernels(), serial);
    problem.output.expect_guards_untouched();
    problem.logsumexp.expect_guards_untouched();
  }
}

TEST_P(PackedAttentionTest, ATokenAloneKeepsItsValue) {
  for (const DType dtype : kAttentionDTypes) {
    AttentionProblem problem(generator, {1, 1, 1}, 3, 65, dtype, false);
    problem.run(kernels(), serial);
    for (std::int64_t token = 0; token < 3; ++token) {
      for (std::int64_t i = 0; i < 3 * 65; ++i) {
        ASSERT_EQ(problem.output(token, i), problem.qkv(token, 2 * 3 * 65 + i)) << name_of(dtype);
      }
    }
  }
}

TEST_P(PackedAttentionTest, NanAndInfStayInTheirSequence) {
  for (const DType dtype : kAttentionDTypes) {
    for (const Part part : {kQuery, kKey, kValue}) {
      for (const double value : {kNan, kInfinity, -kInfinity}) {
        AttentionProblem before(generator, {31, 50, 17}, 2, 24, dtype, false);
        AttentionProblem after = before;
        for (std::int64_t token = 31; token < 81; ++token) after.set_all(part, token, value);
        before.run(kernels(), serial);
        after.run(kernels(), serial);
        for (std::int64_t token = 0; token < 98; ++token) {
          for (std::int64_t i = 0; i < 48; ++i) {
            if (token < 31 || token >= 81) {
              ASSERT_EQ(before.output(token, i), after.output(token, i)) << name_of(dtype);
            } else if (part == kValue) {
              const double got = after.output(token, i);
              ASSERT_TRUE(std::isnan(value) ? std::isnan(got) : got == value) << name_of(dtype) << " " << got;
            } else {
              ASSERT_TRUE(std::isnan(after.output(token, i))) << name_of(dtype);
            }
          }
        }
      }
    }
  }
}

TEST_P(PackedAttentionTest, LargeScores) {
  for (const DType dtype : kAttentionDTypes) {
    for (const std::int32_t length : {3, 40, 700}) {
      AttentionProblem problem(generator, {length}, 1, 4, dtype, false);
      problem.keep_logsumexp();
      problem.scale = 1;
      for (std::int64_t token = 0; token < length; ++token) {
        problem.set(kQuery, token, 0, 0, token % 2 ? 8 : -8);  // scores from -80 to 80, and a little
        problem.set(kKey, token, 0, 0, -10 + 20 * static_cast<double>(token) / (length - 1));
      }
      SCOPED_TRACE(problem.description() << " length " << length);
      problem.run(kernels(), serial);
      problem.expect_correct(kernels());
    }
  }
}

// All others' weights are below what even a subnormal number holds, wherever the one is.
TEST_P(PackedAttentionTest, OneDominatingKey) {
  for (const DType dtype : kAttentionDTypes) {
    for (const std::int64_t dominating : {0, 300, 699}) {
      AttentionProblem problem(generator, {700}, 1, 5, dtype, false);
      problem.scale = 1;
      for (std::int64_t token = 0; token < 700; ++token) {
        problem.set(kQuery, token, 0, 0, 20);
        problem.set(kKey, token, 0, 0, token == dominating ? 20 : 0);
      }
      problem.run(kernels(), serial);
      for (std::int64_t token = 0; token < 700; ++token) {
        for (std::int64_t d = 0; d < 5; ++d) {
          ASSERT_EQ(problem.output(token, d), problem.get(kValue, dominating, 0, d)) << name_of(dtype);
        }
      }
    }
  }
}

// A score of -Inf is a weight of 0, be it a whole block's first.
TEST_P(PackedAttentionTest, ScoresOfMinusInfinity) {
  for (const DType dtype : kAttentionDTypes) {
    for (const bool all : {false, true}) {
      AttentionProblem problem(generator, {600}, 1, 8, dtype, false);
      for (std::int64_t token = 0; token < 600; ++token) {
        problem.set(kQuery, token, 0, 3, 1);
        if (all || token < 550) problem.set(kKey, token, 0, 3, -kInfinity);
      }
      problem.run(kernels(), serial);
      problem.expect_correct(kernels());
      EXPECT_EQ(std::isnan(problem.output(0, 0)), all);
    }
  }
}

// Two keys, the values 0 and 1: the output is the second one's weight.
TEST_P(PackedAttentionTest, WeightsAreAccurateDownToTheSmallest) {
  constexpr std::int32_t kPairs = 700;
  AttentionProblem problem(generator, std::vector<std::int32_t>(kPairs, 2), 1, 1, kFloat32, false);
  for (std::int64_t pair = 0; pair < kPairs; ++pair) {
    for (const Part part : {kQuery, kKey, kValue}) problem.set(part, 2 * pair, 0, 0, part == kQuery);
    problem.set(kQuery, 2 * pair + 1, 0, 0, 1);
    problem.set(kKey, 2 * pair + 1, 0, 0, -0.124 * static_cast<double>(pair));
    problem.set(kValue, 2 * pair + 1, 0, 0, 1);
  }
  problem.run(kernels(), serial);
  for (std::int64_t pair = 0; pair < kPairs; ++pair) {
    const double score = problem.get(kKey, 2 * pair + 1, 0, 0), want = std::exp(score) / (1 + std::exp(score));
    // The score times log2(e) is rounded, which counts as many times as the score is large.
    ASSERT_NEAR(problem.output(2 * pair, 0), want, want * 0x1p-24 * (5 + 3 * std::fabs(score))) << score;
  }
}

}  // namespace
}  // namespace resnorm::cpu::testing
