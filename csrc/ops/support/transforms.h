// SPDX-License-Identifier: BSD-3-Clause
// What an operator's Autograd kernel asks first: does anybody want derivatives, and of which kind.
#pragma once

#include <ATen/core/grad_mode.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/forward_grad.h>

#include <array>

#include "checks.h"

namespace resnorm {

// Whether reverse-mode autograd has to record this call.
inline bool requires_grad_one(const Tensor& tensor) { return tensor.requires_grad(); }
inline bool requires_grad_one(const OptionalTensor& tensor) { return tensor.has_value() && tensor->requires_grad(); }

template <typename... Tensors>
bool requires_grad(const Tensors&... tensors) {
  return at::GradMode::is_enabled() && (... || requires_grad_one(tensors));
}

// Whether only the formula in torch's own operators will do: torch.func transforms refuse torch::autograd::Function,
// and forward-mode derivatives have no kernel.
inline bool has_tangent(const Tensor& tensor) { return tensor._fw_grad(/*level=*/0).defined(); }
inline bool has_tangent(const OptionalTensor& tensor) { return tensor.has_value() && has_tangent(*tensor); }

inline bool in_transform() {
  constexpr auto key = c10::DispatchKey::FuncTorchDynamicLayerFrontMode;
  return c10::impl::tls_is_dispatch_key_included(key) || c10::impl::tls_is_dispatch_key_excluded(key);
}

template <typename... Tensors>
bool needs_formula(const Tensors&... tensors) {
  return in_transform() || (... || has_tangent(tensors));
}

// Whether the gradient of each tensor argument of a Function is wanted; an absent argument has no edge to ask about.
template <size_t N>
std::array<bool, N> wanted_gradients(const torch::autograd::AutogradContext& context,
                                     const std::array<bool, N>& present) {
  std::array<bool, N> wanted{};
  size_t edge = 0;
  for (size_t i = 0; i < N; ++i) wanted[i] = present[i] && context.needs_input_grad(edge++);
  return wanted;
}

// A saved tensor that may have been absent.
inline OptionalTensor saved_optional(const Tensor& tensor) {
  return tensor.defined() ? OptionalTensor(tensor) : std::nullopt;
}

// Operators that write into their arguments are not differentiable.
template <typename... Tensors>
void check_no_grad_for_out(const char* op, const Tensors&... tensors) {
  TORCH_CHECK(!requires_grad(tensors...), op,
              "(): functions with out=... arguments don't support automatic differentiation, but one of the arguments "
              "requires grad.");
  TORCH_CHECK_NOT_IMPLEMENTED(!(... || has_tangent(tensors)), "Trying to use forward AD with ", op,
                              " that does not support it because it is an out= function");
}

}  // namespace resnorm
