// SPDX-License-Identifier: BSD-3-Clause
#include "norm_forward_dispatch.cuh"

namespace resnorm::cuda {

RESNORM_NORM_FORWARD_TYPES(, SameTypes<__half>);
RESNORM_NORM_FORWARD_TYPES(, Float32StreamTypes<__half>);
RESNORM_NORM_FORWARD_TYPES(, WideningTypes<__half>);

}  // namespace resnorm::cuda
