// SPDX-License-Identifier: BSD-3-Clause
// PyTorch's own product: every dtype, and the weight as it is.
#include <ATen/ops/addmm.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/mm.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

#include "../../ops/activation_composite.h"
#include "choice.h"

namespace resnorm::engine {

namespace {

bool supports(at::ScalarType /*dtype*/) { return true; }

Tensor prepack(const Tensor& weight) { return weight; }

Tensor product(const Tensor& input, const Tensor& weight, const OptionalTensor& bias, const Tensor& memory) {
  if (!memory.defined()) return at::linear(input, weight, bias);
  auto output = memory;
  return bias.has_value() ? at::addmm_out(output, *bias, input, weight.t()) : at::mm_out(output, input, weight.t());
}

Tensor multiply(const Tensor& input, const Tensor& weight, const OptionalTensor& bias, Activation activation,
                int64_t /*out_features*/, const Tensor& memory) {
  // What is multiplied has the dtype that it is to be multiplied in.
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::DispatchKey::AutocastCPU);
  auto output = product(input, weight, bias, memory);
  composite::activate_in_place(activation, output);
  return output;
}

int64_t padded_rows(int64_t rows) { return rows; }

}  // namespace

const LinearBackend aten = {"aten", supports, prepack, multiply, padded_rows};

}  // namespace resnorm::engine
