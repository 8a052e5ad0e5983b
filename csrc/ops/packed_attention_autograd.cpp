// SPDX-License-Identifier: BSD-3-Clause
#include <torch/library.h>

#include "packed_attention.h"
#include "packed_attention_composite.h"
#include "support/transforms.h"

namespace resnorm {

namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

class PackedAttentionFunction : public torch::autograd::Function<PackedAttentionFunction> {
 public:
  static Tensor forward(AutogradContext* context, const Tensor& qkv, const Tensor& cu_seqlens,
                        std::optional<c10::SymInt> max_seqlen, std::optional<double> scale, bool causal,
                        double dropout_p, const OptionalTensor& seed) {
    at::AutoDispatchBelowADInplaceOrView guard;
    Tensor output, logsumexp;
    if (qkv.is_cpu()) {
      std::tie(output, logsumexp) =
          packed_attention_forward(qkv, cu_seqlens, max_seqlen, scale, causal, dropout_p, seed);
    } else {
      output = packed_attention(qkv, cu_seqlens, max_seqlen, scale, causal, dropout_p, seed);
    }
    context->save_for_backward(
        {qkv, cu_seqlens, logsumexp.defined() ? output : Tensor(), logsumexp, seed.value_or(Tensor())});
    context->saved_data["max_seqlen"] = std::move(max_seqlen);
    context->saved_data["scale"] = scale;
    context->saved_data["causal"] = causal;
    context->saved_data["dropout_p"] = dropout_p;
    return output;
  }

  static variable_list backward(AutogradContext* context, const variable_list& grads) {
    const auto saved = context->get_saved_variables();
    auto& data = context->saved_data;
    return {packed_attention_backward(grads[0], saved[0], saved_optional(saved[2]), saved_optional(saved[3]), saved[1],
                                      data["max_seqlen"].toOptional<c10::SymInt>(), data["scale"].toOptional<double>(),
                                      data["causal"].toBool(), data["dropout_p"].toDouble(), saved_optional(saved[4])),
            Tensor(),
            Tensor(),
            Tensor(),
            Tensor(),
            Tensor(),
            Tensor()};
  }
};

Tensor packed_attention_autograd(const Tensor& qkv, const Tensor& cu_seqlens, std::optional<c10::SymInt> max_seqlen,
                                 std::optional<double> scale, bool causal, double dropout_p,
                                 const OptionalTensor& seed) {
  if (needs_formula(qkv)) return composite::masked_attention(qkv, cu_seqlens, scale, causal, dropout_p, seed);
  if (requires_grad(qkv)) {
    return PackedAttentionFunction::apply(qkv, cu_seqlens, std::move(max_seqlen), scale, causal, dropout_p, seed);
  }
  at::AutoDispatchBelowADInplaceOrView guard;
  return packed_attention(qkv, cu_seqlens, std::move(max_seqlen), scale, causal, dropout_p, seed);
}

Tensor packed_attention_backward_autograd(const Tensor& grad_output, const Tensor& qkv, const OptionalTensor& output,
                                          const OptionalTensor& logsumexp, const Tensor& cu_seqlens,
                                          std::optional<c10::SymInt> max_seqlen, std::optional<double> scale,
                                          bool causal, double dropout_p, const OptionalTensor& seed) {
  if (needs_formula(grad_output, qkv) || requires_grad(grad_output, qkv)) {
    return composite::masked_attention_backward(grad_output, qkv, cu_seqlens, scale, causal, dropout_p, seed);
  }
  at::AutoDispatchBelowADInplaceOrView guard;
  return packed_attention_backward(grad_output, qkv, output, logsumexp, cu_seqlens, std::move(max_seqlen), scale,
                                   causal, dropout_p, seed);
}

}  // namespace

TORCH_LIBRARY_IMPL(resnorm, Autograd, m) {
  m.impl("packed_attention", packed_attention_autograd);
  m.impl("_packed_attention_backward", packed_attention_backward_autograd);
}

}  // namespace resnorm
