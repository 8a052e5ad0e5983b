// SPDX-License-Identifier: BSD-3-Clause
// What the CUDA kernels' plans say, in words and for Python; no GPU is needed to ask.
#pragma once

#include <c10/core/ScalarType.h>

#include <optional>
#include <string>

#include "../../kernels/cuda/plan.h"

namespace resnorm {

// "128 threads a row, 2 vectors a thread, ...".
std::string describe(const cuda::Plan& plan);

// The plan of `pass` ("norm_forward", "norm_backward" or "residual_add") for rows of `cols` elements of `dtype`, with a
// residual of `residual_dtype` where there is one, `aligned` to 16 bytes or not, on sm_`architecture`.
cuda::Plan kernel_plan(const std::string& pass, int64_t cols, at::ScalarType dtype,
                       std::optional<at::ScalarType> residual_dtype, bool dropout, bool aligned, int architecture);

}  // namespace resnorm
