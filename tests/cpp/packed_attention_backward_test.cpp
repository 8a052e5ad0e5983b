// SPDX-License-Identifier: BSD-3-Clause
#include "packed_attention_problem.h"

namespace resnorm::cpu::testing {
namespace {

class PackedAttentionBackwardTest : public KernelTest {};
RESNORM_FOR_EVERY_ISA(PackedAttentionBackwardTest);

// Adds factor * from to a row, and how far off that may be to the row's error.
void add(double factor, double error, const double* from, std::int64_t size, double* to, double* to_error) {
  for (std::int64_t i = 0; i < size; ++i) {
    to[i] += factor * from[i];
    to_error[i] += error * std::fabs(from[i]);
  }
}

struct BackwardProblem : AttentionProblem {
  Matrix grad_output, grad_qkv;

  BackwardProblem(std::mt19937_64& generator, const std::vector<std::int32_t>& lengths, std::int64_t head_count,
                  std::int64_t dim, DType dtype, bool is_causal, double p = 0, Layout layout = {})
      : AttentionProblem(generator, lengths, head_count, dim, dtype, is_causal, layout) {
    keep_logsumexp();
    drop(p);
    grad_output = Matrix::random(generator, tokens(), heads * head_dim, dtype, {0, layout.offset});
    grad_qkv = Matrix(tokens(), 3 * heads * head_dim, dtype, layout);
  }

  PackedAttentionBackward backward_arguments() {
    const Rows grad = grad_qkv.operand();
    auto* data = static_cast<unsigned char*>(grad.data);
    const std::int64_t part = heads * head_dim * size_of(grad.dtype);
    return {.forward = arguments(),
            .grad_output = grad_output.operand().data,
            .grad_query = data,
            .grad_key = data + part,
            .grad_value = data + 2 * part,
            .grad_token_stride = grad.row_stride,
            .grad_head_stride = head_dim};
  }

  void run(const KernelTable& kernels, ParallelFor parallel_for) {
    AttentionProblem::run(kernels, parallel_for);
    kernels.packed_attention_backward(backward_arguments(), parallel_for);
  }

  // One head of one sequence in float64, from the operands as they are stored, and what each gradient may be off by, in
  // roundings of float32. `rounding` is that of weights and score gradients.
  void differentiate(std::int64_t begin, std::int64_t end, std::int64_t head, double rounding, Values& expected,
                     Values& error) const {
    const HeadRows query = rows_of(kQuery, begin, end, head), key = rows_of(kKey, begin, end, head),
                   value = rows_of(kValue, begin, end, head), grad(grad_output, begin, end, head * head_dim, head_dim),
                   result(output, begin, end, head * head_dim, head_dim);
    std::vector<double> weights(static_cast<std::size_t>(end - begin));
    for (std::int64_t i = 0; i < end - begin; ++i) {
      const std::int64_t keys = visible_keys(begin + i, begin, end);
      double largest = -kInfinity, largest_size = 0, denominator = 0;
      for (std::int64_t j = 0; j < keys; ++j) {
        weights[j] = dot(query[i], key[j], head_dim) * scale;
        largest = std::max(largest, weights[j]);
        largest_size = std::max(largest_size, query.norm(i) * key.norm(j) * scale);
      }
      for (std::int64_t j = 0; j < keys; ++j) denominator += weights[j] = std::exp(weights[j] - largest);

      // What scores and their logsumexp are off by changes a weight by as much, relatively.
      const double roundings = 8 * (1 + largest_size + std::fabs(largest + std::log(denominator)));
      const double output_product = dot(grad[i], result[i], head_dim);
      const double output_product_size = grad.norm(i) * result.norm(i);
      const KeepMask kept = kept_keys(begin + i, head, keys);
      for (std::int64_t j = 0; j < keys; ++j) {
        const double weight = weights[j] / denominator, drop_scale = kept(0, j) ? dropout.scale : 0;
        const double dropped = weight * drop_scale;
        const double grad_weight = drop_scale * dot(grad[i], value[j], head_dim);
        const double size = drop_scale * grad.norm(i) * value.norm(j) + output_product_size;
        const double grad_score = weight * (grad_weight - output_product) * scale;
        const double grad_score_error = roundings * weight * size * scale + rounding * std::fabs(grad_score);
        const auto add_to = [&](Part part, std::int64_t row, double factor, double error_of_factor,
                                const double* from) {
          const std::int64_t first = column(part, head, 0);
          add(factor, error_of_factor, from, head_dim, &expected(begin + row, first), &error(begin + row, first));
        };
        add_to(kQuery, i, grad_score, grad_score_error, key[j]);
        add_to(kKey, j, grad_score, grad_score_error, query[i]);
        add_to(kValue, j, dropped, (roundings + rounding) * dropped, grad[i]);
      }
    }
  }

