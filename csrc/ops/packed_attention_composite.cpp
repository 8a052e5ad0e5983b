// SPDX-License-Identifier: BSD-3-Clause
#include "packed_attention_composite.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/bucketize.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/logsumexp.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/scaled_dot_product_attention.h>
#include <ATen/ops/softmax.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/where.h>
#include <torch/library.h>

#include <cmath>
#include <limits>

#include "support/dropout.h"
#include "support/philox.h"

namespace resnorm::composite {

namespace {

// The logical matrix of attention weights that csrc/kernels/arguments.h numbers the draws of.
constexpr int64_t kWeightsPerRow = int64_t{1} << 35;
constexpr double kLog2E = 1.4426950408889634;

// For each head, query and key whether dropout keeps the weight. `tokens` are the queries' numbers in the whole batch,
// `keys` the keys' in their sequence, of a shape that extends to (queries, keys).
Tensor kept_weights(const Tensor& qkv, const Tensor& tokens, const Tensor& keys, double dropout_p, const Tensor& seed) {
  const auto heads = at::arange(qkv.size(2), tokens.options()).view({-1, 1, 1});
  return keep_mask(tokens.view({1, -1, 1}) * qkv.size(2) + heads, keys, kWeightsPerRow, dropout_p, seed);
}

// Which of all tokens' weights are there: a token sees those of its sequence, or of these what is no later.
struct BlockDiagonal {
  BlockDiagonal(const Tensor& qkv, const Tensor& cu_seqlens, bool causal)
      : tokens(at::arange(qkv.size(0), qkv.options().dtype(at::kLong))) {
    const auto bounds = cu_seqlens.to(qkv.device());
    const auto sequence = at::bucketize(tokens, bounds, /*out_int32=*/false, /*right=*/true);
    visible = sequence.unsqueeze(1) == sequence.unsqueeze(0);
    if (causal) visible = visible.logical_and(tokens.unsqueeze(1) >= tokens.unsqueeze(0));
    positions = tokens - bounds.to(at::kLong).index({sequence - 1});
  }

  Tensor tokens, positions;  // of all tokens, and in its sequence
  Tensor visible;            // (queries, keys)
};

// One attention: queries, keys and values (heads, tokens, head_dim). A mask that is absent hides nothing; `kept` is
// what dropout keeps, all where it is absent.
struct Attention {
  Attention(const Tensor& qkv, double scale, const OptionalTensor& visible, const OptionalTensor& kept,
            double dropout_p)
      : query(qkv.select(1, 0).transpose(0, 1)),
        key(qkv.select(1, 1).transpose(0, 1)),
        value(qkv.select(1, 2).transpose(0, 1)),
        scale(scale),
        kept(kept),
        kept_scale(dropout_scale(dropout_threshold(dropout_p))) {
    scores = query.matmul(key.transpose(1, 2)) * scale;
    if (visible.has_value()) {
      scores = scores.masked_fill(visible->logical_not(), -std::numeric_limits<double>::infinity());
    }
    weights = at::softmax(scores, -1);
  }

  Tensor dropped(const Tensor& values) const {
    return kept.has_value() ? at::where(*kept, values * kept_scale, 0.0) : values;
  }

  Tensor output() const { return dropped(weights).matmul(value).transpose(0, 1); }

  // dS = P * (dP - rowsum(dP * P)) with dP = dropout'(dO V^T); then dQ = dS K, dK = dS^T Q, both scaled, and
  // dV = dropout(P)^T dO.
  Tensor grad_qkv(const Tensor& grad_output) const {
    const auto grad = grad_output.transpose(0, 1);
    const auto grad_weights = dropped(grad.matmul(value.transpose(1, 2)));
    const auto grad_scores = weights * (grad_weights - (grad_weights * weights).sum(-1, /*keepdim=*/true)) * scale;
    return at::stack({grad_scores.matmul(key), grad_scores.transpose(1, 2).matmul(query),
                      dropped(weights).transpose(1, 2).matmul(grad)})
        .permute({2, 0, 1, 3});
  }

