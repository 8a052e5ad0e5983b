// SPDX-License-Identifier: BSD-3-Clause
#include "norm_backward_dispatch.cuh"

namespace resnorm::cuda {

RESNORM_NORM_BACKWARD_TYPES(, SameStream<__half>);
RESNORM_NORM_BACKWARD_TYPES(, Float32Stream<__half>);
RESNORM_NORM_BACKWARD_TYPES(, WideningStream<__half>);

}  // namespace resnorm::cuda
