// SPDX-License-Identifier: BSD-3-Clause
// Autocast, as torch treats layer_norm: on CUDA it runs in float32; on the CPU autocast leaves it alone, and so nothing
// is registered there. residual_add follows plain type promotion, as torch's addition does.
#include "autocast.h"

#include <ATen/autocast_mode.h>
#include <torch/library.h>

#include "add_layer_norm.h"
#include "layer_norm.h"

namespace resnorm {

namespace {

template <typename TensorOrOptional>
TensorOrOptional to_float(const TensorOrOptional& tensor) {
  return autocast_to(at::kFloat, tensor, at::kCUDA);
}

Tensor layer_norm_autocast(const Tensor& input, c10::SymIntArrayRef normalized_shape, const OptionalTensor& weight,
                           const OptionalTensor& bias, double eps) {
  c10::impl::ExcludeDispatchKeyGuard guard(c10::DispatchKey::AutocastCUDA);
  return layer_norm(to_float(input), normalized_shape, to_float(weight), to_float(bias), eps);
}

std::tuple<Tensor, Tensor> add_layer_norm_autocast(const Tensor& input, const Tensor& residual,
                                                   c10::SymIntArrayRef normalized_shape, const OptionalTensor& weight,
                                                   const OptionalTensor& bias, double eps,
                                                   const OptionalTensor& input_bias, double dropout_p,
                                                   const OptionalTensor& seed, bool prenorm,
                                                   std::optional<at::ScalarType> residual_dtype) {
  c10::impl::ExcludeDispatchKeyGuard guard(c10::DispatchKey::AutocastCUDA);
  return add_layer_norm(to_float(input), to_float(residual), normalized_shape, to_float(weight), to_float(bias), eps,
                        to_float(input_bias), dropout_p, seed, prenorm, residual_dtype);
}

}  // namespace

at::ScalarType autocast_dtype(at::DeviceType device) { return at::autocast::get_autocast_dtype(device); }

Tensor autocast_to(at::ScalarType dtype, const Tensor& tensor, at::DeviceType device) {
  return at::autocast::cached_cast(dtype, tensor, device);
}

OptionalTensor autocast_to(at::ScalarType dtype, const OptionalTensor& tensor, at::DeviceType device) {
  return at::autocast::cached_cast(dtype, tensor, device);
}

TORCH_LIBRARY_IMPL(resnorm, AutocastCUDA, m) {
  m.impl("layer_norm", layer_norm_autocast);
  m.impl("add_layer_norm", add_layer_norm_autocast);
}

}  // namespace resnorm
