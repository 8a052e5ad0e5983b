// SPDX-License-Identifier: BSD-3-Clause
#include "prepacked_linear.h"

#include <ATen/ops/empty.h>
#include <ATen/record_function.h>

#include "../support/operands.h"
#include "cpu_kernels.h"

namespace resnorm::prepacked_linear {

namespace {

std::size_t prepacked_bytes(at::ScalarType dtype, int64_t out_features, int64_t in_features) {
  if (dtype != at::kFloat && dtype != at::kBFloat16) return 0;
  return cpu_kernels().prepacked_weight_bytes(kernel_dtype(dtype), out_features, in_features);
}

}  // namespace

bool supports(at::ScalarType dtype) { return prepacked_bytes(dtype, 1, 1) > 0; }

Tensor prepack_weight(const Tensor& weight) {
  const auto out_features = weight.size(0), in_features = weight.size(1);
  const auto bytes = prepacked_bytes(weight.scalar_type(), out_features, in_features);
  TORCH_CHECK(bytes > 0, "Expected weights of at least one element of a dtype that these kernels pack, but got ",
              weight.scalar_type(), " of shape ", weight.sizes());
  const RowView rows(weight, 1);
  auto prepacked = at::empty({static_cast<int64_t>(bytes / weight.element_size())}, weight.options());
  cpu_kernels().prepack_weight({out_features, in_features, rows.const_rows(), prepacked.mutable_data_ptr()},
                               parallel_for);
  return prepacked;
}

void linear_out(const Tensor& input, const Tensor& weight, const OptionalTensor& bias, Activation activation,
                const Tensor& output) {
  RECORD_FUNCTION("resnorm::prepacked_linear",
                  c10::ArrayRef<const c10::IValue>{});  // no operator, but in profiles like one
  const auto dtype = input.scalar_type();
  const auto out_features = output.size(1);
  const auto bytes = prepacked_bytes(dtype, out_features, input.size(1));
  TORCH_CHECK(weight.scalar_type() == dtype && weight.nbytes() == bytes, "Expected a weight prepacked for ",
              out_features, " features of inputs ", input.sizes(), " of ", dtype, ", but got ", weight.nbytes(),
              " bytes of ", weight.scalar_type());
  TORCH_CHECK(!bias.has_value() ||
                  (bias->dim() == 1 && bias->size(0) == out_features && bias->is_cpu() && bias->scalar_type() == dtype),
              "Expected bias of shape [", out_features, "] of ", dtype, " on the CPU, but got bias of shape ",
              bias->sizes(), " of ", bias->scalar_type(), " on ", bias->device());
  if (output.numel() == 0) return;
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
}

Tensor linear(const Tensor& input, const Tensor& weight, int64_t out_features, const OptionalTensor& bias,
              Activation activation) {
  auto sizes = input.sizes().vec();
  sizes.back() = out_features;
  auto output = at::empty(sizes, input.options());
  linear_out(input.reshape({-1, input.size(-1)}), weight, bias, activation, output.view({-1, out_features}));
  return output;
}

}  // namespace resnorm::prepacked_linear
