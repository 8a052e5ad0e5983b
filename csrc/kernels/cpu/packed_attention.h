// SPDX-License-Identifier: BSD-3-Clause
// output = dropout(softmax(query key^T * scale)) value within each sequence of a packed batch. A head's keys and values
// are laid out for the products a block of keys at a time; then one group of rows after the other is multiplied by the
// keys, becomes probabilities and is multiplied by the values, all of it in the caches.
#pragma once

#include <cstdint>

#include "loops.h"
#include "packed_attention_buffers.h"
#include "packed_attention_panels.h"
#include "packed_attention_product.h"
#include "packed_attention_schedule.h"
#include "packed_attention_softmax.h"
#include "parallel.h"
#include "product_words.h"
#include "simd.h"

namespace resnorm::cpu::RESNORM_ISA {
namespace {

// One head of one sequence.
template <class T>
class HeadAttention {
 public:
  HeadAttention(const PackedAttention& a, std::int64_t sequence, std::int64_t head, const RowGroups& groups,
                const AttentionBuffers& buffers)
      : a_(a),
        tokens_(a.cu_seqlens[sequence + 1] - a.cu_seqlens[sequence]),
        groups_(groups),
        buffers_(buffers),
        draws_(a, sequence, head, buffers.draws, buffers.draws_pitch()),
        scale_(score_scale(a)) {
    const std::int64_t first = a.cu_seqlens[sequence];
    const std::int64_t offset = first * a.token_stride + head * a.head_stride;
    query_ = static_cast<const T*>(a.query) + offset;
    key_ = static_cast<const T*>(a.key) + offset;
    value_ = static_cast<const T*>(a.value) + offset;
    output_stride_ = a.heads * a.head_dim;
    output_ = static_cast<T*>(a.output) + first * output_stride_ + head * a.head_dim;
    logsumexp_ = a.logsumexp == nullptr ? nullptr : a.logsumexp + first * a.heads + head;
  }

  // The rows of groups `first` up to `last`, at most what one pass serves.
  void attend(std::int64_t first, std::int64_t last) const {
    // Whole words of keys, so that what a word holds beside a row's last key does not depend on where passes end.
    const std::int64_t last_row = (groups_.begin(last) + Words::kValues - 1) / Words::kValues * Words::kValues;
    const std::int64_t keys = a_.causal ? smaller(tokens_, last_row) : tokens_;
    for (std::int64_t key = 0; key < keys; key += buffers_.block_keys) {
      const Block block{key, smaller(buffers_.block_keys, keys - key)};
      pack_keys<Words>(key_ + key * a_.token_stride, a_.token_stride, block.count, a_.head_dim, buffers_.key_panels);
      pack_values<Words>(value_ + key * a_.token_stride, a_.token_stride, block.count, a_.head_dim,
                         block.value_stride(), buffers_.value_panels);
      for (std::int64_t group = first; group < last; ++group) attend_block(block, group, group - first);
    }
  }

 private:
  using Words = typename WordsOf<T>::Type;
  using V = Vec<float>;
  struct Block {
    std::int64_t begin, count;

    std::int64_t value_stride() const { return words_of<Words>(count) * V::kSize; }
  };

  void attend_block(const Block& block, std::int64_t group, std::int64_t slot) const {
    const std::int64_t row = groups_.begin(group), rows = groups_.begin(group + 1) - row;
    const std::int64_t keys = (a_.causal ? row + rows : tokens_) - block.begin;
    if (keys <= 0) return;
    const VisibleKeys visible{row + 1 - block.begin, smaller(keys, block.count), a_.causal};
    SoftmaxState& state = buffers_.states[slot];
    if (block.begin == 0) prefetch_next_head(row, rows);
    copy_queries<Words>(query_ + row * a_.token_stride, a_.token_stride, rows, a_.head_dim, scale_, buffers_.queries);
    const std::int64_t depth = words_of<Words>(a_.head_dim);
    multiply<Words>(rows, buffers_.queries, buffers_.key_panels, depth * V::kSize, vectors_of(visible.last_row), depth,
                    score_piece<T>(tokens_), buffers_.scores);
    softmax<Words>(buffers_.scores, rows, visible, {draws_, row, block.begin}, scale_of_scores<Words>(scale_),
                   block.begin == 0, state);
    multiply<Words>(rows, buffers_.scores, buffers_.value_panels, block.value_stride(), vectors_of(a_.head_dim),
                    words_of<Words>(visible.last_row), kProductPiece, buffers_.products);
    for (std::int64_t i = 0; i < rows; ++i) {
      float* sums = block.begin == 0 && keys <= block.count
                        ? nullptr
                        : buffers_.outputs + (slot * kGroupRows + i) * buffers_.width;
      finish_row(buffers_.products + i * kRowStride, sums, block.begin == 0, keys <= block.count, state.rescale[i],
                 state.denominator[i] / a_.dropout.scale, output_ + (row + i) * output_stride_);
    }
    if (logsumexp_ != nullptr && keys <= block.count) store_logsumexp(state, row, rows);
  }

