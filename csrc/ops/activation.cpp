// SPDX-License-Identifier: BSD-3-Clause
#include "activation.h"

#include <c10/util/Exception.h>

namespace resnorm {

Activation parse_activation(c10::string_view name) {
  if (name == "none") return Activation::kNone;
  if (name == "relu") return Activation::kRelu;
  if (name == "gelu") return Activation::kGelu;
  if (name == "gelu_tanh") return Activation::kGeluTanh;
  TORCH_CHECK_VALUE(false, "Expected activation to be none, relu, gelu or gelu_tanh, but got ", std::string(name));
}

}  // namespace resnorm
