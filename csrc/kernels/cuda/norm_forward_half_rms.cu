// SPDX-License-Identifier: BSD-3-Clause
#include "norm_forward_dispatch.cuh"

namespace resnorm::cuda {

RESNORM_NORM_FORWARD_TYPES(, false, SameStream<__half>);
RESNORM_NORM_FORWARD_TYPES(, false, Float32Stream<__half>);
RESNORM_NORM_FORWARD_TYPES(, false, WideningStream<__half>);

}  // namespace resnorm::cuda
