// SPDX-License-Identifier: BSD-3-Clause
#include "linear.h"

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "support/autocast.h"
#include "support/operator_handle.h"

namespace resnorm {

namespace {

c10::SymDimVector output_sizes(const Tensor& input, const Tensor& weight) {
  c10::SymDimVector sizes(input.sym_sizes().begin(), input.sym_sizes().end());
  sizes.back() = weight.sym_size(0);
  return sizes;
}

void check_same_kind(const char* name, const Tensor& tensor, const Tensor& input) {
  TORCH_CHECK(tensor.device() == input.device(), "Expected ", name, " on ", input.device(),
              ", the input's device, but got ", name, " on ", tensor.device());
  TORCH_CHECK(tensor.scalar_type() == input.scalar_type(), "Expected ", name, " of dtype ", input.scalar_type(),
              ", the input's, but got ", name, " of ", tensor.scalar_type());
}

template <c10::DeviceType device, c10::DispatchKey key>
Tensor linear_autocast(const Tensor& input, const Tensor& weight, const OptionalTensor& bias,
                       c10::string_view activation, const OptionalTensor& residual) {
  c10::impl::ExcludeDispatchKeyGuard guard(key);
  const auto cast = [](const auto& tensor) { return autocast_to(autocast_dtype(device), tensor, device); };
  return linear(cast(input), cast(weight), cast(bias), activation, residual);
}

}  // namespace

Tensor linear(const Tensor& input, const Tensor& weight, const OptionalTensor& bias, c10::string_view activation,
              const OptionalTensor& residual) {
  static const auto op = operator_handle("resnorm::linear", &linear);
  return op.call(input, weight, bias, activation, residual);
}

void check_linear(const Tensor& input, const Tensor& weight, const OptionalTensor& bias,
                  const OptionalTensor& residual) {
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
  if (residual.has_value()) {
    const auto sizes = output_sizes(input, weight);
    TORCH_CHECK(residual->sym_sizes() == c10::SymIntArrayRef(sizes), "Expected residual of the output's shape ",
                c10::SymIntArrayRef(sizes), ", but got residual of shape ", residual->sym_sizes());
    TORCH_CHECK(residual->device() == input.device(), "Expected residual on ", input.device(),
                ", the input's device, but got residual on ", residual->device());
  }
}

Tensor linear_meta(const Tensor& input, const Tensor& weight, const OptionalTensor& bias, c10::string_view activation,
                   const OptionalTensor& residual) {
  check_linear(input, weight, bias, residual);
  parse_activation(activation);
  const auto dtype =
      residual.has_value() ? c10::promoteTypes(input.scalar_type(), residual->scalar_type()) : input.scalar_type();
  return at::empty_symint(output_sizes(input, weight), input.options().dtype(dtype));
}

TORCH_LIBRARY_FRAGMENT(resnorm, m) {
  m.def(
      "linear(Tensor input, Tensor weight, Tensor? bias=None, str activation=\"none\", Tensor? residual=None) "
      "-> Tensor",
      {at::Tag::pt2_compliant_tag});
}

TORCH_LIBRARY_IMPL(resnorm, Meta, m) { m.impl("linear", linear_meta); }

// As torch casts the operands of its own linear; the residual takes part by type promotion.
TORCH_LIBRARY_IMPL(resnorm, AutocastCPU, m) {
  m.impl("linear", linear_autocast<c10::DeviceType::CPU, c10::DispatchKey::AutocastCPU>);
}

TORCH_LIBRARY_IMPL(resnorm, AutocastCUDA, m) {
  m.impl("linear", linear_autocast<c10::DeviceType::CUDA, c10::DispatchKey::AutocastCUDA>);
}

}  // namespace resnorm
