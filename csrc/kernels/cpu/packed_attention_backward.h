// SPDX-License-Identifier: BSD-3-Clause
// The backward pass of packed_attention. With P the attention weights, M = dropout's mask and scale, and dO the
// output's gradient (Dao et al. 2022, "FlashAttention", appendix B.4):
//
//   dV = (P M)^T dO    dP = dO V^T M    dS = P (dP - rowsum(dO O))    dQ = dS K scale    dK = dS^T Q scale
//
// P is computed again from the scores and the logarithm of their sum that the forward pass has kept: a block of keys at
// a time, against one block of queries after another, all of it in the caches.
#pragma once

#include <cstdint>

#include "loops.h"
#include "packed_attention_backward_buffers.h"
#include "packed_attention_dropout.h"
#include "packed_attention_panels.h"
#include "packed_attention_product.h"
#include "packed_attention_schedule.h"
#include "packed_attention_softmax.h"
#include "parallel.h"
#include "product_words.h"
#include "simd.h"

namespace resnorm::cpu::RESNORM_ISA {
namespace {

// What makes the rows of one word of weights from scores and back.
template <class Words>
struct WeightRows {
  float logsumexp[Words::kValues];
  float output_product[Words::kValues];  // rowsum(dO O)
  std::int64_t visible[Words::kValues];  // keys of the block
  const std::uint16_t* draws[Words::kValues];
};

// From the scores of kValues rows and the gradients of their weights to words of P M, over rows, and of dS, over rows
// and, where that is another memory, over keys. `keys` is how many the block's last query sees: beyond what the rows
// see the words are 0.
template <class Words, bool kDrops>
RESNORM_NOINLINE void weight_rows(const WeightRows<Words>& rows, std::int64_t keys, float scale, const Dropout& dropout,
                                  const float* scores, float* grad_weights, float* weights, float* grad_scores) {
  using V = Vec<float>;
  constexpr int kValues = Words::kValues;
  const V scales = V::broadcast(scale), drop_scales = V::broadcast(dropout.scale);
  const auto word = [&](std::int64_t i, const auto& lanes_of) RESNORM_INLINE_LAMBDA {
    V p[kValues], ds[kValues];
    unrolled<kValues>([&](auto row) RESNORM_INLINE_LAMBDA {
      const std::int64_t at = row * kRowStride + i;
      const V score = V::load(scores + at, AllLanes{});
      V grad = V::load(grad_weights + at, AllLanes{});
      const V weight = exp2<typename Words::Value>(fma(score, scales, V::broadcast(-rows.logsumexp[row])));
      p[row] = weight;
      if constexpr (kDrops) {
        p[row] = weight.keep(rows.draws[row] + i, dropout.threshold);
        grad = grad.keep(rows.draws[row] + i, dropout.threshold) * drop_scales;
      }
      p[row] = p[row].only(lanes_of(row));
      ds[row] = (weight * (grad - V::broadcast(rows.output_product[row]))).only(lanes_of(row));
      if constexpr (kValues > 1) Words::store(ds[row], grad_weights + row * kRowStride + i / kValues);
    });
    Words::interleave(p).store(weights + i, AllLanes{});
    Words::interleave(ds).store(grad_scores + i, AllLanes{});
  };
  std::int64_t full = keys;
  for (const std::int64_t visible : rows.visible) full = smaller(full, visible);
  std::int64_t i = 0;
  for (; i + V::kSize <= full; i += V::kSize) word(i, [](int) RESNORM_INLINE_LAMBDA { return AllLanes{}; });
  for (; i < keys; i += V::kSize) {
    word(i, [&](int row) RESNORM_INLINE_LAMBDA {
      const std::int64_t visible = rows.visible[row] - i;
      return FirstLanes{static_cast<int>(visible < 0 ? 0 : smaller(visible, V::kSize))};
    });
  }
}

// One head of one sequence.
template <class T>
class HeadGradient {
 public:
  using Words = typename WordsOf<T>::Type;

