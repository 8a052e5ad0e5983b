// SPDX-License-Identifier: BSD-3-Clause
#include "loops.h"
#include "packed_attention.h"

namespace resnorm::cpu::RESNORM_ISA {

const AttentionKernels attention_kernels = {
    .packed_attention = packed_attention,
};

}  // namespace resnorm::cpu::RESNORM_ISA
