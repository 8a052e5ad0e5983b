// SPDX-License-Identifier: BSD-3-Clause
#include "norm_backward_dispatch.cuh"

namespace resnorm::cuda {

RESNORM_NORM_BACKWARD_TYPES(, true, SameTypes<__half>);
RESNORM_NORM_BACKWARD_TYPES(, true, Float32Residual<__half>);
RESNORM_NORM_BACKWARD_TYPES(, true, WideningResidual<__half>);

}  // namespace resnorm::cuda
