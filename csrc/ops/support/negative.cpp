// SPDX-License-Identifier: BSD-3-Clause
// Operators that write into their arguments refuse tensors with the negative bit, such as x.conj().imag, whose elements
// stand in memory with the other sign. PyTorch has a fallback for such tensors, which gives an operator a copy with the
// right signs. Where an operator writes, the fallback copies what it returns back; ours return nothing, because
// functionalization asks for that, and the fallback would take a value off the stack that is not there.
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

namespace resnorm {

namespace {

void refuse_negative(const c10::OperatorHandle& op, torch::jit::Stack* /*stack*/) {
  const auto& name = op.schema().name();
  TORCH_CHECK(false, name == "resnorm::_norm_out" ? "a norm with out" : name,
              " expects tensors without the negative bit: call resolve_neg() on them first");
}

}  // namespace

TORCH_LIBRARY_IMPL(resnorm, Negative, m) {
  for (const char* name : {"layer_norm_out", "rms_norm_out", "add_layer_norm_out", "add_rms_norm_out", "_norm_out",
                           "residual_add_out", "bias_activation_out"}) {
    m.impl(name, torch::CppFunction::makeFromBoxedFunction<&refuse_negative>());
  }
}

}  // namespace resnorm
