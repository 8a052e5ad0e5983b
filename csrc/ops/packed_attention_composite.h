// SPDX-License-Identifier: BSD-3-Clause
// packed_attention in torch's own operators, in two ways. Sequence by sequence: what runs where there is no kernel of
// our own. As one attention over all tokens under a block-diagonal mask: quadratic in the tokens of the whole batch,
// but it reads no value on the host and is differentiable any number of times, so it serves transforms and double
// backward.
#pragma once

#include <vector>

#include "packed_attention.h"

namespace resnorm::composite {

struct Sequence {
  int64_t begin, length;
};

double scale_or_default(std::optional<double> scale, const Tensor& qkv);

// `cu_seqlens` on the CPU and contiguous; throws where they are not bounds of `tokens` tokens.
Tensor bounds_of(const Tensor& cu_seqlens, int64_t tokens, const std::optional<c10::SymInt>& max_seqlen);

// The sequences that hold any token; throws as bounds_of does.
std::vector<Sequence> sequences_of(const Tensor& cu_seqlens, int64_t tokens,
                                   const std::optional<c10::SymInt>& max_seqlen);

// Attention without dropout within one sequence of `qkv`, into its place in `output`.
void attend(const Tensor& qkv, const Sequence& sequence, std::optional<double> scale, bool causal,
            const Tensor& output);

// What the operators do sequence by sequence, by the formula.
std::tuple<Tensor, Tensor> packed_attention_forward(const Tensor& qkv, const Tensor& cu_seqlens,
                                                    std::optional<c10::SymInt> max_seqlen, std::optional<double> scale,
                                                    bool causal, double dropout_p, const OptionalTensor& seed);
Tensor packed_attention_backward(const Tensor& grad_output, const Tensor& qkv, const OptionalTensor& output,
                                 const OptionalTensor& logsumexp, const Tensor& cu_seqlens,
                                 std::optional<c10::SymInt> max_seqlen, std::optional<double> scale, bool causal,
                                 double dropout_p, const OptionalTensor& seed);

Tensor masked_attention(const Tensor& qkv, const Tensor& cu_seqlens, std::optional<double> scale, bool causal,
                        double dropout_p, const OptionalTensor& seed);
Tensor masked_attention_backward(const Tensor& grad_output, const Tensor& qkv, const Tensor& cu_seqlens,
                                 std::optional<double> scale, bool causal, double dropout_p,
                                 const OptionalTensor& seed);

}  // namespace resnorm::composite
