// SPDX-License-Identifier: BSD-3-Clause
#include "kernels.h"
#include "packed_attention.h"

namespace resnorm::cpu::RESNORM_ISA {

extern const AttentionKernels attention_kernels;
const AttentionKernels attention_kernels = {
    .packed_attention = packed_attention,
};

}  // namespace resnorm::cpu::RESNORM_ISA
