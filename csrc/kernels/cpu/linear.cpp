// SPDX-License-Identifier: BSD-3-Clause
#include "loops.h"
#include "prepacked_linear.h"

namespace resnorm::cpu::RESNORM_ISA {

const LinearKernels linear_kernels = {
    .prepacked_weight_bytes = prepacked_weight_bytes,
    .prepack_weight = prepack_weight,
    .prepacked_linear = prepacked_linear,
};

}  // namespace resnorm::cpu::RESNORM_ISA
