// SPDX-License-Identifier: BSD-3-Clause
// resnorm::encode: a padded batch through a stack of Transformer layers (Vaswani et al. 2017), on its real tokens
// alone.
//
// It packs, runs all layers and unpacks in one call, so that shapes outside do not depend on a mask's values: what
// torch.compile, torch.export and AOTInductor keep of an accelerated model. On the CPU without grad by csrc/engine,
// elsewhere by torch's own operators.
#pragma once

#include <ATen/core/List.h>

#include "../engine/prepare.h"

namespace resnorm {

using OptionalTensors = c10::List<OptionalTensor>;

// Where the result is zero at positions that the key mask hides; elsewhere they are computed as all others are.
enum class Padding {
  kSkip,             // wherever it hides
  kSkipUnlessFirst,  // unless it hides the first position of any sequence, which heads read
  kSkipIfTrailing,   // if it hides nothing before a position that it does not hide
};

// Checked arguments, in their own types.
struct EncodeCall {
  Tensor input;             // (batch, length, dim)
  OptionalTensor key_mask;  // bool (batch, length), true where a position is seen
  std::vector<engine::LayerParameters> layers;
  engine::LayerOptions options;
  bool norm_first, causal;
  Padding padding;
};

// The typed call of the operator. `parameters` are `num_layers` times engine::kJoinedParameters or
// engine::kSeparateParameters.
Tensor encode(const Tensor& input, const OptionalTensor& key_mask, const OptionalTensors& parameters,
              int64_t num_layers, int64_t head_dim, double scale, double eps, c10::string_view activation,
              bool norm_first, bool causal, c10::string_view padding, std::optional<at::ScalarType> product_dtype);

// Checks, of the operator's arguments but the last.
EncodeCall encode_call(const Tensor& input, const OptionalTensor& key_mask, const OptionalTensors& parameters,
                       int64_t num_layers, int64_t head_dim, double scale, double eps, c10::string_view activation,
                       bool norm_first, bool causal, c10::string_view padding);

}  // namespace resnorm
