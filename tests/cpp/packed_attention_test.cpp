// SPDX-License-Identifier: BSD-3-Clause
#include <limits>
#include <numeric>

#include "fixture.h"

namespace resnorm::cpu::testing {
namespace {

using enum DType;

class PackedAttentionTest : public KernelTest {};
RESNORM_FOR_EVERY_ISA(PackedAttentionTest);

constexpr double kInfinity = std::numeric_limits<double>::infinity();
const double kNan = std::nan("");
const std::vector<DType> kDTypes = {kFloat32, kBFloat16, kFloat16};

enum Part { kQuery, kKey, kValue };

struct Problem {
  std::vector<std::int32_t> cu_seqlens{0};
  std::int64_t heads, head_dim;
  double scale;
  bool causal;
  Matrix qkv, output;

  Problem(std::mt19937_64& generator, const std::vector<std::int32_t>& lengths, std::int64_t head_count,
          std::int64_t dim, DType dtype, bool is_causal, Layout layout = {})
      : heads(head_count), head_dim(dim), scale(1 / std::sqrt(static_cast<double>(dim))), causal(is_causal) {
    for (const auto length : lengths) cu_seqlens.push_back(cu_seqlens.back() + length);
    qkv = Matrix::random(generator, cu_seqlens.back(), 3 * heads * head_dim, dtype, layout);
    output = Matrix(cu_seqlens.back(), heads * head_dim, dtype, {0, layout.offset});
  }

  std::int64_t column(Part part, std::int64_t head, std::int64_t d) const {
    return (part * heads + head) * head_dim + d;
  }
  double get(Part part, std::int64_t token, std::int64_t head, std::int64_t d) const {
    return qkv(token, column(part, head, d));
  }
  void set(Part part, std::int64_t token, std::int64_t head, std::int64_t d, double value) {
    qkv.set(token, column(part, head, d), value);
  }
  void set_all(Part part, std::int64_t token, double value) {
    for (std::int64_t i = 0; i < heads * head_dim; ++i) qkv.set(token, part * heads * head_dim + i, value);
  }

  PackedAttention arguments() {
    const ConstRows rows = qkv.const_operand();
    const auto* data = static_cast<const unsigned char*>(rows.data);
    const std::int64_t part = heads * head_dim * size_of(rows.dtype);
    return {.sequences = static_cast<std::int64_t>(cu_seqlens.size()) - 1,
            .heads = heads,
            .head_dim = head_dim,
            .cu_seqlens = cu_seqlens.data(),
            .query = data,
            .key = data + part,
            .value = data + 2 * part,
            .token_stride = rows.row_stride,
            .head_stride = head_dim,
            .dtype = rows.dtype,
            .scale = scale,
            .causal = causal,
            .output = output.operand().data};
  }

  void run(const KernelTable& kernels, ParallelFor parallel_for) {
    kernels.packed_attention(arguments(), parallel_for);
  }

  // One head of one sequence in float64, straight from the formula.
  void attend(std::int64_t begin, std::int64_t end, std::int64_t head, Values& result, Values& error_scale) const {
    std::vector<double> weights(static_cast<std::size_t>(end - begin)), sizes(weights.size());
    for (std::int64_t row = begin; row < end; ++row) {
      const std::int64_t keys = causal ? row + 1 - begin : end - begin;
      double largest = -kInfinity, denominator = 0;
      for (std::int64_t j = 0; j < keys; ++j) {
        double score = 0, size = 0;
        for (std::int64_t d = 0; d < head_dim; ++d) {
          const double product = get(kQuery, row, head, d) * get(kKey, begin + j, head, d);
          score += product;
          size += std::fabs(product);
        }
        weights[j] = score * scale;
        sizes[j] = size * scale;
        largest = std::max(largest, weights[j]);
      }
      for (std::int64_t j = 0; j < keys; ++j) denominator += weights[j] = std::exp(weights[j] - largest);
      for (std::int64_t d = 0; d < head_dim; ++d) {
        double sum = 0, size = 0;
        for (std::int64_t j = 0; j < keys; ++j) {
          const double value = weights[j] / denominator * get(kValue, begin + j, head, d);
          sum += value;
          // A score that is off by so much changes its weight by as much, relatively.
          size += std::fabs(value) * (1 + (std::isfinite(sizes[j]) ? sizes[j] : 0));
        }
        result(row, head * head_dim + d) = sum;
        error_scale(row, head * head_dim + d) = size;
      }
    }
  }

  // Where the products are of bfloat16, so are the weights.
  void expect_correct(const KernelTable& kernels) const {
    Values expected(output.rows(), output.cols()), error_scale(output.rows(), output.cols());
    for (std::size_t i = 0; i + 1 < cu_seqlens.size(); ++i) {
      for (std::int64_t head = 0; head < heads; ++head) {
        attend(cu_seqlens[i], cu_seqlens[i + 1], head, expected, error_scale);
      }
    }
    const bool rounds_weights = std::string(kernels.isa) == "avx512_bf16" && qkv.dtype() == kBFloat16;
    expect_close(output, expected, error_scale, rounds_weights ? kBFloat16 : kFloat32, rounds_weights ? 1 : 8,
                 "output");
  }

