// SPDX-License-Identifier: BSD-3-Clause
// The parameters' gradients: sums over the rows, which blocks leave as partial sums of some rows each.
#pragma once

#include <cuda_runtime_api.h>

#include <initializer_list>

#include "../arguments.h"
#include "plan.h"

namespace resnorm::cuda {

// Adds `partials`, [plan.row_subsets][gradients][cols] of float64 or float32, into the gradients that are not absent.
cudaError_t finish_column_sums(const void* partials, bool is_float64, const Plan& plan, std::int64_t cols,
                               std::initializer_list<Vector> gradients, cudaStream_t stream);

}  // namespace resnorm::cuda