  void expect_correct(const KernelTable& kernels) const {
    Values expected(grad_qkv.rows(), grad_qkv.cols()), error(grad_qkv.rows(), grad_qkv.cols());
    const double rounding =
        rounds_weights(kernels, qkv.dtype()) ? unit_roundoff(kBFloat16) / unit_roundoff(kFloat32) : 0;
    for (std::size_t i = 0; i + 1 < cu_seqlens.size(); ++i) {
      for (std::int64_t head = 0; head < heads; ++head) {
        differentiate(cu_seqlens[i], cu_seqlens[i + 1], head, rounding, expected, error);
      }
    }
    expect_close(grad_qkv, expected, error, kFloat32, 1, "gradient");
  }
};

TEST_P(PackedAttentionBackwardTest, MatchesFloat64Formula) {
  for (const DType dtype : kAttentionDTypes) {
    for (const std::int64_t head_dim : {1, 7, 64, 80, 300}) {
      for (const bool causal : {false, true}) {
        BackwardProblem problem(generator, {0, 1, 33, 0, 129, 2}, 2, head_dim, dtype, causal, 0, kLayouts[causal]);
        SCOPED_TRACE(problem.description());
        problem.run(kernels(), serial);
        problem.expect_correct(kernels());
        if (HasFatalFailure()) return;
      }
    }
  }
}

TEST_P(PackedAttentionBackwardTest, SequencesOfSeveralBlocks) {
  const std::vector<std::pair<std::int64_t, std::vector<std::int32_t>>> cases = {{9, {511, 512, 513, 1030}},
                                                                                 {64, {255, 256, 257, 520}}};
  for (const DType dtype : kAttentionDTypes) {
    for (const bool causal : {false, true}) {
      for (const auto& [head_dim, lengths] : cases) {
        BackwardProblem problem(generator, lengths, 1, head_dim, dtype, causal);
        SCOPED_TRACE(problem.description());
        problem.run(kernels(), serial);
        problem.expect_correct(kernels());
        if (HasFatalFailure()) return;
      }
    }
  }
}

TEST_P(PackedAttentionBackwardTest, VeryWideHeads) {
  for (const DType dtype : kAttentionDTypes) {
    for (const bool causal : {false, true}) {
      BackwardProblem problem(generator, {50, 3}, 1, 1101, dtype, causal);
      SCOPED_TRACE(problem.description());
      problem.run(kernels(), serial);
      problem.expect_correct(kernels());
      if (HasFatalFailure()) return;
    }
  }
}

TEST_P(PackedAttentionBackwardTest, Dropout) {
  const std::vector<std::pair<std::int64_t, std::vector<std::int32_t>>> cases = {
      {7, {0, 1, 2, 33, 129}}, {9, {530}}, {64, {300}}};
  for (const DType dtype : kAttentionDTypes) {
    for (const bool causal : {false, true}) {
      for (const auto& [head_dim, lengths] : cases) {
        BackwardProblem problem(generator, lengths, 2, head_dim, dtype, causal, 0.3, kLayouts[causal]);
        SCOPED_TRACE(problem.description());
        problem.run(kernels(), serial);
        problem.expect_correct(kernels());
        if (HasFatalFailure()) return;
      }
    }
  }
}

TEST_P(PackedAttentionBackwardTest, DropoutOfEverything) {
  for (const DType dtype : kAttentionDTypes) {
    BackwardProblem problem(generator, {1, 0, 70}, 2, 24, dtype, false, 1);
    problem.run(kernels(), serial);
    for (std::int64_t token = 0; token < 71; ++token) {
      for (std::int64_t i = 0; i < 3 * 48; ++i) ASSERT_EQ(problem.grad_qkv(token, i), 0) << name_of(dtype);
    }
  }
}

// Heads and gradients as (tokens, heads, 3, head_dim), the gradients' heads two elements apart that nobody writes.
TEST_P(PackedAttentionBackwardTest, HeadsAndGradientsMayLieAnywhere) {
  constexpr std::int64_t kTokens = 45, kHeads = 3, kDim = 24, kGradHead = 3 * kDim + 2;
  for (const DType dtype : kAttentionDTypes) {
    BackwardProblem problem(generator, {5, 40}, kHeads, kDim, dtype, true, 0.3, {3, 1}), other = problem;
    other.grad_qkv = Matrix(kTokens, kHeads * kGradHead, dtype, {5, 1});
    for (std::int64_t token = 0; token < kTokens; ++token) {
      for (std::int64_t i = 0; i < kHeads * kGradHead; ++i) other.grad_qkv.set(token, i, 42);
      for (std::int64_t column = 0; column < 3 * kHeads * kDim; ++column) {
        const std::int64_t part = column / (kHeads * kDim), head = column / kDim % kHeads;
        other.qkv.set(token, (head * 3 + part) * kDim + column % kDim, problem.qkv(token, column));
      }
    }
    PackedAttentionBackward arguments = other.backward_arguments();
    const std::int64_t part = kDim * size_of(dtype);
    arguments.forward.key = static_cast<const unsigned char*>(arguments.forward.query) + part;
    arguments.forward.value = static_cast<const unsigned char*>(arguments.forward.query) + 2 * part;
    arguments.forward.head_stride = 3 * kDim;
    arguments.grad_key = static_cast<unsigned char*>(arguments.grad_query) + part;
    arguments.grad_value = static_cast<unsigned char*>(arguments.grad_query) + 2 * part;
    arguments.grad_head_stride = kGradHead;
    kernels().packed_attention(arguments.forward, serial);
    kernels().packed_attention_backward(arguments, serial);
    problem.run(kernels(), serial);
    other.grad_qkv.expect_guards_untouched();
    for (std::int64_t token = 0; token < kTokens; ++token) {
      for (std::int64_t i = 0; i < kHeads * kGradHead; ++i) {
        const std::int64_t head = i / kGradHead, at = i % kGradHead;
        const double want =
            at < 3 * kDim ? problem.grad_qkv(token, (at / kDim * kHeads + head) * kDim + at % kDim) : 42;
        ASSERT_EQ(other.grad_qkv(token, i), want) << name_of(dtype) << " (" << token << ", " << i << ")";
      }
    }
  }
}

TEST_P(PackedAttentionBackwardTest, AnyScaleFromZeroUp) {
  for (const double scale : {0.0, 1e-3, 2.5}) {
    for (const DType dtype : kAttentionDTypes) {
      BackwardProblem problem(generator, {3, 50}, 1, 16, dtype, true);
      problem.scale = scale;
      problem.run(kernels(), serial);
      SCOPED_TRACE(problem.description() << " scale " << scale);
      problem.expect_correct(kernels());
    }
  }
}

TEST_P(PackedAttentionBackwardTest, LargeScores) {
  for (const DType dtype : kAttentionDTypes) {
    for (const std::int32_t length : {3, 40, 600}) {
      BackwardProblem problem(generator, {length}, 1, 4, dtype, false);
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

TEST_P(PackedAttentionBackwardTest, ThreadsChangeNothing) {
  for (const DType dtype : kAttentionDTypes) {
    for (const bool causal : {false, true}) {
      BackwardProblem alone(generator, {1, 333, 0, 65, 257, 12}, 3, 64, dtype, causal, causal ? 0.3 : 0);
      BackwardProblem two = alone, five = alone;
      alone.run(kernels(), serial);
      two.run(kernels(), threaded<2>);
      five.run(kernels(), threaded<5>);
      EXPECT_EQ(alone.grad_qkv.storage(), two.grad_qkv.storage()) << alone.description();
      EXPECT_EQ(alone.grad_qkv.storage(), five.grad_qkv.storage()) << alone.description();
    }
  }
}

TEST_P(PackedAttentionBackwardTest, NothingButEmptySequences) {
  for (const std::vector<std::int32_t>& lengths : {std::vector<std::int32_t>{}, {0}, {0, 0, 0}}) {
    BackwardProblem problem(generator, lengths, 2, 8, kFloat32, false, 0.3);
    problem.run(kernels(), serial);
    problem.grad_qkv.expect_guards_untouched();
  }
}

TEST_P(PackedAttentionBackwardTest, NanAndInfStayInTheirSequence) {
  for (const DType dtype : kAttentionDTypes) {
    for (const double value : {kNan, kInfinity, -kInfinity}) {
      for (const int operand : {0, 1, 2, 3}) {  // query, key, value or the output's gradient
        BackwardProblem before(generator, {31, 50, 17}, 2, 24, dtype, false), after = before;
        for (std::int64_t token = 31; token < 81; ++token) {
          if (operand < 3) after.set_all(static_cast<Part>(operand), token, value);
          for (std::int64_t i = 0; operand == 3 && i < 48; ++i) after.grad_output.set(token, i, value);
        }
        before.run(kernels(), serial);
        after.run(kernels(), serial);
        for (std::int64_t token = 0; token < 98; ++token) {
          for (std::int64_t i = 0; i < 3 * 48; ++i) {
            if (token < 31 || token >= 81) {
              ASSERT_EQ(before.grad_qkv(token, i), after.grad_qkv(token, i)) << name_of(dtype) << " " << operand;
            } else if (i < 48) {
              ASSERT_TRUE(std::isnan(after.grad_qkv(token, i))) << name_of(dtype) << " " << operand;
            }
          }
        }
      }
    }
  }
}

}  // namespace
}  // namespace resnorm::cpu::testing
