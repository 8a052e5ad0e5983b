// SPDX-License-Identifier: BSD-3-Clause
#include "packed_attention.h"

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "support/autocast.h"
#include "support/operator_handle.h"

namespace resnorm {

namespace {

void check_packed_attention(const Tensor& qkv, const Tensor& cu_seqlens, const std::optional<c10::SymInt>& max_seqlen,
                            double dropout_p, const OptionalTensor& seed) {
  check_floating("packed_attention", qkv);
  TORCH_CHECK(qkv.dim() == 4 && qkv.sym_size(1) == 3, "Expected qkv of shape (tokens, 3, heads, head_dim), but got ",
              qkv.sym_sizes());
  check_cu_seqlens(cu_seqlens);
  TORCH_CHECK(cu_seqlens.is_cpu() || cu_seqlens.device() == qkv.device(), "Expected cu_seqlens on cpu or ",
              qkv.device(), ", qkv's device, but got cu_seqlens on ", cu_seqlens.device());
  TORCH_CHECK_VALUE(!max_seqlen.has_value() || *max_seqlen >= 0, "Expected max_seqlen >= 0, but got ", *max_seqlen);
  check_dropout(dropout_p, seed, qkv);
}

c10::SymDimVector output_shape(const Tensor& qkv) { return {qkv.sym_size(0), qkv.sym_size(2), qkv.sym_size(3)}; }

template <c10::DeviceType device, c10::DispatchKey key>
Tensor packed_attention_autocast(const Tensor& qkv, const Tensor& cu_seqlens, std::optional<c10::SymInt> max_seqlen,
                                 std::optional<double> scale, bool causal, double dropout_p,
                                 const OptionalTensor& seed) {
  c10::impl::ExcludeDispatchKeyGuard guard(key);
  return packed_attention(autocast_to(autocast_dtype(device), qkv, device), cu_seqlens, std::move(max_seqlen), scale,
                          causal, dropout_p, seed);
}

}  // namespace

Tensor packed_attention(const Tensor& qkv, const Tensor& cu_seqlens, std::optional<c10::SymInt> max_seqlen,
                        std::optional<double> scale, bool causal, double dropout_p, const OptionalTensor& seed) {
  static const auto op = operator_handle("resnorm::packed_attention", &packed_attention);
  return op.call(qkv, cu_seqlens, std::move(max_seqlen), scale, causal, dropout_p, seed);
}

std::tuple<Tensor, Tensor> packed_attention_forward(const Tensor& qkv, const Tensor& cu_seqlens,
                                                    std::optional<c10::SymInt> max_seqlen, std::optional<double> scale,
                                                    bool causal, double dropout_p, const OptionalTensor& seed) {
  static const auto op = operator_handle("resnorm::_packed_attention_forward", &packed_attention_forward);
  return op.call(qkv, cu_seqlens, std::move(max_seqlen), scale, causal, dropout_p, seed);
}

Tensor packed_attention_backward(const Tensor& grad_output, const Tensor& qkv, const OptionalTensor& output,
                                 const OptionalTensor& logsumexp, const Tensor& cu_seqlens,
                                 std::optional<c10::SymInt> max_seqlen, std::optional<double> scale, bool causal,
                                 double dropout_p, const OptionalTensor& seed) {
  static const auto op = operator_handle("resnorm::_packed_attention_backward", &packed_attention_backward);
  return op.call(grad_output, qkv, output, logsumexp, cu_seqlens, std::move(max_seqlen), scale, causal, dropout_p,
                 seed);
}

void check_cu_seqlens(const Tensor& cu_seqlens) {
  TORCH_CHECK(cu_seqlens.scalar_type() == at::kInt, "Expected cu_seqlens of dtype Int, but got ",
              cu_seqlens.scalar_type());
  TORCH_CHECK(cu_seqlens.dim() == 1 && cu_seqlens.sym_size(0) >= 1,
              "Expected cu_seqlens of shape (sequences + 1,), but got ", cu_seqlens.sym_sizes());
}

Tensor packed_attention_meta(const Tensor& qkv, const Tensor& cu_seqlens, std::optional<c10::SymInt> max_seqlen,
                             std::optional<double> /*scale*/, bool /*causal*/, double dropout_p,
                             const OptionalTensor& seed) {
  check_packed_attention(qkv, cu_seqlens, max_seqlen, dropout_p, seed);
  return at::empty_symint(output_shape(qkv), qkv.options());
}

std::tuple<Tensor, Tensor> packed_attention_forward_meta(const Tensor& qkv, const Tensor& cu_seqlens,
                                                         std::optional<c10::SymInt> max_seqlen,
                                                         std::optional<double> scale, bool causal, double dropout_p,
                                                         const OptionalTensor& seed) {
  return {packed_attention_meta(qkv, cu_seqlens, std::move(max_seqlen), scale, causal, dropout_p, seed),
          at::empty_symint({qkv.sym_size(0), qkv.sym_size(2)}, qkv.options().dtype(at::kFloat))};
}

Tensor packed_attention_backward_meta(const Tensor& grad_output, const Tensor& qkv, const OptionalTensor& output,
                                      const OptionalTensor& logsumexp, const Tensor& cu_seqlens,
                                      std::optional<c10::SymInt> max_seqlen, std::optional<double> /*scale*/,
                                      bool /*causal*/, double dropout_p, const OptionalTensor& seed) {
  check_packed_attention(qkv, cu_seqlens, max_seqlen, dropout_p, seed);
  const auto shape = output_shape(qkv);
  check_out("grad_output", grad_output, shape, qkv.scalar_type(), qkv.device());
  if (output.has_value()) check_out("output", *output, shape, qkv.scalar_type(), qkv.device());
  if (logsumexp.has_value()) {
    check_out("logsumexp", *logsumexp, c10::SymIntArrayRef(shape).slice(0, 2), at::kFloat, qkv.device());
  }
  return at::empty_symint(qkv.sym_sizes(), qkv.options());
}

TORCH_LIBRARY_FRAGMENT(resnorm, m) {
  m.def(
      "packed_attention(Tensor qkv, Tensor cu_seqlens, SymInt? max_seqlen=None, float? scale=None, bool causal=False, "
      "float dropout_p=0.0, Tensor? seed=None) -> Tensor",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "_packed_attention_forward(Tensor qkv, Tensor cu_seqlens, SymInt? max_seqlen, float? scale, bool causal, "
      "float dropout_p, Tensor? seed) -> (Tensor, Tensor)",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "_packed_attention_backward(Tensor grad_output, Tensor qkv, Tensor? output, Tensor? logsumexp, "
      "Tensor cu_seqlens, SymInt? max_seqlen, float? scale, bool causal, float dropout_p, Tensor? seed) -> Tensor",
      {at::Tag::pt2_compliant_tag});
}

TORCH_LIBRARY_IMPL(resnorm, Meta, m) {
  m.impl("packed_attention", packed_attention_meta);
  m.impl("_packed_attention_forward", packed_attention_forward_meta);
  m.impl("_packed_attention_backward", packed_attention_backward_meta);
}

// As torch casts the operands of scaled_dot_product_attention.
TORCH_LIBRARY_IMPL(resnorm, AutocastCPU, m) {
  m.impl("packed_attention", packed_attention_autocast<c10::DeviceType::CPU, c10::DispatchKey::AutocastCPU>);
}

TORCH_LIBRARY_IMPL(resnorm, AutocastCUDA, m) {
  m.impl("packed_attention", packed_attention_autocast<c10::DeviceType::CUDA, c10::DispatchKey::AutocastCUDA>);
}

}  // namespace resnorm
