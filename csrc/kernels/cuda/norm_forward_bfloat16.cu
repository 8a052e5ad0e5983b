// SPDX-License-Identifier: BSD-3-Clause
#include "norm_forward_dispatch.cuh"

namespace resnorm::cuda {

RESNORM_NORM_FORWARD_TYPES(, SameTypes<__nv_bfloat16>);
RESNORM_NORM_FORWARD_TYPES(, Float32StreamTypes<__nv_bfloat16>);
RESNORM_NORM_FORWARD_TYPES(, WideningTypes<__nv_bfloat16>);

}  // namespace resnorm::cuda
