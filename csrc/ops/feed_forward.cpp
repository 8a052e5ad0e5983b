// SPDX-License-Identifier: BSD-3-Clause
#include "feed_forward.h"

#include <torch/library.h>

#include "bias_activation.h"
#include "linear.h"
#include "support/autocast.h"
#include "support/dropout.h"
#include "support/operator_handle.h"

namespace resnorm {

namespace {

template <c10::DeviceType device, c10::DispatchKey key>
Tensor feed_forward_autocast(const Tensor& input, const Tensor& weight1, const OptionalTensor& bias1,
                             const Tensor& weight2, const OptionalTensor& bias2, c10::string_view activation,
                             double dropout_p, const OptionalTensor& seed) {
  c10::impl::ExcludeDispatchKeyGuard guard(key);
  const auto cast = [](const auto& tensor) { return autocast_to(autocast_dtype(device), tensor, device); };
  return feed_forward(cast(input), cast(weight1), cast(bias1), cast(weight2), cast(bias2), activation, dropout_p, seed);
}

}  // namespace

Tensor feed_forward(const Tensor& input, const Tensor& weight1, const OptionalTensor& bias1, const Tensor& weight2,
                    const OptionalTensor& bias2, c10::string_view activation, double dropout_p,
                    const OptionalTensor& seed) {
  static const auto op = operator_handle("resnorm::feed_forward", &feed_forward);
  return op.call(input, weight1, bias1, weight2, bias2, activation, dropout_p, seed);
}

void check_feed_forward(const Tensor& input, c10::string_view activation, double dropout_p,
                        const OptionalTensor& seed) {
  check_floating("feed_forward", input);
  TORCH_CHECK_VALUE(parse_activation(activation) != Activation::kNone,
                    "feed_forward: expected an activation, but got none");
  check_dropout(dropout_p, seed, input);
}

Tensor composite::feed_forward(const Tensor& input, const Tensor& weight1, const OptionalTensor& bias1,
                               const Tensor& weight2, const OptionalTensor& bias2, c10::string_view activation,
                               double dropout_p, const OptionalTensor& seed) {
  check_feed_forward(input, activation, dropout_p, seed);
  if (dropout_threshold(dropout_p) == 0) {
    return linear(linear(input, weight1, bias1, activation), weight2, bias2, "none");
  }
  const auto product = linear(input, weight1, std::nullopt, "none");
  return linear(bias_activation(product, bias1, activation, dropout_p, seed), weight2, bias2, "none");
}

TORCH_LIBRARY_FRAGMENT(resnorm, m) {
  m.def(
      "feed_forward(Tensor input, Tensor weight1, Tensor? bias1, Tensor weight2, Tensor? bias2, "
      "str activation=\"gelu\", float dropout_p=0.0, Tensor? seed=None) -> Tensor",
      {at::Tag::pt2_compliant_tag});
}

TORCH_LIBRARY_IMPL(resnorm, CompositeExplicitAutograd, m) { m.impl("feed_forward", composite::feed_forward); }

TORCH_LIBRARY_IMPL(resnorm, FuncTorchBatched, m) { m.impl("feed_forward", composite::feed_forward); }

// As torch casts the operands of its own linear.
TORCH_LIBRARY_IMPL(resnorm, AutocastCPU, m) {
  m.impl("feed_forward", feed_forward_autocast<c10::DeviceType::CPU, c10::DispatchKey::AutocastCPU>);
}

TORCH_LIBRARY_IMPL(resnorm, AutocastCUDA, m) {
  m.impl("feed_forward", feed_forward_autocast<c10::DeviceType::CUDA, c10::DispatchKey::AutocastCUDA>);
}

}  // namespace resnorm
