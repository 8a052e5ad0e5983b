// SPDX-License-Identifier: BSD-3-Clause
#include "bias_activation.h"
#include "loops.h"

namespace resnorm::cpu::RESNORM_ISA {

const ActivationKernels activation_kernels = {
    .bias_activation_forward = bias_activation_forward,
    .bias_activation_backward = bias_activation_backward,
};

}  // namespace resnorm::cpu::RESNORM_ISA
