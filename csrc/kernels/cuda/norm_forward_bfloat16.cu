// SPDX-License-Identifier: BSD-3-Clause
#include "norm_forward_dispatch.cuh"

namespace resnorm::cuda {

RESNORM_NORM_FORWARD_TYPES(, true, SameTypes<__nv_bfloat16>);
RESNORM_NORM_FORWARD_TYPES(, true, Float32Residual<__nv_bfloat16>);
RESNORM_NORM_FORWARD_TYPES(, true, WideningResidual<__nv_bfloat16>);

}  // namespace resnorm::cuda
