// SPDX-License-Identifier: BSD-3-Clause
// Operands of packed_attention, and what must come of them.
#pragma once

#include <limits>

#include "fixture.h"

namespace resnorm::cpu::testing {

using enum DType;

inline constexpr double kInfinity = std::numeric_limits<double>::infinity();
inline const double kNan = std::nan("");
inline const std::vector<DType> kAttentionDTypes = {kFloat32, kBFloat16, kFloat16};

enum Part { kQuery, kKey, kValue };

// The products of bfloat16 are of words that weights and score gradients are rounded to.
inline bool rounds_weights(const KernelTable& kernels, DType dtype) {
  return std::string(kernels.isa) == "avx512_bf16" && dtype == kBFloat16;
}

// Four sums, or each addition would wait for the one before it.
inline double dot(const double* a, const double* b, std::int64_t size) {
  double sums[4] = {};
  std::int64_t i = 0;
  for (; i + 4 <= size; i += 4) {
    for (int j = 0; j < 4; ++j) sums[j] += a[i + j] * b[i + j];
  }
  for (; i < size; ++i) sums[0] += a[i] * b[i];
  return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

// Rows `begin` up to `end` of one head in float64: `head_dim` columns from `column` on, and the rows' norms.
class HeadRows {
 public:
  HeadRows(const Matrix& matrix, std::int64_t begin, std::int64_t end, std::int64_t column, std::int64_t head_dim)
      : head_dim_(head_dim) {
    for (std::int64_t row = begin; row < end; ++row) {
      for (std::int64_t d = 0; d < head_dim; ++d) values_.push_back(matrix(row, column + d));
      const double* const values = (*this)[row - begin];
      norms_.push_back(std::sqrt(dot(values, values, head_dim)));
    }
  }

  const double* operator[](std::int64_t row) const { return values_.data() + row * head_dim_; }
  double norm(std::int64_t row) const { return norms_[static_cast<std::size_t>(row)]; }

 private:
  std::int64_t head_dim_;
  std::vector<double> values_, norms_;
};

struct AttentionProblem {
  std::vector<std::int32_t> cu_seqlens{0};
  std::int64_t heads, head_dim;
  double scale;
  bool causal;
  Dropout dropout;
  Matrix qkv, output, logsumexp;

  AttentionProblem(std::mt19937_64& generator, const std::vector<std::int32_t>& lengths, std::int64_t head_count,
                   std::int64_t dim, DType dtype, bool is_causal, Layout layout = {})
      : heads(head_count), head_dim(dim), scale(1 / std::sqrt(static_cast<double>(dim))), causal(is_causal) {
    for (const auto length : lengths) cu_seqlens.push_back(cu_seqlens.back() + length);
    qkv = Matrix::random(generator, tokens(), 3 * heads * head_dim, dtype, layout);
    output = Matrix(tokens(), heads * head_dim, dtype, {0, layout.offset});
  }

  std::int64_t tokens() const { return cu_seqlens.back(); }
  void drop(double p) { dropout = dropout_of(p, 0xFEDCBA9876543210ULL); }
  void keep_logsumexp() { logsumexp = Matrix(tokens(), heads, kFloat32); }

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
            .dropout = dropout,
            .output = output.operand().data,
            .logsumexp = static_cast<float*>(logsumexp.operand().data)};
  }

  void run(const KernelTable& kernels, ParallelFor parallel_for) {
    kernels.packed_attention(arguments(), parallel_for);
  }

  std::int64_t visible_keys(std::int64_t row, std::int64_t begin, std::int64_t end) const {
    return causal ? row + 1 - begin : end - begin;
  }

  // Which of a token's keys, counted within its sequence, dropout keeps.
  KeepMask kept_keys(std::int64_t token, std::int64_t head, std::int64_t keys) const {
    return {dropout, {1, keys}, (token * heads + head) << 35};
  }

  // What is expected of all tokens, and how large the numbers are that it was summed from: the scale of its error.
  struct Expected {
    Values output, output_scale, logsumexp, logsumexp_scale;
  };

  HeadRows rows_of(Part part, std::int64_t begin, std::int64_t end, std::int64_t head) const {
    return {qkv, begin, end, column(part, head, 0), head_dim};
  }

  // One head of one sequence in float64, straight from the formula.
  void attend(std::int64_t begin, std::int64_t end, std::int64_t head, Expected& expected) const {
    const HeadRows query = rows_of(kQuery, begin, end, head), key = rows_of(kKey, begin, end, head),
                   value = rows_of(kValue, begin, end, head);
    std::vector<double> weights(static_cast<std::size_t>(end - begin)), sizes(weights.size());
    for (std::int64_t i = 0; i < end - begin; ++i) {
      const std::int64_t row = begin + i, keys = visible_keys(row, begin, end);
      double largest = -kInfinity, largest_size = 0, denominator = 0;
      for (std::int64_t j = 0; j < keys; ++j) {
        double score = 0, size = 0;
        for (std::int64_t d = 0; d < head_dim; ++d) {
          const double product = query[i][d] * key[j][d];
          score += product;
          size += std::fabs(product);
        }
        weights[j] = score * scale;
        // A score that is off by so much changes its weight by as much, relatively.
        sizes[j] = std::isfinite(size) ? 1 + size * scale : 1;
        largest = std::max(largest, weights[j]);
        largest_size = std::max(largest_size, sizes[j]);
      }
      for (std::int64_t j = 0; j < keys; ++j) denominator += weights[j] = std::exp(weights[j] - largest);
      const double logsumexp = (largest + std::log(denominator)) / std::log(2.0);
      expected.logsumexp(row, head) = logsumexp;
      expected.logsumexp_scale(row, head) = largest_size + std::fabs(logsumexp);
      const KeepMask kept = kept_keys(row, head, keys);
      for (std::int64_t j = 0; j < keys; ++j) {
        if (!kept(0, j)) continue;
        const double weight = weights[j] / denominator * dropout.scale;
        for (std::int64_t d = 0; d < head_dim; ++d) {
          expected.output(row, head * head_dim + d) += weight * value[j][d];
          expected.output_scale(row, head * head_dim + d) += std::fabs(weight * value[j][d]) * sizes[j];
        }
      }
    }
  }

  void expect_correct(const KernelTable& kernels) const {
    const auto zeros = [](const Matrix& matrix) { return Values(matrix.rows(), matrix.cols()); };
    const Values statistics(tokens(), heads);
    Expected expected{zeros(output), zeros(output), statistics, statistics};
    for (std::size_t i = 0; i + 1 < cu_seqlens.size(); ++i) {
      for (std::int64_t head = 0; head < heads; ++head) attend(cu_seqlens[i], cu_seqlens[i + 1], head, expected);
    }
    const bool rounds = rounds_weights(kernels, qkv.dtype());
    expect_close(output, expected.output, expected.output_scale, rounds ? kBFloat16 : kFloat32, rounds ? 1 : 8,
                 "output");
    // Exponentials that are to be rounded to bfloat16 are not as exact as others.
    expect_close(logsumexp, expected.logsumexp, expected.logsumexp_scale, kFloat32, rounds ? 64 : 8, "logsumexp");
  }

  ::testing::Message description() const {
    return ::testing::Message() << name_of(qkv.dtype()) << " " << heads << " heads of " << head_dim
                                << (causal ? " causal" : "") << " threshold " << dropout.threshold;
  }
};

}  // namespace resnorm::cpu::testing
