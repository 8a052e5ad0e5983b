// SPDX-License-Identifier: BSD-3-Clause
#include "encode.h"

#include <ATen/ops/empty.h>
#include <ATen/record_function.h>

#include "../ops/cpu/packed_attention_cpu.h"
#include "../ops/norm.h"
#include "../ops/residual_add.h"
#include "activations.h"
#include "chunks.h"

namespace resnorm::engine {

namespace {

bool uses_onednn(const Layers& layers) {
  for (const auto& layer : layers) {
    for (const auto* linear : {&layer->qkv, &layer->attention_output, &layer->intermediate, &layer->output}) {
      if (linear->backend == LinearBackend::kOneDnn) return true;
    }
  }
  return false;
}

Tensor split_heads(const Tensor& qkv, const LayerWeights& layer) {
  return qkv.view({qkv.size(0), 3, layer.num_heads, -1});
}

void attend(const Tensor& qkv, const Tensor& bounds, const LayerWeights& layer, bool causal, const Tensor& context) {
  RECORD_FUNCTION("resnorm::packed_attention", c10::ArrayRef<const c10::IValue>{});  // in profiles like the operator
  attend_into(context.view({context.size(0), layer.num_heads, -1}), split_heads(qkv, layer), bounds, layer.scale,
              causal);
}

void add_layer_norm(const Tensor& input, const Tensor& residual, const Norm& norm, const Tensor& output,
                    const OptionalTensor& sum = std::nullopt) {
  add_layer_norm_out(input, residual, {input.size(1)}, norm.weight, norm.bias, norm.eps, std::nullopt, 0.0,
                     std::nullopt, std::nullopt, output, sum);
}

// Where products have a dtype of their own, the norms below are of the states': what comes first in a sum names it.
void run_post_norm(const Layers& layers, const Chunk& chunk, bool causal, int64_t max_rows) {
  Activations memory(layers, chunk.tokens, max_rows);
  auto x = chunk.tokens;
  for (const auto& layer : layers) {
    memory.fit(*layer);
    attend(layer->qkv.multiply(memory.operand(x), memory.qkv), chunk.cu_seqlens, *layer, causal, memory.context);
    auto update = layer->attention_output.multiply(memory.context, memory.update[0]);
    const auto& attended = memory.state[0];
    add_layer_norm(x, update, layer->attention_norm, attended);
    const auto hidden = layer->intermediate.multiply(memory.operand(attended), memory.hidden, layer->activation);
    update = layer->output.multiply(hidden, memory.update[1]);
    x = &layer == &layers.back() ? chunk.output : memory.state[1];
    add_layer_norm(attended, update, layer->feed_forward_norm, x);
  }
}

Tensor normalize(const Tensor& x, const Norm& norm, const Tensor& output) {
  layer_norm_out(x, {x.size(1)}, norm.weight, norm.bias, norm.eps, output);
  return output;
}

void finish_pre_norm(const LayerWeights& layer, const Tensor& x, const Tensor& context, const Activations& memory,
                     const Tensor& output) {
  // update[0] has the update, its norm and the next update, one after the other; the sum goes to state[1].
  auto update = layer.attention_output.multiply(context, memory.update[0]);
  add_layer_norm(update, x, layer.feed_forward_norm, update, memory.state[1]);
  const auto hidden = layer.intermediate.multiply(update, memory.hidden, layer.activation);
  update = layer.output.multiply(hidden, memory.update[0]);
  residual_add_out(update, memory.state[1], std::nullopt, 0.0, std::nullopt, std::nullopt, output);
}

}  // namespace

Tensor encode_post_norm(const Tensor& tokens, const Tensor& cu_seqlens, const Layers& layers, bool causal,
                        int64_t max_rows) {
  TORCH_CHECK(!layers.empty(), "Expected layers, but got none");
  return in_chunks(tokens, cu_seqlens, max_rows, uses_onednn(layers),
                   [&](const Chunk& chunk) { run_post_norm(layers, chunk, causal, max_rows); });
}

Tensor encode_pre_norm(const Tensor& tokens, const Tensor& cu_seqlens, const std::shared_ptr<const LayerWeights>& layer,
                       bool causal, int64_t max_rows) {
  const Layers layers{layer};
  return in_chunks(tokens, cu_seqlens, max_rows, uses_onednn(layers), [&](const Chunk& chunk) {
    Activations memory(layers, chunk.tokens, max_rows);
    memory.fit(*layer);
    const auto normed = memory.operand(normalize(chunk.tokens, layer->attention_norm, memory.state[0]));
    const auto qkv = layer->qkv.multiply(normed, memory.qkv);
    attend(qkv, chunk.cu_seqlens, *layer, causal, memory.context);
    finish_pre_norm(*layer, chunk.tokens, memory.context, memory, chunk.output);
  });
}

// Memory is taken for each half, because `attend` may come here again.
Tensor run_pre_norm(const Tensor& x, const std::shared_ptr<const LayerWeights>& layer,
                    const std::function<Tensor(const Tensor&)>& attend, int64_t max_rows) {
  const Layers layers{layer};
  auto output = at::empty(x.sizes(), x.options());
  const auto qkv = [&] {
    const Activations memory(layers, x, max_rows);
    return layer->qkv(memory.operand(normalize(x, layer->attention_norm, memory.state[0])), "none");
  }();
  const auto context = attend(split_heads(qkv, *layer));
  Activations memory(layers, x, max_rows);
  memory.fit(*layer);
  // Under autocast somebody else's attention may well give another dtype than it got.
  finish_pre_norm(*layer, x, context.reshape({x.size(0), -1}).to(qkv.scalar_type()), memory, output);
  return output;
}

}  // namespace resnorm::engine
