// SPDX-License-Identifier: BSD-3-Clause
#include "norm_backward.h"

#include "kernels.h"

namespace resnorm::cpu::RESNORM_ISA {

const NormBackwardKernels norm_backward_kernels = {.norm_backward = norm_backward};

}  // namespace resnorm::cpu::RESNORM_ISA
