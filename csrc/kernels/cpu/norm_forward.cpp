// SPDX-License-Identifier: BSD-3-Clause
#include "norm_forward.h"

#include "kernels.h"

namespace resnorm::cpu::RESNORM_ISA {

const NormForwardKernels norm_forward_kernels = {.norm_forward = norm_forward};

}  // namespace resnorm::cpu::RESNORM_ISA
