// SPDX-License-Identifier: BSD-3-Clause
// Dropout by the same Philox stream as the kernels', in torch's own operators: for devices without kernels of ours, for
// torch.func transforms and for double backward.
#pragma once

#include "checks.h"

namespace resnorm::composite {

// values * scale where the element's draw keeps it, else exactly 0; values itself where p rounds to no dropout.
Tensor dropout(const Tensor& values, double p, const OptionalTensor& seed);

// Whether dropout keeps elements of a logical matrix of `cols` columns, a multiple of kElementsPerBlock. `row` and
// `col` are int64 and extend to the shape of the result.
Tensor keep_mask(const Tensor& row, const Tensor& col, int64_t cols, double p, const Tensor& seed);

}  // namespace resnorm::composite
