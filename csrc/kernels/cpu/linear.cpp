// SPDX-License-Identifier: BSD-3-Clause
#include "loops.h"
#include "packed_linear.h"

namespace resnorm::cpu::RESNORM_ISA {

const LinearKernels linear_kernels = {
    .packed_weight_bytes = packed_weight_bytes,
    .pack_weight = pack_weight,
    .packed_linear = packed_linear,
};

}  // namespace resnorm::cpu::RESNORM_ISA
