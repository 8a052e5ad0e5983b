// SPDX-License-Identifier: BSD-3-Clause
#include "packed_attention_cpu.h"

#include <ATen/Parallel.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>

#include "../packed_attention_composite.h"
#include "../support/dropout.h"
#include "../support/operands.h"
#include "cpu_kernels.h"

namespace resnorm {

namespace {

// By torch, sequence by sequence. One parallel region for all of them, each by one thread: a region for each costs more
// than a short sequence's attention. The longest first, whoever is free takes the next. Where there are too few
// sequences to share out, each of them is shared.
void attend_by_sequence(const Tensor& qkv, std::vector<composite::Sequence> sequences, double scale, bool causal,
                        const Tensor& output) {
  std::stable_sort(sequences.begin(), sequences.end(),
                   [](const auto& a, const auto& b) { return a.length > b.length; });
  const auto threads = static_cast<int64_t>(at::get_num_threads());
  const auto count = static_cast<int64_t>(sequences.size());
  if (count < 2 * threads) {
    for (const auto& sequence : sequences) composite::attend(qkv, sequence, scale, causal, output);
    return;
  }
  std::atomic<int64_t> next{0};
  at::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    const at::AutoDispatchBelowADInplaceOrView guard;  // as in the thread that called, whose state others do not share
    for (auto i = next++; i < count; i = next++) composite::attend(qkv, sequences[i], scale, causal, output);
  });
}

// The kernels have no float64, and their scores' largest is the largest only where the scale is not negative.
bool has_kernel(at::ScalarType dtype, double scale) { return dtype != at::kDouble && scale >= 0; }

// `packed` has contiguous heads.
PackedAttention arguments(const Tensor& packed, const Tensor& bounds, double scale, bool causal, const Dropout& dropout,
                          const Tensor& output) {
  return {.sequences = bounds.numel() - 1,
          .heads = packed.size(2),
          .head_dim = packed.size(3),
          .cu_seqlens = bounds.const_data_ptr<int32_t>(),
          .query = packed.select(1, 0).const_data_ptr(),
          .key = packed.select(1, 1).const_data_ptr(),
          .value = packed.select(1, 2).const_data_ptr(),
          .token_stride = packed.stride(0),
          .head_stride = packed.stride(2),
          .dtype = kernel_dtype(packed.scalar_type()),
          .scale = scale,
          .causal = causal,
          .dropout = dropout,
          .output = output.data_ptr()};
}

Tensor with_contiguous_heads(const Tensor& qkv) {
  return qkv.size(3) == 1 || qkv.stride(3) == 1 ? qkv : qkv.contiguous();
}

Tensor packed_attention_cpu(const Tensor& qkv, const Tensor& cu_seqlens, std::optional<c10::SymInt> max_seqlen,
                            std::optional<double> scale, bool causal, double dropout_p, const OptionalTensor& seed) {
  if (dropout_threshold(dropout_p) > 0) {
    return std::get<0>(
        packed_attention_forward(qkv, cu_seqlens, std::move(max_seqlen), scale, causal, dropout_p, seed));
  }
  auto output = packed_attention_meta(qkv, cu_seqlens, max_seqlen, scale, causal, dropout_p, seed);
  const auto bounds = composite::bounds_of(cu_seqlens, qkv.size(0), max_seqlen);
  attend_into(output, qkv, bounds, composite::scale_or_default(scale, qkv), causal);
  return output;
}

