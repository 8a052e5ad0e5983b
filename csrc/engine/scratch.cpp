// SPDX-License-Identifier: BSD-3-Clause
#include "scratch.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>

#include <algorithm>

#include "../kernels/cpu/workspace.h"

namespace resnorm::engine {

namespace {

// As many as queries, keys and values have each.
int64_t context_features(const LayerWeights& layer) { return layer.qkv.out_features / 3; }

}  // namespace

Scratch::Scratch(const Layers& layers, const Tensor& input, int64_t kept_rows)
    : rows_(input.size(0)), product_dtype_(layers.front()->qkv.weight.scalar_type()) {
  const auto dtype = input.scalar_type();
  const auto dim = input.size(1), state_bytes = bytes_of(dim, dtype);
  const bool mixed = dtype != product_dtype_;
  kept_bytes_ = 2 * state_bytes + (mixed ? bytes_of(dim, product_dtype_) : 0);
  int64_t widest = 0;
  for (const auto& layer : layers) {
    widest = std::max(
        {widest, bytes_of(layer->qkv.out_features, product_dtype_) + bytes_of(context_features(*layer), product_dtype_),
         bytes_of(layer->intermediate.out_features, product_dtype_)});
  }
  const auto bytes = kept_bytes_ + widest;
  if (rows_ <= kept_rows) {
    memory_ = static_cast<char*>(cpu::thread_buffer(cpu::kActivationsBuffer, static_cast<std::size_t>(bytes)));
  } else {
    owned_ = at::empty({bytes}, at::TensorOptions().dtype(at::kByte));
    memory_ = static_cast<char*>(owned_.mutable_data_ptr());
  }
  for (int i = 0; i < 2; ++i) {
    state[i] = matrix(i * state_bytes, dim, dtype);
    update[i] = mixed ? matrix(2 * state_bytes, dim, product_dtype_) : state[i];
  }
}

void Scratch::fit(const LayerWeights& layer) {
  const auto qkv_features = layer.qkv.out_features, hidden_features = layer.intermediate.out_features;
  if (qkv.defined() && qkv.size(1) == qkv_features && hidden.size(1) == hidden_features) return;
  qkv = matrix(kept_bytes_, qkv_features, product_dtype_);
  context = matrix(kept_bytes_ + bytes_of(qkv_features, product_dtype_), context_features(layer), product_dtype_);
  hidden = matrix(kept_bytes_, hidden_features, product_dtype_);
}

Tensor Scratch::operand(const Tensor& x) const {
  if (x.scalar_type() == product_dtype_) return x;
  Tensor(update[0]).copy_(x);
  return update[0];
}

Tensor Scratch::matrix(int64_t offset, int64_t cols, at::ScalarType dtype) const {
  return at::from_blob(memory_ + offset, {rows_, cols}, at::TensorOptions().dtype(dtype));
}

int64_t Scratch::bytes_of(int64_t cols, at::ScalarType dtype) const {
  constexpr int64_t kLine = cpu::kLineBytes;
  const auto bytes = rows_ * cols * static_cast<int64_t>(c10::elementSize(dtype));
  return (bytes + kLine - 1) / kLine * kLine;
}

}  // namespace resnorm::engine
