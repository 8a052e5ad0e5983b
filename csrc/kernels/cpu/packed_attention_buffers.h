// SPDX-License-Identifier: BSD-3-Clause
// One thread's memory for attention's forward pass.
#pragma once

#include <cstdint>

#include "packed_attention_panels.h"
#include "packed_attention_product.h"
#include "packed_attention_schedule.h"
#include "packed_attention_softmax.h"
#include "workspace.h"

namespace resnorm::cpu::RESNORM_ISA {
namespace {

// Bounded by the size of a head, however long the sequences are.
class AttentionBuffers {
 public:
  AttentionBuffers(std::int64_t head_dim, std::int64_t longest)
      : width(vectors_of(head_dim) * Vec<float>::kSize),
        block_keys(block_keys_of(kBlockFloats, width)),
        pass_groups((block_keys + kGroupRows - 1) / kGroupRows) {
    const std::int64_t keys = keys_in_memory(block_keys, longest);
    const std::int64_t sizes[] = {
        keys * width,                     // key_panels
        keys * width,                     // value_panels
        chunks_of(width) * kChunkStride,  // queries
        kChunkStride,                     // scores
        chunks_of(width) * kChunkStride,  // products
        longest > block_keys ? pass_groups * kGroupRows * width : 0,
        kSoftmaxRows * draws_pitch() / 2,  // of 16 bits
    };
    std::int64_t floats = 0;
    for (const std::int64_t size : sizes) floats += size;
    const auto bytes = floats * sizeof(float) + static_cast<std::size_t>(pass_groups) * sizeof(SoftmaxState);
    float* memory = static_cast<float*>(thread_buffer(kFirstKernelBuffer, bytes));
    float* draw_memory = nullptr;
    float** const buffers[] = {&key_panels, &value_panels, &queries, &scores, &products, &outputs, &draw_memory};
    for (int i = 0; i < 7; ++i) {
      *buffers[i] = memory;
      memory += sizes[i];
    }
    draws = reinterpret_cast<std::uint16_t*>(draw_memory);
    states = reinterpret_cast<SoftmaxState*>(memory);
  }

  std::int64_t draws_pitch() const { return padded_draws(block_keys); }

  std::int64_t width;  // head_dim in whole vectors
  std::int64_t block_keys;
  std::int64_t pass_groups;  // that one pass over the keys serves: all of a sequence whose keys are one block
  float *key_panels, *value_panels;
  float *queries, *scores, *products;  // of a group of rows
  float* outputs;                      // of a pass's groups, where there are several blocks of keys
  std::uint16_t* draws;                // of the rows that one softmax_rows takes
  SoftmaxState* states;

 private:
  // A block's keys and values stay in the second cache.
  static constexpr std::int64_t kBlockFloats = 64 * 1024;
};

}  // namespace
}  // namespace resnorm::cpu::RESNORM_ISA
