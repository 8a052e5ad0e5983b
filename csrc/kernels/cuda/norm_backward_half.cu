// SPDX-License-Identifier: BSD-3-Clause
#include "norm_backward_dispatch.cuh"

namespace resnorm::cuda {

RESNORM_NORM_BACKWARD_TYPES(, SameGradients<__half>);
RESNORM_NORM_BACKWARD_TYPES(, Float32StreamGradients<__half>);
RESNORM_NORM_BACKWARD_TYPES(, WideningGradients<__half>);

}  // namespace resnorm::cuda
