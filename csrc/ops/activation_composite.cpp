// SPDX-License-Identifier: BSD-3-Clause
#include "activation_composite.h"

#include <ATen/ops/gelu.h>
#include <ATen/ops/gelu_backward.h>
#include <ATen/ops/relu.h>
#include <ATen/ops/threshold_backward.h>

namespace resnorm::composite {

Tensor activate(Activation activation, const Tensor& input) {
  switch (activation) {
    case Activation::kNone:
      return input;
    case Activation::kRelu:
      return at::relu(input);
    case Activation::kGelu:
      return at::gelu(input);
    case Activation::kGeluTanh:
      return at::gelu(input, "tanh");
  }
  TORCH_INTERNAL_ASSERT(false, "unknown activation");
}

void activate_in_place(Activation activation, Tensor& tensor) {
  switch (activation) {
    case Activation::kNone:
      return;
    case Activation::kRelu:
      at::relu_(tensor);
      return;
    case Activation::kGelu:
      at::gelu_(tensor);
      return;
    case Activation::kGeluTanh:
      at::gelu_(tensor, "tanh");
      return;
  }
  TORCH_INTERNAL_ASSERT(false, "unknown activation");
}

Tensor activate_backward(Activation activation, const Tensor& grad_output, const Tensor& input) {
  switch (activation) {
    case Activation::kNone:
      return grad_output;
    case Activation::kRelu:
      return at::threshold_backward(grad_output, input, 0);
    case Activation::kGelu:
      return at::gelu_backward(grad_output, input);
    case Activation::kGeluTanh:
      return at::gelu_backward(grad_output, input, "tanh");
  }
  TORCH_INTERNAL_ASSERT(false, "unknown activation");
}

}  // namespace resnorm::composite
