// SPDX-License-Identifier: BSD-3-Clause
// The norms in torch's own operators, differentiable any number of times and under every torch.func transform. They
// serve devices without kernels of ours, transforms and double backward.
#pragma once

#include "norm.h"

namespace resnorm::composite {

NormResults norm_forward(const NormCall& call);

// The statistics are recomputed from the sum, so that their dependence on it is differentiated too.
NormGradients norm_backward(const NormBackwardCall& call);

}  // namespace resnorm::composite
