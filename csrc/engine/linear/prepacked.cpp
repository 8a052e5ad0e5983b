// SPDX-License-Identifier: BSD-3-Clause
// This package's own kernel, csrc/kernels/cpu/prepacked_linear.h.
#include <ATen/ops/empty.h>
#include <ATen/record_function.h>

#include "../../ops/cpu/cpu_kernels.h"
#include "../../ops/support/operands.h"
#include "choice.h"

namespace resnorm::engine {

namespace {

std::size_t prepacked_bytes(at::ScalarType dtype, int64_t out_features, int64_t in_features) {
  if (dtype != at::kFloat && dtype != at::kBFloat16) return 0;
  return cpu_kernels().prepacked_weight_bytes(kernel_dtype(dtype), out_features, in_features);
}

bool supports(at::ScalarType dtype) { return prepacked_bytes(dtype, 1, 1) > 0; }

Tensor prepack(const Tensor& weight) {
  const auto out_features = weight.size(0), in_features = weight.size(1);
  const auto bytes = prepacked_bytes(weight.scalar_type(), out_features, in_features);
  TORCH_CHECK(bytes > 0, "Expected a weight of at least one element, but got weight of shape ", weight.sizes());
  const RowView rows(weight, 1);
  auto prepacked = at::empty({static_cast<int64_t>(bytes / weight.element_size())}, weight.options());
  cpu_kernels().prepack_weight({out_features, in_features, rows.const_rows(), prepacked.mutable_data_ptr()},
                               parallel_for);
  return prepacked;
}

Tensor multiply(const Tensor& input, const Tensor& weight, const OptionalTensor& bias, Activation activation,
                int64_t out_features, const Tensor& memory) {
  RECORD_FUNCTION("resnorm::prepacked_linear",
                  c10::ArrayRef<const c10::IValue>{});  // no operator, but in profiles like one
  auto output = memory.defined() ? memory : at::empty({input.size(0), out_features}, input.options());
  if (output.numel() == 0) return output;
  const RowView rows(input, 1);
  const VectorView bias_view(bias);
  cpu_kernels().prepacked_linear({.rows = input.size(0),
                                  .cols = input.size(1),
                                  .out_features = out_features,
                                  .input = rows.const_rows(),
                                  .prepacked = weight.const_data_ptr(),
                                  .bias = bias_view.const_vector(),
                                  .activation = activation,
                                  .output = result_rows(output, 1, true)},
                                 parallel_for);
  return output;
}

int64_t padded_rows(int64_t rows) { return rows; }

}  // namespace

const LinearBackend prepacked = {"resnorm", supports, prepack, multiply, padded_rows};

}  // namespace resnorm::engine
