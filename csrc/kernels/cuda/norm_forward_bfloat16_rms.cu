// SPDX-License-Identifier: BSD-3-Clause
#include "norm_forward_dispatch.cuh"

namespace resnorm::cuda {

RESNORM_NORM_FORWARD_TYPES(, false, SameTypes<__nv_bfloat16>);
RESNORM_NORM_FORWARD_TYPES(, false, Float32Residual<__nv_bfloat16>);
RESNORM_NORM_FORWARD_TYPES(, false, WideningResidual<__nv_bfloat16>);

}  // namespace resnorm::cuda
