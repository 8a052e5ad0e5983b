// SPDX-License-Identifier: BSD-3-Clause
#include "norm_backward_dispatch.cuh"

namespace resnorm::cuda {

RESNORM_NORM_BACKWARD_TYPES(, false, SameStream<__half>);
RESNORM_NORM_BACKWARD_TYPES(, false, Float32Stream<__half>);
RESNORM_NORM_BACKWARD_TYPES(, false, WideningStream<__half>);

}  // namespace resnorm::cuda