  ::testing::Message description() const {
    return ::testing::Message() << name_of(qkv.dtype()) << " " << heads << " heads of " << head_dim
                                << (causal ? " causal" : "");
  }
};

TEST_P(PackedAttentionTest, MatchesFloat64Reference) {
  for (const DType dtype : kDTypes) {
    for (const std::int64_t head_dim : {1, 7, 64, 80, 128, 300}) {
      for (const bool causal : {false, true}) {
        Problem problem(generator, {0, 1, 33, 0, 129, 2}, 2, head_dim, dtype, causal, kLayouts[causal]);
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
  for (const DType dtype : kDTypes) {
    for (const bool causal : {false, true}) {
      for (const std::int32_t length : {511, 512, 513, 1100}) {
        Problem problem(generator, {length}, 1, 9, dtype, causal);
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
  for (const DType dtype : kDTypes) {
    for (const bool causal : {false, true}) {
      Problem problem(generator, {70, 3}, 1, 1101, dtype, causal);
      SCOPED_TRACE(problem.description());
      problem.run(kernels(), serial);
      problem.expect_correct(kernels());
      if (HasFatalFailure()) return;
    }
  }
}

TEST_P(PackedAttentionTest, HeadsMayLieAnywhere) {
  for (const DType dtype : kDTypes) {
    Problem problem(generator, {5, 40}, 3, 24, dtype, false);
    Problem interleaved = problem;  // (tokens, heads, 3, head_dim) in place of (tokens, 3, heads, head_dim)
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
    for (const DType dtype : kDTypes) {
      Problem problem(generator, {3, 50}, 1, 16, dtype, true);
      problem.scale = scale;
      problem.run(kernels(), serial);
      SCOPED_TRACE(problem.description() << " scale " << scale);
      problem.expect_correct(kernels());
    }
  }
}

// Whether what follows the last key of a thread's rows is packed depends on the threads: a NaN there shows it.
TEST_P(PackedAttentionTest, ThreadsChangeNothing) {
  for (const DType dtype : kDTypes) {
    for (const bool causal : {false, true}) {
      Problem alone(generator, {1, 633, 0, 65, 257, 12}, 2, 64, dtype, causal);
      for (std::int64_t token = 650; token < 900; token += 7) alone.set(kValue, token, token % 2, token % 64, kNan);
      Problem two = alone, five = alone;
      alone.run(kernels(), serial);
      two.run(kernels(), threaded<2>);
      five.run(kernels(), threaded<5>);
      EXPECT_EQ(alone.output.storage(), two.output.storage()) << name_of(dtype);
      EXPECT_EQ(alone.output.storage(), five.output.storage()) << name_of(dtype);
    }
  }
}

TEST_P(PackedAttentionTest, NothingButEmptySequences) {
  for (const std::vector<std::int32_t>& lengths : {std::vector<std::int32_t>{}, {0}, {0, 0, 0}}) {
    Problem problem(generator, lengths, 2, 8, kFloat32, false);
    problem.run(kernels(), serial);
    problem.output.expect_guards_untouched();
  }
}

TEST_P(PackedAttentionTest, ATokenAloneKeepsItsValue) {
  for (const DType dtype : kDTypes) {
    Problem problem(generator, {1, 1, 1}, 3, 65, dtype, false);
    problem.run(kernels(), serial);
    for (std::int64_t token = 0; token < 3; ++token) {
      for (std::int64_t i = 0; i < 3 * 65; ++i) {
        ASSERT_EQ(problem.output(token, i), problem.qkv(token, 2 * 3 * 65 + i)) << name_of(dtype);
      }
    }
  }
}

TEST_P(PackedAttentionTest, NanAndInfStayInTheirSequence) {
  for (const DType dtype : kDTypes) {
    for (const Part part : {kQuery, kKey, kValue}) {
      for (const double value : {kNan, kInfinity, -kInfinity}) {
        Problem before(generator, {31, 50, 17}, 2, 24, dtype, false);
        Problem after = before;
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
  for (const DType dtype : kDTypes) {
    for (const std::int32_t length : {3, 40, 700}) {
      Problem problem(generator, {length}, 1, 4, dtype, false);
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
  for (const DType dtype : kDTypes) {
    for (const std::int64_t dominating : {0, 300, 699}) {
      Problem problem(generator, {700}, 1, 5, dtype, false);
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
  for (const DType dtype : kDTypes) {
    for (const bool all : {false, true}) {
      Problem problem(generator, {600}, 1, 8, dtype, false);
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
  Problem problem(generator, std::vector<std::int32_t>(kPairs, 2), 1, 1, kFloat32, false);
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
