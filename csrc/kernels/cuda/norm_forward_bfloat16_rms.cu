// SPDX-License-Identifier: BSD-3-Clause
#include "norm_forward_dispatch.cuh"

namespace resnorm::cuda {

RESNORM_NORM_FORWARD_TYPES(, false, SameStream<__nv_bfloat16>);
RESNORM_NORM_FORWARD_TYPES(, false, Float32Stream<__nv_bfloat16>);
RESNORM_NORM_FORWARD_TYPES(, false, WideningStream<__nv_bfloat16>);

}  // namespace resnorm::cuda
