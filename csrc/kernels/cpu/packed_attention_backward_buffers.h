// SPDX-License-Identifier: BSD-3-Clause
// One thread's memory for attention's backward pass.
#pragma once

#include <cstdint>

#include "packed_attention_panels.h"
#include "packed_attention_product.h"
#include "packed_attention_schedule.h"
#include "philox_draws.h"
#include "workspace.h"

namespace resnorm::cpu::RESNORM_ISA {
namespace {

// Groups of queries whose products with a block of keys are summed before they are added to the keys' gradients: a
// sum in memory is read and written once for all of them.
inline constexpr std::int64_t kGroupsPerBlock = 4;

// A block of keys' operands and gradients, and a block of queries beside them, stay in the second cache.
template <class Words>
class AttentionBackwardBuffers {
 public:
  AttentionBackwardBuffers(std::int64_t head_dim, std::int64_t longest)
      : width(vectors_of(head_dim) * Vec<float>::kSize), block_keys(block_keys_of(kBlockFloats, width)) {
    const std::int64_t keys = keys_in_memory(block_keys, longest);
    constexpr std::int64_t kBlockWords = kGroupsPerBlock * kGroupRows;
    const std::int64_t sizes[] = {
        keys * width,                                // key_panels
        keys * width,                                // value_panels
        keys * width,                                // key_row_panels
        keys * width,                                // grad_keys
        keys * width,                                // grad_values
        kBlockWords * width,                         // query_panels
        kBlockWords * width,                         // grad_output_panels
        chunks_of(width) * kChunkStride,             // queries
        chunks_of(width) * kChunkStride,             // grad_outputs
        chunks_of(width) * kChunkStride,             // products
        kChunkStride,                                // scores
        kChunkStride,                                // grad_weights
        kBlockWords * kRowStride,                    // weights
        kBlockWords * kRowStride,                    // grad_scores
        longest > block_keys ? longest * width : 0,  // grad_queries
        Words::kValues * draws_pitch() / 2,          // draws, of 16 bits
    };
    std::int64_t floats = 0;
    for (const std::int64_t size : sizes) floats += size;
    float* memory =
        static_cast<float*>(thread_buffer(kFirstKernelBuffer, static_cast<std::size_t>(floats) * sizeof(float)));
    float* draw_memory = nullptr;
    float** const buffers[] = {&key_panels,   &value_panels,       &key_row_panels, &grad_keys,    &grad_values,
                               &query_panels, &grad_output_panels, &queries,        &grad_outputs, &products,
                               &scores,       &grad_weights,       &weights,        &grad_scores,  &grad_queries,
                               &draw_memory};
    for (std::size_t i = 0; i < sizeof(sizes) / sizeof(sizes[0]); ++i) {
      *buffers[i] = memory;
      memory += sizes[i];
    }
    draws = reinterpret_cast<std::uint16_t*>(draw_memory);
  }

  std::int64_t draws_pitch() const { return padded_draws(block_keys); }

  std::int64_t width;  // head_dim in whole vectors
  std::int64_t block_keys;
  float *key_panels, *value_panels, *key_row_panels;  // of a block of keys
  float *grad_keys, *grad_values;                     // its sums, rows of `width`
  float *query_panels, *grad_output_panels;           // of a block of queries
  float *queries, *grad_outputs, *products;           // of a group of queries
  float *scores, *grad_weights;                       // of a group, where words are not floats
  float *weights, *grad_scores;                       // of a block of queries, as words
  float* grad_queries;                                // of a sequence, where there are several blocks of keys
  std::uint16_t* draws;

 private:
  static constexpr std::int64_t kBlockFloats = 16 * 1024;
};

}  // namespace
}  // namespace resnorm::cpu::RESNORM_ISA
