// SPDX-License-Identifier: BSD-3-Clause
// Tensors with the negative bit (x.conj().imag is one): PyTorch's fallback materialises them before an operator runs.
// Of an operator that writes it expects that it returns what it wrote, which ours, as functionalization wants, do not:
// it would read past the end of the stack. So these refuse such tensors.
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

namespace resnorm {

namespace {

void refuse_negative(const c10::OperatorHandle& op, torch::jit::Stack* /*stack*/) {
  TORCH_CHECK(false, op.schema().name(), " expects tensors without the negative bit: call resolve_neg() on them first");
}

}  // namespace

TORCH_LIBRARY_IMPL(resnorm, Negative, m) {
  for (const char* name : {"layer_norm_out", "residual_add_out", "add_layer_norm_out", "bias_activation_out"}) {
    m.impl(name, torch::CppFunction::makeFromBoxedFunction<&refuse_negative>());
  }
}

}  // namespace resnorm
