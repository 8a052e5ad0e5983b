// SPDX-License-Identifier: BSD-3-Clause
#include "add_layer_norm.h"
#include "kernels.h"
#include "layer_norm.h"

namespace resnorm::cpu::RESNORM_ISA {

extern const NormBackwardKernels norm_backward_kernels;
const NormBackwardKernels norm_backward_kernels = {
    .layer_norm_backward = layer_norm_backward,
    .add_layer_norm_backward = add_layer_norm_backward,
};

}  // namespace resnorm::cpu::RESNORM_ISA
