// SPDX-License-Identifier: BSD-3-Clause
// One instruction set's kernels: an isa_*.cpp names its set in RESNORM_ISA and includes this. The table is all that
// leaves the translation unit.
#pragma once

#include "bias_activation.h"
#include "kernels.h"
#include "norm_backward.h"
#include "norm_forward.h"
#include "packed_attention.h"
#include "packed_linear.h"
#include "residual_add.h"

#define RESNORM_STRING_OF(name) #name
#define RESNORM_STRING(name) RESNORM_STRING_OF(name)

namespace resnorm::cpu::RESNORM_ISA {

extern const KernelTable kernel_table;
const KernelTable kernel_table = {
    .isa = RESNORM_STRING(RESNORM_ISA),
    .norm_forward = norm_forward,
    .norm_backward = norm_backward,
    .residual_add_forward = residual_add_forward,
    .residual_add_backward = residual_add_backward,
    .packed_attention = packed_attention,
    .bias_activation_forward = bias_activation_forward,
    .bias_activation_backward = bias_activation_backward,
    .packed_weight_bytes = packed_weight_bytes,
    .pack_weight = pack_weight,
    .packed_linear = packed_linear,
};

}  // namespace resnorm::cpu::RESNORM_ISA
