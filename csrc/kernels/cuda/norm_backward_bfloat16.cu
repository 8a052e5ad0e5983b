// SPDX-License-Identifier: BSD-3-Clause
#include "norm_backward_dispatch.cuh"

namespace resnorm::cuda {

RESNORM_NORM_BACKWARD_TYPES(, true, SameTypes<__nv_bfloat16>);
RESNORM_NORM_BACKWARD_TYPES(, true, Float32Residual<__nv_bfloat16>);
RESNORM_NORM_BACKWARD_TYPES(, true, WideningResidual<__nv_bfloat16>);

}  // namespace resnorm::cuda
