// SPDX-License-Identifier: BSD-3-Clause
// encode in torch's own operators, on the padded batch: differentiable, and under every torch.func transform.
#pragma once

#include "encode.h"

namespace resnorm::composite {

Tensor encode(const EncodeCall& call);

}  // namespace resnorm::composite