std::tuple<Tensor, Tensor> packed_attention_forward_cpu(const Tensor& qkv, const Tensor& cu_seqlens,
                                                        std::optional<c10::SymInt> max_seqlen,
                                                        std::optional<double> scale, bool causal, double dropout_p,
                                                        const OptionalTensor& seed) {
  const auto factor = qkv.dim() == 4 ? composite::scale_or_default(scale, qkv) : 1.0;
  if (!has_kernel(qkv.scalar_type(), factor)) {
    return composite::packed_attention_forward(qkv, cu_seqlens, std::move(max_seqlen), scale, causal, dropout_p, seed);
  }
  auto results = packed_attention_forward_meta(qkv, cu_seqlens, max_seqlen, scale, causal, dropout_p, seed);
  const auto& [output, logsumexp] = results;
  const auto bounds = composite::bounds_of(cu_seqlens, qkv.size(0), max_seqlen);
  if (output.numel() == 0 || dropout_threshold(dropout_p) == 65536) {  // even a NaN or Inf contributes nothing
    output.zero_(), logsumexp.zero_();
    return results;
  }
  const auto packed = with_contiguous_heads(qkv);
  auto call = arguments(packed, bounds, factor, causal, CpuKernels::dropout(dropout_p, seed), output);
  call.logsumexp = logsumexp.mutable_data_ptr<float>();
  cpu_kernels().packed_attention(call, parallel_for);
  return results;
}

Tensor packed_attention_backward_cpu(const Tensor& grad_output, const Tensor& qkv, const OptionalTensor& output,
                                     const OptionalTensor& logsumexp, const Tensor& cu_seqlens,
                                     std::optional<c10::SymInt> max_seqlen, std::optional<double> scale, bool causal,
                                     double dropout_p, const OptionalTensor& seed) {
  const auto factor = qkv.dim() == 4 ? composite::scale_or_default(scale, qkv) : 1.0;
  if (!has_kernel(qkv.scalar_type(), factor)) {
    return composite::packed_attention_backward(grad_output, qkv, output, logsumexp, cu_seqlens, std::move(max_seqlen),
                                                scale, causal, dropout_p, seed);
  }
  TORCH_CHECK(output.has_value() && logsumexp.has_value(),
              "Expected the output and logsumexp of the forward pass, but got None");
  auto grad_qkv = packed_attention_backward_meta(grad_output, qkv, output, logsumexp, cu_seqlens, max_seqlen, scale,
                                                 causal, dropout_p, seed);
  const auto bounds = composite::bounds_of(cu_seqlens, qkv.size(0), max_seqlen);
  if (grad_qkv.numel() == 0 || dropout_threshold(dropout_p) == 65536) return grad_qkv.zero_();
  const auto packed = with_contiguous_heads(qkv);
  const auto grad = grad_output.contiguous(), result = output->contiguous(), sums = logsumexp->contiguous();
  auto forward = arguments(packed, bounds, factor, causal, CpuKernels::dropout(dropout_p, seed), result);
  forward.logsumexp = sums.data_ptr<float>();
  cpu_kernels().packed_attention_backward({.forward = forward,
                                           .grad_output = grad.const_data_ptr(),
                                           .grad_query = grad_qkv.select(1, 0).mutable_data_ptr(),
                                           .grad_key = grad_qkv.select(1, 1).mutable_data_ptr(),
                                           .grad_value = grad_qkv.select(1, 2).mutable_data_ptr(),
                                           .grad_token_stride = grad_qkv.stride(0),
                                           .grad_head_stride = grad_qkv.stride(2)},
                                          parallel_for);
  return grad_qkv;
}

}  // namespace

void attend_into(const Tensor& output, const Tensor& qkv, const Tensor& bounds, double scale, bool causal) {
  check_shape("output", output, c10::SymDimVector{qkv.sym_size(0), qkv.sym_size(2), qkv.sym_size(3)});
  if (output.numel() == 0) return;
  if (has_kernel(qkv.scalar_type(), scale)) {
    const auto packed = with_contiguous_heads(qkv);
    cpu_kernels().packed_attention(arguments(packed, bounds, scale, causal, {}, output), parallel_for);
  } else {
    attend_by_sequence(qkv, composite::sequences_of(bounds, qkv.size(0), std::nullopt), scale, causal, output);
  }
}

TORCH_LIBRARY_IMPL(resnorm, CPU, m) {
  m.impl("packed_attention", packed_attention_cpu);
  m.impl("_packed_attention_forward", packed_attention_forward_cpu);
  m.impl("_packed_attention_backward", packed_attention_backward_cpu);
}

}  // namespace resnorm
