// SPDX-License-Identifier: BSD-3-Clause
#include "norm_backward_dispatch.cuh"

namespace resnorm::cuda {

RESNORM_NORM_BACKWARD_TYPES(, false, SameTypes<__half>);
RESNORM_NORM_BACKWARD_TYPES(, false, Float32Residual<__half>);
RESNORM_NORM_BACKWARD_TYPES(, false, WideningResidual<__half>);

}  // namespace resnorm::cuda