  HeadGradient(const PackedAttentionBackward& a, std::int64_t sequence, std::int64_t head,
               const AttentionBackwardBuffers<Words>& buffers)
      : a_(a.forward),
        tokens_(a_.cu_seqlens[sequence + 1] - a_.cu_seqlens[sequence]),
        groups_(tokens_, a_.causal, Words::kValues),
        buffers_(buffers),
        draws_(a_, sequence, head, buffers.draws, buffers.draws_pitch()),
        scale_(score_scale(a_)),
        output_stride_(a_.heads * a_.head_dim),
        grad_stride_(a.grad_token_stride) {
    const std::int64_t first = a_.cu_seqlens[sequence];
    const std::int64_t offset = first * a_.token_stride + head * a_.head_stride;
    query_ = static_cast<const T*>(a_.query) + offset;
    key_ = static_cast<const T*>(a_.key) + offset;
    value_ = static_cast<const T*>(a_.value) + offset;
    const std::int64_t output_offset = first * output_stride_ + head * a_.head_dim;
    output_ = static_cast<const T*>(a_.output) + output_offset;
    grad_output_ = static_cast<const T*>(a.grad_output) + output_offset;
    logsumexp_ = a_.logsumexp + first * a_.heads + head;
    const std::int64_t grad_offset = first * grad_stride_ + head * a.grad_head_stride;
    grad_query_ = static_cast<T*>(a.grad_query) + grad_offset;
    grad_key_ = static_cast<T*>(a.grad_key) + grad_offset;
    grad_value_ = static_cast<T*>(a.grad_value) + grad_offset;
  }

  void differentiate() const {
    for (std::int64_t key = 0; key < tokens_; key += buffers_.block_keys) {
      const KeyBlock keys{key, smaller(buffers_.block_keys, tokens_ - key)};
      pack(keys);
      std::int64_t group = 0;
      if (a_.causal) {
        while (groups_.begin(group + 1) <= key) ++group;
      }
      for (; group < groups_.count(); group += kGroupsPerBlock) {
        add_queries(keys, group, smaller(group + kGroupsPerBlock, groups_.count()));
      }
      store_rows(buffers_.grad_keys, keys.count, static_cast<float>(a_.scale), grad_key_ + key * grad_stride_);
      store_rows(buffers_.grad_values, keys.count, a_.dropout.scale, grad_value_ + key * grad_stride_);
    }
  }

 private:
  using V = Vec<float>;

  struct KeyBlock {
    std::int64_t begin, count;

    std::int64_t row_panel_stride() const { return words_of<Words>(count) * V::kSize; }
  };

  void pack(const KeyBlock& keys) const {
    const T* const key = key_ + keys.begin * a_.token_stride;
    const T* const value = value_ + keys.begin * a_.token_stride;
    pack_keys<Words>(key, a_.token_stride, keys.count, a_.head_dim, buffers_.key_panels);
    pack_keys<Words>(value, a_.token_stride, keys.count, a_.head_dim, buffers_.value_panels);
    pack_values<Words>(key, a_.token_stride, keys.count, a_.head_dim, keys.row_panel_stride(), buffers_.key_row_panels);
    const auto bytes = static_cast<std::size_t>(keys.count * buffers_.width) * sizeof(float);
    __builtin_memset(buffers_.grad_keys, 0, bytes);
    __builtin_memset(buffers_.grad_values, 0, bytes);
  }

  // What groups `first` up to `last` add to the gradients.
  void add_queries(const KeyBlock& keys, std::int64_t first, std::int64_t last) const {
    const std::int64_t row = groups_.begin(first), rows = groups_.begin(last) - row;
    const std::int64_t visible = a_.causal ? smaller(keys.count, row + rows - keys.begin) : keys.count;
    for (std::int64_t group = first; group < last; ++group) add_group(keys, visible, group, row);
    const std::int64_t depth = words_of<Words>(rows), stride = depth * V::kSize, panels = vectors_of(a_.head_dim);
    pack_values<Words>(query_ + row * a_.token_stride, a_.token_stride, rows, a_.head_dim, stride,
                       buffers_.query_panels);
    pack_values<Words>(grad_output_ + row * output_stride_, output_stride_, rows, a_.head_dim, stride,
                       buffers_.grad_output_panels);
    add_product_over_rows<Words>(visible, buffers_.weights, buffers_.grad_output_panels, stride, panels, depth,
                                 buffers_.grad_values);
    add_product_over_rows<Words>(visible, buffers_.grad_scores, buffers_.query_panels, stride, panels, depth,
                                 buffers_.grad_keys);
  }

