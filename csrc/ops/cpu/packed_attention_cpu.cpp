// SPDX-License-Identifier: BSD-3-Clause
#include "packed_attention_cpu.h"

#include <ATen/Parallel.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>

#include "../packed_attention_composite.h"
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

void attend_by_kernel(const Tensor& qkv, const Tensor& bounds, double scale, bool causal, const Tensor& output) {
  const auto packed = qkv.size(3) == 1 || qkv.stride(3) == 1 ? qkv : qkv.contiguous();
  cpu_kernels().packed_attention({.sequences = bounds.numel() - 1,
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
                                  .output = output.mutable_data_ptr()},
                                 parallel_for);
}

Tensor packed_attention_cpu(const Tensor& qkv, const Tensor& cu_seqlens, std::optional<c10::SymInt> max_seqlen,
                            std::optional<double> scale, bool causal) {
  auto output = packed_attention_meta(qkv, cu_seqlens, max_seqlen, scale, causal);
  const auto bounds = composite::bounds_of(cu_seqlens, qkv.size(0), max_seqlen);
  attend_into(output, qkv, bounds, composite::scale_or_default(scale, qkv), causal);
  return output;
}

}  // namespace

// The kernel has no float64, and its scores' largest is the largest only where the scale is not negative.
void attend_into(const Tensor& output, const Tensor& qkv, const Tensor& bounds, double scale, bool causal) {
  check_shape("output", output, c10::SymDimVector{qkv.sym_size(0), qkv.sym_size(2), qkv.sym_size(3)});
  if (output.numel() == 0) return;
  if (qkv.scalar_type() == at::kDouble || scale < 0) {
    attend_by_sequence(qkv, composite::sequences_of(bounds, qkv.size(0), std::nullopt), scale, causal, output);
  } else {
    attend_by_kernel(qkv, bounds, scale, causal, output);
  }
}

TORCH_LIBRARY_IMPL(resnorm, CPU, m) { m.impl("packed_attention", packed_attention_cpu); }

}  // namespace resnorm
