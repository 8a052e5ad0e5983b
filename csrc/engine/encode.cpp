// SPDX-License-Identifier: BSD-3-Clause
#include "encode.h"

#include <ATen/core/grad_mode.h>
#include <ATen/ops/empty.h>
#include <ATen/record_function.h>

#include <algorithm>

#include "../ops/cpu/cpu_kernels.h"
#include "../ops/cpu/packed_attention_cpu.h"
#include "../ops/norm_device.h"
#include "../ops/residual_add_device.h"
#include "chunks.h"
#include "scratch.h"

namespace resnorm::engine {

namespace {

// The least number of rows that all products take as they are.
int64_t padded_rows(const Layers& layers, int64_t rows) {
  auto padded = rows;
  for (const auto& layer : layers) {
    for (const auto* linear : {&layer->qkv, &layer->attention_output, &layer->intermediate, &layer->output}) {
      padded = std::max(padded, linear->backend->padded_rows(rows));
    }
  }
  return padded;
}

void check_no_grad(const char* name, const Tensor& tensor) {
  TORCH_CHECK(!at::GradMode::is_enabled() || !tensor.requires_grad(), "Expected ", name,
              " that requires no grad, or no_grad, but got one that requires it: nothing is recorded here");
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
  RECORD_FUNCTION("resnorm::add_layer_norm", c10::ArrayRef<const c10::IValue>{});
  const c10::SymInt dim = input.size(1);
  const OptionalTensor none;  // a call refers to what it is made of
  const auto call = norm_call(input, residual, dim, norm.weight, norm.bias, norm.eps, none, 0.0, none,
                              /*prenorm=*/false, std::nullopt);
  NormsOn<CpuKernels>::out(call, output, sum);
}

// Where products have a dtype of their own, the norms below are of the states': what comes first in a sum names it.
void run_post_norm(const Layers& layers, const Chunk& chunk, bool causal, int64_t max_rows) {
  Scratch memory(layers, chunk.tokens, max_rows);
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
  RECORD_FUNCTION("resnorm::layer_norm", c10::ArrayRef<const c10::IValue>{});
  const c10::SymInt dim = x.size(1);
  NormsOn<CpuKernels>::out(norm_call(x, dim, norm.weight, norm.bias, norm.eps), output, std::nullopt);
  return output;
}

// The update that a layer's feed-forward makes, from the context of its attention. The sum of the input `x` and the
// attention's update goes to state[1]; update[0] has that update, the norm and the next update, one after the other.
Tensor pre_norm_update(const LayerWeights& layer, const Tensor& x, const Tensor& context, const Scratch& memory) {
  const auto update = layer.attention_output.multiply(context, memory.update[0]);
  add_layer_norm(update, x, layer.feed_forward_norm, update, memory.state[1]);
  const auto hidden = layer.intermediate.multiply(update, memory.hidden, layer.activation);
  return layer.output.multiply(hidden, memory.update[0]);
}

void add(const Tensor& update, const Tensor& x, const Tensor& output) {
  RECORD_FUNCTION("resnorm::residual_add", c10::ArrayRef<const c10::IValue>{});
  ResidualAddOn<CpuKernels>::out(update, x, std::nullopt, 0.0, std::nullopt, std::nullopt, output);
}

// Each layer's last sum is taken with the norm that the next one begins with.
void run_pre_norm(const Layers& layers, const Chunk& chunk, bool causal, int64_t max_rows) {
  Scratch memory(layers, chunk.tokens, max_rows);
  auto x = chunk.tokens;
  auto normed = memory.operand(normalize(x, layers.front()->attention_norm, memory.state[0]));
  for (std::size_t i = 0; i < layers.size(); ++i) {
    const auto& layer = *layers[i];
    memory.fit(layer);
    attend(layer.qkv.multiply(normed, memory.qkv), chunk.cu_seqlens, layer, causal, memory.context);
    const auto update = pre_norm_update(layer, x, memory.context, memory);
    x = memory.state[1];
    if (i + 1 == layers.size()) return add(update, x, chunk.output);
    add_layer_norm(update, x, layers[i + 1]->attention_norm, update, x);
    normed = update;
  }
}

}  // namespace

Tensor encode(const Tensor& tokens, const Tensor& cu_seqlens, const Layers& layers, bool norm_first, bool causal,
              int64_t max_rows) {
  TORCH_CHECK(!layers.empty(), "Expected layers, but got none");
  check_no_grad("an input", tokens);
  return in_chunks(
      tokens.resolve_neg(), cu_seqlens, max_rows, [&](int64_t rows) { return padded_rows(layers, rows); },
      [&](const Chunk& chunk) { (norm_first ? run_pre_norm : run_post_norm)(layers, chunk, causal, max_rows); });
}

// Memory is taken for each half, because `attend` may come here again.
Tensor pre_norm_layer(const Tensor& input, const std::shared_ptr<const LayerWeights>& layer,
                      const std::function<Tensor(const Tensor&)>& attend, int64_t max_rows) {
  check_no_grad("an input", input);
  const auto x = input.resolve_neg();
  const Layers layers{layer};
  auto output = at::empty(x.sizes(), x.options());
  const auto qkv = [&] {
    const Scratch memory(layers, x, max_rows);
    return layer->qkv(memory.operand(normalize(x, layer->attention_norm, memory.state[0])));
  }();
  const auto context = attend(split_heads(qkv, *layer)).resolve_neg();
  check_no_grad("a context", context);
  Scratch memory(layers, x, max_rows);
  memory.fit(*layer);
  // Under autocast somebody else's attention may well give another dtype than it got.
  const auto update = pre_norm_update(*layer, x, context.reshape({x.size(0), -1}).to(qkv.scalar_type()), memory);
  add(update, memory.state[1], output);
  return output;
}

}  // namespace resnorm::engine
