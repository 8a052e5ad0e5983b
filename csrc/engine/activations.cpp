// SPDX-License-Identifier: BSD-3-Clause
#include "activations.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>

#include <algorithm>

#include "../kernels/cpu/workspace.h"

namespace resnorm::engine {

namespace {

// As many as queries, keys and values have each.
int64_t context_features(const LayerWeights& layer) { return layer.qkv.out_features / 3; }

}  // namespace

Activations::Activations(const Layers& layers, const Tensor& input, int64_t kept_rows)
    : rows_(input.size(0)), options_(input.options()), stream_bytes_(2 * bytes_of(input.size(1))) {
  int64_t widest = 0;
  for (const auto& layer : layers) {
    widest = std::max({widest, bytes_of(layer->qkv.out_features) + bytes_of(context_features(*layer)),
                       bytes_of(layer->intermediate.out_features)});
  }
  const auto bytes = stream_bytes_ + widest;
  if (rows_ <= kept_rows) {
    memory_ = static_cast<char*>(cpu::thread_buffer(cpu::kActivationsBuffer, static_cast<std::size_t>(bytes)));
  } else {
    owned_ = at::empty({bytes}, at::TensorOptions().dtype(at::kByte));
    memory_ = static_cast<char*>(owned_.mutable_data_ptr());
  }
  stream[0] = matrix(0, input.size(1));
  stream[1] = matrix(stream_bytes_ / 2, input.size(1));
}

void Activations::fit(const LayerWeights& layer) {
  const auto hidden_features = layer.intermediate.out_features;
  if (qkv.defined() && qkv.size(1) == layer.qkv.out_features && hidden.size(1) == hidden_features) return;
  qkv = matrix(stream_bytes_, layer.qkv.out_features);
  context = matrix(stream_bytes_ + bytes_of(layer.qkv.out_features), context_features(layer));
  hidden = matrix(stream_bytes_, hidden_features);
}

Tensor Activations::matrix(int64_t offset, int64_t cols) const {
  return at::from_blob(memory_ + offset, {rows_, cols}, options_);
}

int64_t Activations::bytes_of(int64_t cols) const {
  constexpr int64_t kLine = cpu::kLineBytes;
  const auto bytes = rows_ * cols * static_cast<int64_t>(options_.dtype().itemsize());
  return (bytes + kLine - 1) / kLine * kLine;
}

}  // namespace resnorm::engine
