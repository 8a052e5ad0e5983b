// SPDX-License-Identifier: BSD-3-Clause
// packed_attention in torch's own operators, in two ways. Sequence by sequence: what runs where there is no kernel of
// our own. As one attention over all tokens under a block-diagonal mask: quadratic in the tokens of the whole batch,
// but it reads no value on the host and is differentiable any number of times, so it serves transforms and double
// backward.
#pragma once

#include "../packed_attention.h"

namespace resnorm::composite {

Tensor masked_attention(const Tensor& qkv, const Tensor& cu_seqlens, std::optional<double> scale, bool causal);
Tensor masked_attention_backward(const Tensor& grad_output, const Tensor& qkv, const Tensor& cu_seqlens,
                                 std::optional<double> scale, bool causal);

}  // namespace resnorm::composite