  void store_logsumexp(const SoftmaxState& state, std::int64_t row, std::int64_t rows) const {
    for (std::int64_t i = 0; i < rows; ++i) {
      const float largest = state.largest[i] * scale_of_scores<Words>(scale_);
      logsumexp_[(row + i) * a_.heads] = largest + __builtin_log2f(state.denominator[i]);
    }
  }

  // Adds a block's product to a row's sums; after the last block they become the output.
  RESNORM_INLINE void finish_row(const float* product, float* sums, bool first_block, bool last_block, float rescale,
                                 float denominator, T* output) const {
    const V rescales = V::broadcast(rescale), denominators = V::broadcast(denominator);
    for_each_vector<float, 1>(a_.head_dim, [&](std::int64_t i, auto, auto lanes) RESNORM_INLINE_LAMBDA {
      V sum = V::load(product + word_offset(i), AllLanes{});
      if (!first_block) sum = fma(V::load(sums + i, AllLanes{}), rescales, sum);
      if (last_block) {
        (sum / denominators).store(output + i, lanes);
      } else {
        sum.store(sums + i, AllLanes{});
      }
    });
  }

  // Tokens are far apart in memory: more than the hardware's own prefetching follows.
  RESNORM_INLINE void prefetch_next_head(std::int64_t row, std::int64_t rows) const {
    const T* const operands[] = {query_, key_, value_};
    for (const T* from : operands) {
      from += row * a_.token_stride + a_.head_stride;
      for (std::int64_t i = 0; i < rows; ++i, from += a_.token_stride) {
        for (std::int64_t j = 0; j < a_.head_dim; j += 64 / static_cast<std::int64_t>(sizeof(T))) {
          __builtin_prefetch(from + j, 0, 2);
        }
      }
    }
  }

  const PackedAttention& a_;
  std::int64_t tokens_;
  const RowGroups& groups_;
  const AttentionBuffers& buffers_;
  WeightDraws draws_;
  float scale_;
  const T *query_, *key_, *value_;
  T* output_;
  float* logsumexp_;
  std::int64_t output_stride_;
};

template <class T>
void attend_range(const PackedAttention& a, std::int64_t begin, std::int64_t end) {
  const AttentionBuffers buffers(a.head_dim, longest_sequence(a));
  for_each_head_within(
      a, begin, end,
      [&](std::int64_t sequence, std::int64_t head, const RowGroups& groups, std::int64_t first, std::int64_t last) {
        const HeadAttention<T> attention(a, sequence, head, groups, buffers);
        for (; first < last; first += buffers.pass_groups) {
          attention.attend(first, smaller(first + buffers.pass_groups, last));
        }
      });
}

inline void packed_attention(const PackedAttention& a, ParallelFor parallel_for) {
  if (kExtends && a.dtype != DType::kBFloat16) return base::attention_kernels.packed_attention(a, parallel_for);
  auto* range = attend_range<BFloat16>;
  if constexpr (!kExtends) {
    if (a.dtype == DType::kFloat32) range = attend_range<float>;
    if (a.dtype == DType::kFloat16) range = attend_range<Float16>;
  }
  parallel(parallel_for, total_cost(a), least_cost(a),
           [&](std::int64_t begin, std::int64_t end) { range(a, begin, end); });
}

}  // namespace
}  // namespace resnorm::cpu::RESNORM_ISA
