// SPDX-License-Identifier: BSD-3-Clause
// How the work of attention is cut. A group of rows is computed alike wherever it runs and whatever runs beside it, so
// results do not depend on the threads.
#pragma once

#include <cstdint>

#include "packed_attention_product.h"

namespace resnorm::cpu::RESNORM_ISA {
namespace {

constexpr std::int64_t smaller(std::int64_t a, std::int64_t b) { return a < b ? a : b; }

// Keys of a block, whole steps of them: as many rows of `width` as make up `floats`, but no more than a chunk holds.
inline constexpr std::int64_t kKeyStep = 32;

inline std::int64_t block_keys_of(std::int64_t floats, std::int64_t width) {
  const std::int64_t keys = floats / width / kKeyStep * kKeyStep;
  return keys < kKeyStep ? kKeyStep : smaller(keys, kChunkWords);
}

// Those that there is memory for: fewer where no sequence has as many.
inline std::int64_t keys_in_memory(std::int64_t block_keys, std::int64_t longest) {
  return smaller(block_keys, (longest + kKeyStep - 1) / kKeyStep * kKeyStep);
}

// A sequence's rows in groups of nearly equal height, so that none is left with a row or two: there a product is slow.
// All but the last are multiples of `granule` rows high, which divides kGroupRows.
class RowGroups {
 public:
  RowGroups(std::int64_t rows, bool causal, std::int64_t granule = 1)
      : rows_(rows),
        granule_(granule),
        granules_((rows + granule - 1) / granule),
        count_((rows + kGroupRows - 1) / kGroupRows),
        causal_(causal) {}

  std::int64_t count() const { return count_; }
  std::int64_t begin(std::int64_t group) const { return smaller(rows_, granules_ * group / count_ * granule_); }

  // What the groups before this one cost: their keys, in groups too (twice as many, to stay whole), and what each group
  // costs whatever its keys.
  std::int64_t cost_before(std::int64_t group) const { return group * ((causal_ ? group : 2 * count_) + kGroupCost); }
  std::int64_t cost() const { return cost_before(count_); }

  // The first group that begins at this cost or beyond, of those where the sequence may be cut between threads: both
  // sides of a cut pack the keys.
  std::int64_t first_at(std::int64_t cost) const {
    if (cost > cost_before(count_ - 1)) return count_;
    std::int64_t group = 0;
    while (group < count_ && cost_before(group) < cost) group += kGroupsPerCut;
    return smaller(group, count_);
  }

 private:
  static constexpr std::int64_t kGroupsPerCut = 4, kGroupCost = 4;

  std::int64_t rows_, granule_, granules_, count_;
  bool causal_;
};

inline std::int64_t longest_sequence(const PackedAttention& a) {
  std::int64_t longest = 0;
  for (std::int64_t i = 0; i < a.sequences; ++i) {
    const std::int64_t tokens = a.cu_seqlens[i + 1] - a.cu_seqlens[i];
    if (longest < tokens) longest = tokens;
  }
  return longest;
}

// What is not worth a second thread: so many multiply-adds, of which a unit of cost is about as many as a group has
// rows, squared, for each dimension of a head.
inline std::int64_t least_cost(const PackedAttention& a) {
  constexpr std::int64_t kMultiplyAdds = 2 * 1024 * 1024;
  return kMultiplyAdds / (kGroupRows * kGroupRows * a.head_dim) + 1;
}

inline std::int64_t total_cost(const PackedAttention& a) {
  std::int64_t cost = 0;
  for (std::int64_t i = 0; i < a.sequences; ++i) {
    cost += RowGroups(a.cu_seqlens[i + 1] - a.cu_seqlens[i], a.causal).cost();
  }
  return cost * a.heads;
}

// body(sequence, head, groups, first, last) for the groups that begin at a cost from `begin` up to `end`.
template <class Body>
inline void for_each_head_within(const PackedAttention& a, std::int64_t begin, std::int64_t end, const Body& body) {
  std::int64_t before = 0;
  for (std::int64_t sequence = 0; sequence < a.sequences && before < end; ++sequence) {
    const RowGroups groups(a.cu_seqlens[sequence + 1] - a.cu_seqlens[sequence], a.causal);
    const std::int64_t cost = groups.cost();
    if (cost == 0) continue;
    std::int64_t head = begin <= before ? 0 : smaller((begin - before) / cost, a.heads);
    for (; head < a.heads && before + head * cost < end; ++head) {
      const std::int64_t first = groups.first_at(begin - before - head * cost);
      const std::int64_t last = groups.first_at(end - before - head * cost);
      if (first < last) body(sequence, head, groups, first, last);
    }
    before += a.heads * cost;
  }
}

}  // namespace
}  // namespace resnorm::cpu::RESNORM_ISA
