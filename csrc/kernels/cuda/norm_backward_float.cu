// SPDX-License-Identifier: BSD-3-Clause
#include "norm_backward_dispatch.cuh"

namespace resnorm::cuda {

RESNORM_NORM_BACKWARD_TYPES(, true, SameTypes<float>);

}  // namespace resnorm::cuda
