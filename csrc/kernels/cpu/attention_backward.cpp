// SPDX-License-Identifier: BSD-3-Clause
#include "kernels.h"
#include "packed_attention_backward.h"

namespace resnorm::cpu::RESNORM_ISA {

const AttentionBackwardKernels attention_backward_kernels = {.packed_attention_backward = packed_attention_backward};

}  // namespace resnorm::cpu::RESNORM_ISA