  // The words of a group of a block of queries, whose first row is `block_row` and whose last one sees `block_keys`
  // keys of the block, and what they add to the gradients of the group's queries.
  void add_group(const KeyBlock& keys, std::int64_t block_keys, std::int64_t group, std::int64_t block_row) const {
    const std::int64_t row = groups_.begin(group), rows = groups_.begin(group + 1) - row;
    const std::int64_t visible = a_.causal ? smaller(keys.count, row + rows - keys.begin) : keys.count;
    const std::int64_t offset = (row - block_row) / Words::kValues * kRowStride;
    float* const weights = buffers_.weights + offset;
    float* const grad_scores = buffers_.grad_scores + offset;
    // Words that are floats are the same over rows as over keys.
    float* const scores = Words::kValues == 1 ? weights : buffers_.scores;
    float* const grad_weights = Words::kValues == 1 ? grad_scores : buffers_.grad_weights;

    prefetch_queries(groups_.begin(smaller(group + 2, groups_.count())), rows);
    const std::int64_t depth = words_of<Words>(a_.head_dim), panel_stride = depth * V::kSize;
    copy_queries<Words>(query_ + row * a_.token_stride, a_.token_stride, rows, a_.head_dim, scale_, buffers_.queries);
    copy_queries<Words>(grad_output_ + row * output_stride_, output_stride_, rows, a_.head_dim, 1,
                        buffers_.grad_outputs);
    multiply<Words>(rows, buffers_.queries, buffers_.key_panels, panel_stride, vectors_of(visible), depth,
                    score_piece<T>(tokens_), scores);
    multiply<Words>(rows, buffers_.grad_outputs, buffers_.value_panels, panel_stride, vectors_of(visible), depth,
                    score_piece<T>(tokens_), grad_weights);
    for (std::int64_t i = 0; i < rows; i += Words::kValues) {
      make_words(keys, block_keys, row + i, smaller(Words::kValues, rows - i), scores + i * kRowStride,
                 grad_weights + i * kRowStride, weights + i / Words::kValues * kRowStride,
                 grad_scores + i / Words::kValues * kRowStride);
    }
    multiply<Words>(rows, grad_weights, buffers_.key_row_panels, keys.row_panel_stride(), vectors_of(a_.head_dim),
                    words_of<Words>(visible), kProductPiece, buffers_.products);
    for (std::int64_t i = 0; i < rows; ++i) {
      if (a_.causal && row + i < keys.begin) continue;  // which sees nothing of the block
      add_grad_query(keys, row + i, buffers_.products + i * kRowStride);
    }
  }

  // Tokens are far apart in memory: more than the hardware's own prefetching follows.
  RESNORM_INLINE void prefetch_queries(std::int64_t row, std::int64_t rows) const {
    for (const std::int64_t last = smaller(row + rows, tokens_); row < last; ++row) {
      for (std::int64_t j = 0; j < a_.head_dim; j += 64 / static_cast<std::int64_t>(sizeof(T))) {
        prefetch(query_ + row * a_.token_stride + j);
        prefetch(grad_output_ + row * output_stride_ + j);
        prefetch(output_ + row * output_stride_ + j);
      }
    }
  }

  // Of `count` rows from `row` on; a word's others are 0.
  void make_words(const KeyBlock& keys, std::int64_t block_keys, std::int64_t row, std::int64_t count,
                  const float* scores, float* grad_weights, float* weights, float* grad_scores) const {
    WeightRows<Words> rows = {};
    for (int i = 0; i < static_cast<int>(count); ++i) {
      rows.logsumexp[i] = logsumexp_[(row + i) * a_.heads];
      rows.output_product[i] = output_product(row + i);
      const std::int64_t visible = a_.causal ? row + i + 1 - keys.begin : keys.count;
      rows.visible[i] = visible < 0 ? 0 : smaller(visible, keys.count);
    }
    with_flag(a_.dropout.threshold != 0, [&](auto drops) RESNORM_INLINE_LAMBDA {
      if constexpr (drops != 0) {
        for (int i = 0; i < Words::kValues; ++i) rows.draws[i] = draws_.row(row + i, keys.begin, block_keys, i);
      }
      weight_rows<Words, drops != 0>(rows, block_keys, scale_of_scores<Words>(scale_), a_.dropout, scores, grad_weights,
                                     weights, grad_scores);
    });
  }

