// SPDX-License-Identifier: BSD-3-Clause
#include "linear.h"

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "support/autocast.h"
#include "support/operator_handle.h"

namespace resnorm {

namespace {

void check_same_kind(const char* name, const Tensor& tensor, const Tensor& input) {
  TORCH_CHECK(tensor.device() == input.device(), "Expected ", name, " on ", input.device(),
              ", the input's device, but got ", name, " on ", tensor.device());
  TORCH_CHECK(tensor.scalar_type() == input.scalar_type(), "Expected ", name, " of dtype ", input.scalar_type(),
              ", the input's, but got ", name, " of ", tensor.scalar_type());
}

template <c10::DeviceType device, c10::DispatchKey key>
Tensor linear_autocast(const Tensor& input, const Tensor& weight, const OptionalTensor& bias,
                       c10::string_view activation) {
  c10::impl::ExcludeDispatchKeyGuard guard(key);
  const auto cast = [](const auto& tensor) { return autocast_to(autocast_dtype(device), tensor, device); };
  return linear(cast(input), cast(weight), cast(bias), activation);
}

}  // namespace

Tensor linear(const Tensor& input, const Tensor& weight, const OptionalTensor& bias, c10::string_view activation) {
  static const auto op = operator_handle("resnorm::linear", &linear);
  return op.call(input, weight, bias, activation);
}

void check_linear(const Tensor& input, const Tensor& weight, const OptionalTensor& bias) {
  check_floating("linear", input);
  TORCH_CHECK(weight.dim() == 2,
              "Expected weight to be 2-dimensional, (out_features, in_features), but got weight of shape ",
              weight.sym_sizes());
  TORCH_CHECK(input.dim() >= 1 && input.sym_size(-1) == weight.sym_size(1), "Expected input of shape (*, ",
              weight.sym_size(1), ") for a weight of shape ", weight.sym_sizes(), ", but got input of shape ",
              input.sym_sizes());
  check_same_kind("weight", weight, input);
  if (bias.has_value()) {
    TORCH_CHECK(bias->dim() == 1 && bias->sym_size(0) == weight.sym_size(0), "Expected bias of shape [",
                weight.sym_size(0), "], but got bias of shape ", bias->sym_sizes());
    check_same_kind("bias", *bias, input);
  }
}

Tensor linear_meta(const Tensor& input, const Tensor& weight, const OptionalTensor& bias, c10::string_view activation) {
  check_linear(input, weight, bias);
  parse_activation(activation);
  auto sizes = input.sym_sizes().vec();
  sizes.back() = weight.sym_size(0);
  return at::empty_symint(sizes, input.options());
}

TORCH_LIBRARY_FRAGMENT(resnorm, m) {
  m.def("linear(Tensor input, Tensor weight, Tensor? bias=None, str activation=\"none\") -> Tensor",
        {at::Tag::pt2_compliant_tag});
}

TORCH_LIBRARY_IMPL(resnorm, Meta, m) { m.impl("linear", linear_meta); }

// As torch casts the operands of its own linear.
TORCH_LIBRARY_IMPL(resnorm, AutocastCPU, m) {
  m.impl("linear", linear_autocast<c10::DeviceType::CPU, c10::DispatchKey::AutocastCPU>);
}

TORCH_LIBRARY_IMPL(resnorm, AutocastCUDA, m) {
  m.impl("linear", linear_autocast<c10::DeviceType::CUDA, c10::DispatchKey::AutocastCUDA>);
}

}  // namespace resnorm
