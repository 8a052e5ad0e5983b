// SPDX-License-Identifier: BSD-3-Clause
#include "../composite/packed_attention.h"

#include <ATen/Parallel.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>

namespace resnorm {

namespace {

// One parallel region for all sequences, each by one thread: a region for each costs more than a short sequence's
// attention. The longest first, whoever is free takes the next. Where there are too few sequences to share out, each of
// them is shared.
Tensor packed_attention_cpu(const Tensor& qkv, const Tensor& cu_seqlens, std::optional<c10::SymInt> max_seqlen,
                            std::optional<double> scale, bool causal) {
  auto output = packed_attention_meta(qkv, cu_seqlens, max_seqlen, scale, causal);
  auto sequences = composite::sequences_of(cu_seqlens, qkv.size(0), max_seqlen);
  std::stable_sort(sequences.begin(), sequences.end(),
                   [](const auto& a, const auto& b) { return a.length > b.length; });
  const auto threads = static_cast<int64_t>(at::get_num_threads());
  const auto count = static_cast<int64_t>(sequences.size());
  if (count < 2 * threads) {
    for (const auto& sequence : sequences) composite::attend(qkv, sequence, scale, causal, output);
    return output;
  }
  std::atomic<int64_t> next{0};
  at::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    const at::AutoDispatchBelowADInplaceOrView guard;  // as in the thread that called, whose state others do not share
    for (auto i = next++; i < count; i = next++) composite::attend(qkv, sequences[i], scale, causal, output);
  });
  return output;
}

}  // namespace

TORCH_LIBRARY_IMPL(resnorm, CPU, m) { m.impl("packed_attention", packed_attention_cpu); }

}  // namespace resnorm
