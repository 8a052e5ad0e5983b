// SPDX-License-Identifier: BSD-3-Clause
// resnorm::packed_attention: dropout(softmax(q k^T * scale)) v within each sequence of a packed batch. `qkv` is
// (tokens, 3, heads, head_dim), sequence i is tokens cu_seqlens[i] up to cu_seqlens[i + 1]; the result is (tokens,
// heads, head_dim). Each function here is the typed call of the operator that torch.ops.resnorm holds under the same
// name.
#pragma once

#include <tuple>

#include "support/checks.h"

namespace resnorm {

Tensor packed_attention(const Tensor& qkv, const Tensor& cu_seqlens, std::optional<c10::SymInt> max_seqlen,
                        std::optional<double> scale, bool causal, double dropout_p, const OptionalTensor& seed);

// On the CPU: the output, and of each row's scores the logarithm to base 2 of the sum of exponentials, float32 (tokens,
// heads).
std::tuple<Tensor, Tensor> packed_attention_forward(const Tensor& qkv, const Tensor& cu_seqlens,
                                                    std::optional<c10::SymInt> max_seqlen, std::optional<double> scale,
                                                    bool causal, double dropout_p, const OptionalTensor& seed);

// The gradient of qkv. Attention weights are computed again, not stored: on the CPU from what the forward pass gave,
// which elsewhere is not needed.
Tensor packed_attention_backward(const Tensor& grad_output, const Tensor& qkv, const OptionalTensor& output,
                                 const OptionalTensor& logsumexp, const Tensor& cu_seqlens,
                                 std::optional<c10::SymInt> max_seqlen, std::optional<double> scale, bool causal,
                                 double dropout_p, const OptionalTensor& seed);

// What of `cu_seqlens` can be seen without its values.
void check_cu_seqlens(const Tensor& cu_seqlens);

// Checked arguments, allocated results.
Tensor packed_attention_meta(const Tensor& qkv, const Tensor& cu_seqlens, std::optional<c10::SymInt> max_seqlen,
                             std::optional<double> scale, bool causal, double dropout_p, const OptionalTensor& seed);
std::tuple<Tensor, Tensor> packed_attention_forward_meta(const Tensor& qkv, const Tensor& cu_seqlens,
                                                         std::optional<c10::SymInt> max_seqlen,
                                                         std::optional<double> scale, bool causal, double dropout_p,
                                                         const OptionalTensor& seed);
Tensor packed_attention_backward_meta(const Tensor& grad_output, const Tensor& qkv, const OptionalTensor& output,
                                      const OptionalTensor& logsumexp, const Tensor& cu_seqlens,
                                      std::optional<c10::SymInt> max_seqlen, std::optional<double> scale, bool causal,
                                      double dropout_p, const OptionalTensor& seed);

}  // namespace resnorm
