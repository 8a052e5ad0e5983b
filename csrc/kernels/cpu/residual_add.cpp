// SPDX-License-Identifier: BSD-3-Clause
#include "residual_add.h"

#include "kernels.h"

namespace resnorm::cpu::RESNORM_ISA {

const ResidualAddKernels residual_add_kernels = {
    .residual_add_forward = residual_add_forward,
    .residual_add_backward = residual_add_backward,
};

}  // namespace resnorm::cpu::RESNORM_ISA