  float output_product(std::int64_t row) const {
    const T* const output = output_ + row * output_stride_;
    const T* const grad_output = grad_output_ + row * output_stride_;
    V sums[2] = {};
    for_each_vector<float, 2>(a_.head_dim, [&](std::int64_t i, auto slot, auto lanes) RESNORM_INLINE_LAMBDA {
      sums[slot] = fma(V::load(output + i, lanes), V::load(grad_output + i, lanes), sums[slot]);
    });
    return total<float>(sums);
  }

  // Adds a block of keys' product; the last block's sum is the gradient.
  void add_grad_query(const KeyBlock& keys, std::int64_t row, const float* product) const {
    const bool is_first = keys.begin == 0;
    const std::int64_t seen = a_.causal ? row + 1 : tokens_;
    const bool is_last = seen <= keys.begin + keys.count;
    float* const sums = is_first && is_last ? nullptr : buffers_.grad_queries + row * buffers_.width;
    T* const grad_query = grad_query_ + row * grad_stride_;
    const V scale = V::broadcast(static_cast<float>(a_.scale));
    for_each_vector<float, 1>(a_.head_dim, [&](std::int64_t i, auto, auto lanes) RESNORM_INLINE_LAMBDA {
      V sum = V::load(product + word_offset(i), AllLanes{});
      if (!is_first) sum = V::load(sums + i, AllLanes{}) + sum;
      if (is_last) {
        (sum * scale).store(grad_query + i, lanes);
      } else {
        sum.store(sums + i, AllLanes{});
      }
    });
  }

  void store_rows(const float* sums, std::int64_t rows, float scale, T* to) const {
    for (std::int64_t row = 0; row < rows; ++row, sums += buffers_.width, to += grad_stride_) {
      for_each_vector<float, 1>(a_.head_dim, [&](std::int64_t i, auto, auto lanes) RESNORM_INLINE_LAMBDA {
        (V::load(sums + i, AllLanes{}) * V::broadcast(scale)).store(to + i, lanes);
      });
    }
  }

  const PackedAttention& a_;
  std::int64_t tokens_;
  RowGroups groups_;
  const AttentionBackwardBuffers<Words>& buffers_;
  WeightDraws draws_;
  float scale_;
  std::int64_t output_stride_, grad_stride_;
  const T *query_, *key_, *value_, *output_, *grad_output_;
  const float* logsumexp_;
  T *grad_query_, *grad_key_, *grad_value_;
};

// The heads whose cost begins from `begin` up to `end`: each of them is one thread's, so that sums over queries do not
// depend on the threads.
template <class T>
void differentiate_range(const PackedAttentionBackward& a, std::int64_t begin, std::int64_t end) {
  const AttentionBackwardBuffers<typename WordsOf<T>::Type> buffers(a.forward.head_dim, longest_sequence(a.forward));
  std::int64_t before = 0;
  for (std::int64_t sequence = 0; sequence < a.forward.sequences; ++sequence) {
    const std::int64_t tokens = a.forward.cu_seqlens[sequence + 1] - a.forward.cu_seqlens[sequence];
    const std::int64_t cost = RowGroups(tokens, a.forward.causal).cost();
    for (std::int64_t head = 0; head < a.forward.heads; ++head, before += cost) {
      if (cost > 0 && begin <= before && before < end) HeadGradient<T>(a, sequence, head, buffers).differentiate();
    }
  }
}

inline void packed_attention_backward(const PackedAttentionBackward& a, ParallelFor parallel_for) {
  const DType dtype = a.forward.dtype;
  if (kExtends && dtype != DType::kBFloat16) {
    return base::attention_backward_kernels.packed_attention_backward(a, parallel_for);
  }
  auto* range = differentiate_range<BFloat16>;
  if constexpr (!kExtends) {
    if (dtype == DType::kFloat32) range = differentiate_range<float>;
    if (dtype == DType::kFloat16) range = differentiate_range<Float16>;
  }
  parallel(parallel_for, total_cost(a.forward), least_cost(a.forward),
           [&](std::int64_t begin, std::int64_t end) { range(a, begin, end); });
}

}  // namespace
}  // namespace resnorm::cpu::RESNORM_ISA
