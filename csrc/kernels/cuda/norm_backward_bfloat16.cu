// SPDX-License-Identifier: BSD-3-Clause
#include "norm_backward_dispatch.cuh"

namespace resnorm::cuda {

RESNORM_NORM_BACKWARD_TYPES(, SameGradients<__nv_bfloat16>);
RESNORM_NORM_BACKWARD_TYPES(, Float32StreamGradients<__nv_bfloat16>);
RESNORM_NORM_BACKWARD_TYPES(, WideningGradients<__nv_bfloat16>);

}  // namespace resnorm::cuda