  Tensor query, key, value, scores, weights;
  double scale;
  OptionalTensor kept;
  double kept_scale;
};

// Of one sequence, in the accumulation type.
Attention attention_of(const Tensor& qkv, const Sequence& sequence, std::optional<double> scale, bool causal,
                       double dropout_p, const OptionalTensor& seed) {
  const auto& [begin, length] = sequence;
  OptionalTensor visible, kept;
  if (causal) visible = at::ones({length, length}, qkv.options().dtype(at::kBool)).tril();
  if (dropout_threshold(dropout_p) > 0) {
    const auto keys = at::arange(length, qkv.options().dtype(at::kLong));
    kept = kept_weights(qkv, keys + begin, keys, dropout_p, *seed);
  }
  return {qkv.narrow(0, begin, length).to(accumulation_dtype({qkv.scalar_type()})), scale_or_default(scale, qkv),
          visible, kept, dropout_p};
}

// Of all tokens, in the accumulation type.
Attention attention_of(const Tensor& qkv, const Tensor& cu_seqlens, std::optional<double> scale, bool causal,
                       double dropout_p, const OptionalTensor& seed) {
  const BlockDiagonal mask(qkv, cu_seqlens, causal);
  OptionalTensor kept;
  if (dropout_threshold(dropout_p) > 0) kept = kept_weights(qkv, mask.tokens, mask.positions, dropout_p, *seed);
  return {qkv.to(accumulation_dtype({qkv.scalar_type()})), scale_or_default(scale, qkv), mask.visible, kept, dropout_p};
}

Tensor packed_attention(const Tensor& qkv, const Tensor& cu_seqlens, std::optional<c10::SymInt> max_seqlen,
                        std::optional<double> scale, bool causal, double dropout_p, const OptionalTensor& seed) {
  if (dropout_threshold(dropout_p) > 0) {
    return std::get<0>(
        packed_attention_forward(qkv, cu_seqlens, std::move(max_seqlen), scale, causal, dropout_p, seed));
  }
  auto output = packed_attention_meta(qkv, cu_seqlens, max_seqlen, scale, causal, dropout_p, seed);
  for (const auto& sequence : sequences_of(cu_seqlens, qkv.size(0), max_seqlen)) {
    attend(qkv, sequence, scale, causal, output);
  }
  return output;
}

Tensor packed_attention_batched(const Tensor& qkv, const Tensor& cu_seqlens, std::optional<c10::SymInt> /*max_seqlen*/,
                                std::optional<double> scale, bool causal, double dropout_p,
                                const OptionalTensor& seed) {
  return masked_attention(qkv, cu_seqlens, scale, causal, dropout_p, seed);
}

Tensor packed_attention_backward_batched(const Tensor& grad_output, const Tensor& qkv, const OptionalTensor& /*output*/,
                                         const OptionalTensor& /*logsumexp*/, const Tensor& cu_seqlens,
                                         std::optional<c10::SymInt> /*max_seqlen*/, std::optional<double> scale,
                                         bool causal, double dropout_p, const OptionalTensor& seed) {
  return masked_attention_backward(grad_output, qkv, cu_seqlens, scale, causal, dropout_p, seed);
}

}  // namespace

double scale_or_default(std::optional<double> scale, const Tensor& qkv) {
  return scale.value_or(1.0 / std::sqrt(static_cast<double>(qkv.size(-1))));
}

Tensor bounds_of(const Tensor& cu_seqlens, int64_t tokens, const std::optional<c10::SymInt>& max_seqlen) {
  auto bounds = cu_seqlens.cpu().contiguous();
  const auto* bound = bounds.const_data_ptr<int32_t>();
  const auto count = bounds.numel() - 1;
  TORCH_CHECK_VALUE(bound[0] == 0 && bound[count] == tokens, "Expected cu_seqlens from 0 to the number of tokens, ",
                    tokens, ", but got cu_seqlens from ", bound[0], " to ", bound[count]);
  for (int64_t i = 0; i < count; ++i) {
    const int64_t length = int64_t{bound[i + 1]} - bound[i];
    TORCH_CHECK_VALUE(length >= 0, "Expected cu_seqlens to ascend, but got ", bound[i], " before ", bound[i + 1]);
    TORCH_CHECK_VALUE(!max_seqlen.has_value() || *max_seqlen >= length, "Expected no sequence longer than max_seqlen, ",
                      *max_seqlen, ", but got one of ", length, " tokens");
  }
  return bounds;
}

std::vector<Sequence> sequences_of(const Tensor& cu_seqlens, int64_t tokens,
                                   const std::optional<c10::SymInt>& max_seqlen) {
  const auto bounds = bounds_of(cu_seqlens, tokens, max_seqlen);
  const auto* bound = bounds.const_data_ptr<int32_t>();
  const auto count = bounds.numel() - 1;
  std::vector<Sequence> sequences;
  sequences.reserve(count);
  for (int64_t i = 0; i < count; ++i) {
    if (bound[i] < bound[i + 1]) sequences.push_back({bound[i], bound[i + 1] - bound[i]});
  }
  return sequences;
}

void attend(const Tensor& qkv, const Sequence& sequence, std::optional<double> scale, bool causal,
            const Tensor& output) {
  const auto& [begin, length] = sequence;
  const auto heads_first = qkv.narrow(0, begin, length).permute({1, 2, 0, 3}).unsqueeze(1);
  const auto context = at::scaled_dot_product_attention(heads_first.select(0, 0), heads_first.select(0, 1),
                                                        heads_first.select(0, 2), {}, 0.0, causal, scale);
  output.narrow(0, begin, length).copy_(context.squeeze(0).transpose(0, 1));
}

std::tuple<Tensor, Tensor> packed_attention_forward(const Tensor& qkv, const Tensor& cu_seqlens,
                                                    std::optional<c10::SymInt> max_seqlen, std::optional<double> scale,
                                                    bool causal, double dropout_p, const OptionalTensor& seed) {
  auto results = packed_attention_forward_meta(qkv, cu_seqlens, max_seqlen, scale, causal, dropout_p, seed);
  const auto& [output, logsumexp] = results;
  for (const auto& sequence : sequences_of(cu_seqlens, qkv.size(0), max_seqlen)) {
    const auto attention = attention_of(qkv, sequence, scale, causal, dropout_p, seed);
    output.narrow(0, sequence.begin, sequence.length).copy_(attention.output());
    logsumexp.narrow(0, sequence.begin, sequence.length)
        .copy_(at::logsumexp(attention.scores, -1).transpose(0, 1) * kLog2E);
  }
  return results;
}

Tensor packed_attention_backward(const Tensor& grad_output, const Tensor& qkv, const OptionalTensor& output,
                                 const OptionalTensor& logsumexp, const Tensor& cu_seqlens,
                                 std::optional<c10::SymInt> max_seqlen, std::optional<double> scale, bool causal,
                                 double dropout_p, const OptionalTensor& seed) {
  auto grad_qkv = packed_attention_backward_meta(grad_output, qkv, output, logsumexp, cu_seqlens, max_seqlen, scale,
                                                 causal, dropout_p, seed);
  for (const auto& sequence : sequences_of(cu_seqlens, qkv.size(0), max_seqlen)) {
    const auto attention = attention_of(qkv, sequence, scale, causal, dropout_p, seed);
    const auto grad = grad_output.narrow(0, sequence.begin, sequence.length).to(attention.weights.scalar_type());
    grad_qkv.narrow(0, sequence.begin, sequence.length).copy_(attention.grad_qkv(grad));
  }
  return grad_qkv;
}

Tensor masked_attention(const Tensor& qkv, const Tensor& cu_seqlens, std::optional<double> scale, bool causal,
                        double dropout_p, const OptionalTensor& seed) {
  return attention_of(qkv, cu_seqlens, scale, causal, dropout_p, seed).output().to(qkv.scalar_type());
}

Tensor masked_attention_backward(const Tensor& grad_output, const Tensor& qkv, const Tensor& cu_seqlens,
                                 std::optional<double> scale, bool causal, double dropout_p,
                                 const OptionalTensor& seed) {
  const auto attention = attention_of(qkv, cu_seqlens, scale, causal, dropout_p, seed);
  return attention.grad_qkv(grad_output.to(attention.weights.scalar_type())).to(qkv.scalar_type());
}

TORCH_LIBRARY_IMPL(resnorm, CompositeExplicitAutograd, m) {
  m.impl("packed_attention", packed_attention);
  m.impl("_packed_attention_forward", packed_attention_forward);
  m.impl("_packed_attention_backward", packed_attention_backward);
}

TORCH_LIBRARY_IMPL(resnorm, FuncTorchBatched, m) {
  m.impl("packed_attention", packed_attention_batched);
  m.impl("_packed_attention_backward", packed_attention_backward_batched);
}

}  // namespace resnorm::composite
