// SPDX-License-Identifier: BSD-3-Clause
#include "add_layer_norm.h"
#include "kernels.h"
#include "layer_norm.h"

namespace resnorm::cpu::RESNORM_ISA {

extern const NormForwardKernels norm_forward_kernels;
const NormForwardKernels norm_forward_kernels = {
    .layer_norm_forward = layer_norm_forward,
    .add_layer_norm_forward = add_layer_norm_forward,
};

}  // namespace resnorm::cpu::RESNORM_ISA
