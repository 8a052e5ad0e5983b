// SPDX-License-Identifier: BSD-3-Clause
#include <torch/library.h>

#include <algorithm>

#include "encode.h"
#include "encode_composite.h"
#include "support/transforms.h"

namespace resnorm {

namespace {

Tensor encode_autograd(const Tensor& input, const OptionalTensor& key_mask, const OptionalTensors& parameters,
                       int64_t num_layers, int64_t head_dim, double scale, double eps, c10::string_view activation,
                       bool norm_first, bool causal, c10::string_view padding,
                       std::optional<at::ScalarType> product_dtype) {
  const auto any = [&](const auto& wants) {
    return wants(OptionalTensor(input)) || std::any_of(parameters.begin(), parameters.end(), wants);
  };
  if (in_transform() || any([](const OptionalTensor& each) { return has_tangent(each); }) ||
      (at::GradMode::is_enabled() && any([](const OptionalTensor& each) { return requires_grad_one(each); }))) {
    return composite::encode(encode_call(input, key_mask, parameters, num_layers, head_dim, scale, eps, activation,
                                         norm_first, causal, padding));
  }
  at::AutoDispatchBelowADInplaceOrView guard;
  return encode(input, key_mask, parameters, num_layers, head_dim, scale, eps, activation, norm_first, causal, padding,
                product_dtype);
}

}  // namespace

TORCH_LIBRARY_IMPL(resnorm, Autograd, m) { m.impl("encode", encode_autograd); }

}  // namespace resnorm
