// SPDX-License-Identifier: BSD-3-Clause
// The activations by the names that the operators take.
#pragma once

#include <c10/util/string_view.h>

#include "../kernels/arguments.h"

namespace resnorm {

// "none", "relu", "gelu" (by erf) or "gelu_tanh"; ValueError for anything else.
Activation parse_activation(c10::string_view name);

}  // namespace resnorm
