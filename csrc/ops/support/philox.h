// SPDX-License-Identifier: BSD-3-Clause
// Dropout by the same Philox stream as the kernels', in torch's own operators: for devices without kernels of ours, for
// torch.func transforms and for double backward.
#pragma once

#include "checks.h"

namespace resnorm::composite {

// values * scale where the element's draw keeps it, else exactly 0; values itself where p rounds to no dropout.
Tensor dropout(const Tensor& values, double p, const OptionalTensor& seed);

}  // namespace resnorm::composite
