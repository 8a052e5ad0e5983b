// SPDX-License-Identifier: BSD-3-Clause
#pragma once

#include <ATen/core/dispatch/Dispatcher.h>

namespace resnorm {

// The typed handle of a registered operator whose signature is that of the C++ function `Signature` points to.
template <typename Signature>
auto operator_handle(const char* name, Signature*) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

}  // namespace resnorm
