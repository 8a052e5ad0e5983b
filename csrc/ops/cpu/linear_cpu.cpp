// SPDX-License-Identifier: BSD-3-Clause
#include <ATen/TensorOperators.h>
#include <ATen/ops/gelu.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/relu.h>
#include <torch/library.h>

#include "../linear.h"
#include "linear_backend.h"
#include "onednn_linear.h"

namespace resnorm {

namespace {

// In place: the product is nobody else's.
void activate_(Activation activation, Tensor& product) {
  switch (activation) {
    case Activation::kNone:
      return;
    case Activation::kRelu:
      at::relu_(product);
      return;
    case Activation::kGelu:
      at::gelu_(product);
      return;
    case Activation::kGeluTanh:
      at::gelu_(product, "tanh");
      return;
  }
}

Tensor linear_cpu(const Tensor& input, const Tensor& weight, const OptionalTensor& bias, c10::string_view activation,
                  const OptionalTensor& residual) {
  check_linear(input, weight, bias, residual);
  const auto epilogue = parse_activation(activation);
  const auto dtype = input.scalar_type();
  // Prepacking a weight for one call would not pay, nor would copying one that is transposed: where prepacked ones are
  // best, oneDNN takes those that are not.
  const bool by_onednn = input.numel() > 0 && weight.numel() > 0 && weight.is_contiguous() && onednn::supports(dtype) &&
                         linear_backend(dtype, weight.size(1), weight.size(0)) != LinearBackend::kAten;
  if (by_onednn) {
    return onednn::linear(input, weight, bias, epilogue, residual);
  }
  auto output = at::linear(input, weight, bias);
  activate_(epilogue, output);
  if (!residual.has_value()) return output;
  return residual->scalar_type() == output.scalar_type() ? output.add_(*residual) : output + *residual;
}

}  // namespace

TORCH_LIBRARY_IMPL(resnorm, CPU, m) { m.impl("linear", linear_cpu); }

}  // namespace resnorm
