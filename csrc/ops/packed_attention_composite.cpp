// SPDX-License-Identifier: BSD-3-Clause
#include "packed_attention_composite.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/bucketize.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/scaled_dot_product_attention.h>
#include <ATen/ops/softmax.h>
#include <ATen/ops/stack.h>
#include <torch/library.h>

#include <cmath>
#include <limits>

namespace resnorm::composite {

namespace {

// True where a query (row) sees a key (column).
Tensor block_diagonal_mask(const Tensor& qkv, const Tensor& cu_seqlens, bool causal) {
  const auto bounds = cu_seqlens.to(qkv.device());
  const auto tokens = at::arange(qkv.size(0), qkv.options().dtype(at::kInt));
  const auto sequence = at::bucketize(tokens, bounds, /*out_int32=*/true, /*right=*/true);
  const auto mask = sequence.unsqueeze(1) == sequence.unsqueeze(0);
  return causal ? mask.logical_and(tokens.unsqueeze(1) >= tokens.unsqueeze(0)) : mask;
}

// One attention: queries, keys and values (heads, tokens, head_dim), an absent mask hides nothing.
struct Attention {
  Attention(const Tensor& qkv, double scale, const OptionalTensor& mask)
      : query(qkv.select(1, 0).transpose(0, 1)),
        key(qkv.select(1, 1).transpose(0, 1)),
        value(qkv.select(1, 2).transpose(0, 1)),
        scale(scale) {
    auto scores = query.matmul(key.transpose(1, 2)) * scale;
    if (mask.has_value()) scores = scores.masked_fill(mask->logical_not(), -std::numeric_limits<double>::infinity());
    weights = at::softmax(scores, -1);
  }

  Tensor output() const { return weights.matmul(value).transpose(0, 1); }

  // dS = P * (dP - rowsum(dP * P)) with dP = dO V^T; then dQ = dS K, dK = dS^T Q, both scaled, and dV = P^T dO.
  Tensor grad_qkv(const Tensor& grad_output) const {
    const auto grad = grad_output.transpose(0, 1);
    const auto grad_weights = grad.matmul(value.transpose(1, 2));
    const auto grad_scores = weights * (grad_weights - (grad_weights * weights).sum(-1, /*keepdim=*/true)) * scale;
    return at::stack({grad_scores.matmul(key), grad_scores.transpose(1, 2).matmul(query),
                      weights.transpose(1, 2).matmul(grad)})
        .permute({2, 0, 1, 3});
  }

  Tensor query, key, value, weights;
  double scale;
};

Tensor packed_attention(const Tensor& qkv, const Tensor& cu_seqlens, std::optional<c10::SymInt> max_seqlen,
                        std::optional<double> scale, bool causal) {
  auto output = packed_attention_meta(qkv, cu_seqlens, max_seqlen, scale, causal);
  for (const auto& sequence : sequences_of(cu_seqlens, qkv.size(0), max_seqlen)) {
    attend(qkv, sequence, scale, causal, output);
  }
  return output;
}

Tensor packed_attention_backward(const Tensor& grad_output, const Tensor& qkv, const Tensor& cu_seqlens,
                                 std::optional<c10::SymInt> max_seqlen, std::optional<double> scale, bool causal) {
  auto grad_qkv = packed_attention_backward_meta(grad_output, qkv, cu_seqlens, max_seqlen, scale, causal);
  const auto accumulation = accumulation_dtype({qkv.scalar_type()});
  for (const auto& [begin, length] : sequences_of(cu_seqlens, qkv.size(0), max_seqlen)) {
    OptionalTensor mask;
    if (causal) mask = at::ones({length, length}, qkv.options().dtype(at::kBool)).tril();
    const Attention attention(qkv.narrow(0, begin, length).to(accumulation), scale_or_default(scale, qkv), mask);
    const auto grad = grad_output.narrow(0, begin, length).to(accumulation);
    grad_qkv.narrow(0, begin, length).copy_(attention.grad_qkv(grad));
  }
  return grad_qkv;
}

Tensor packed_attention_batched(const Tensor& qkv, const Tensor& cu_seqlens, std::optional<c10::SymInt> /*max_seqlen*/,
                                std::optional<double> scale, bool causal) {
  return masked_attention(qkv, cu_seqlens, scale, causal);
}

Tensor packed_attention_backward_batched(const Tensor& grad_output, const Tensor& qkv, const Tensor& cu_seqlens,
                                         std::optional<c10::SymInt> /*max_seqlen*/, std::optional<double> scale,
                                         bool causal) {
  return masked_attention_backward(grad_output, qkv, cu_seqlens, scale, causal);
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

Tensor masked_attention(const Tensor& qkv, const Tensor& cu_seqlens, std::optional<double> scale, bool causal) {
  const auto dtype = qkv.scalar_type();
  const Attention attention(qkv.to(accumulation_dtype({dtype})), scale_or_default(scale, qkv),
                            block_diagonal_mask(qkv, cu_seqlens, causal));
  return attention.output().to(dtype);
}

Tensor masked_attention_backward(const Tensor& grad_output, const Tensor& qkv, const Tensor& cu_seqlens,
                                 std::optional<double> scale, bool causal) {
  const auto dtype = qkv.scalar_type(), accumulation = accumulation_dtype({dtype});
  const Attention attention(qkv.to(accumulation), scale_or_default(scale, qkv),
                            block_diagonal_mask(qkv, cu_seqlens, causal));
  return attention.grad_qkv(grad_output.to(accumulation)).to(dtype);
}

TORCH_LIBRARY_IMPL(resnorm, CompositeExplicitAutograd, m) {
  m.impl("packed_attention", packed_attention);
  m.impl("_packed_attention_backward", packed_attention_backward);
}

TORCH_LIBRARY_IMPL(resnorm, FuncTorchBatched, m) {
  m.impl("packed_attention", packed_attention_batched);
  m.impl("_packed_attention_backward", packed_attention_backward_batched);
}

}  // namespace resnorm::composite
