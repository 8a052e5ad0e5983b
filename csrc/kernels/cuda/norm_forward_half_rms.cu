// SPDX-License-Identifier: BSD-3-Clause
#include "norm_forward_dispatch.cuh"

namespace resnorm::cuda {

RESNORM_NORM_FORWARD_TYPES(, false, SameTypes<__half>);
RESNORM_NORM_FORWARD_TYPES(, false, Float32Residual<__half>);
RESNORM_NORM_FORWARD_TYPES(, false, WideningResidual<__half>);

}  // namespace resnorm::cuda
