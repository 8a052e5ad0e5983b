// SPDX-License-Identifier: BSD-3-Clause
// packed_attention on the CPU, for callers that have memory for its output and bounds that are right.
#pragma once

#include "../packed_attention.h"

namespace resnorm {

// resnorm::packed_attention, without grad, into `output`: (tokens, heads, head_dim), contiguous. `bounds` is a
// cu_seqlens of as many tokens on the CPU, contiguous.
void attend_into(const Tensor& output, const Tensor& qkv, const Tensor& bounds, double scale, bool causal);

}  // namespace resnorm
