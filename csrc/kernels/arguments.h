// SPDX-License-Identifier: BSD-3-Clause
// What the kernels compute, on every device, and the arguments they take: raw pointers, sizes, strides. Nothing here
// knows of torch, so the kernels compile in seconds and are tested alone.
//
// Every matrix is `rows` rows of `cols` contiguous elements; only the distance between rows is free. Statistics,
// accumulation and the column sums of a backward pass are of the accumulation type: float64 where a norm's sum (its
// input where there is no residual) or output (its gradient) is float64, in residual_add where any matrix is, else
// float32. A null data pointer means that the operand is absent.
#pragma once

#include <cstdint>

namespace resnorm {

enum class DType : std::uint8_t { kFloat32, kFloat64, kBFloat16, kFloat16 };

constexpr int size_of(DType dtype) { return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2; }

struct ConstRows {
  const void* data = nullptr;
  std::int64_t row_stride = 0;  // in elements
  DType dtype = DType::kFloat32;
};

struct Rows {
  void* data = nullptr;
  std::int64_t row_stride = 0;  // in elements
  DType dtype = DType::kFloat32;
};

struct ConstVector {
  const void* data = nullptr;
  DType dtype = DType::kFloat32;
};

struct Vector {
  void* data = nullptr;
  DType dtype = DType::kFloat32;
};

// Element e = row * cols + column of the logical matrix takes the 16-bit draw philox.h gives it and is dropped where
// the draw is below `threshold`; kept values are multiplied by `scale`. 0 is no dropout; 65536 drops everything, and
// then even a NaN or Inf contributes nothing.
struct Dropout {
  std::uint32_t threshold = 0;
  float scale = 1.0F;
  std::uint64_t seed = 0;
};

// A norm of sum = residual + dropout(input + input_bias), or of sum = input where there is no residual, row by row.
//
// `centered`, as layer_norm is: output = (sum - mean) * rstd * weight + bias, rstd = 1 / sqrt(variance + eps).
// Else, as rms_norm is:         output = sum * rstd * weight, rstd = 1 / sqrt(mean of sum^2 + eps); no bias, no mean.
//
// The output is taken from the unrounded sum. `sum` may be `residual`, `output` may be `input`. A sum of a residual
// that is not stored still has a dtype, which counts for the accumulation type.
struct NormForward {
  std::int64_t rows, cols;
  bool centered = true;
  ConstRows input, residual;
  ConstVector input_bias, weight, bias;
  Dropout dropout;
  double eps;
  Rows output, sum;
  void* mean = nullptr;  // rows values of the accumulation type, or null where no backward pass will follow
  void* rstd = nullptr;
};

// With the gradient of the sum, grad_sum + d output / d sum * grad_output: grad_residual is that, and grad_input =
// dropout'(that). `sum` is the input where there is no residual.
struct NormBackward {
  std::int64_t rows, cols;
  bool centered = true;
  ConstRows grad_output, grad_sum, sum;
  ConstVector weight;
  const void* mean;
  const void* rstd;
  Dropout dropout;
  Rows grad_input, grad_residual;
  Vector grad_weight, grad_bias, grad_input_bias;
  void* workspace = nullptr;  // backward_workspace_bytes(...) bytes
};

// output = residual + dropout(input + input_bias). `output` may be `residual` or `input`.
struct ResidualAddForward {
  std::int64_t rows, cols;
  ConstRows input, residual;
  ConstVector input_bias;
  Dropout dropout;
  Rows output;
};

// grad_input = dropout'(grad_output). The gradient of the residual is grad_output itself.
struct ResidualAddBackward {
  std::int64_t rows, cols;
  ConstRows grad_output;
  Dropout dropout;
  Rows grad_input;
  Vector grad_input_bias;
  void* workspace = nullptr;
};

// Element (token, head, key) of the attention weights, keys counted within the token's sequence, takes the draw of the
// logical matrix's element (token * heads + head) * 2^35 + key.
//
// output = dropout(softmax(query key^T * scale)) value within each sequence and head, sequence i being the tokens
// cu_seqlens[i] up to cu_seqlens[i + 1]. A token's head is `head_dim` contiguous elements; the distances between tokens
// and between heads are free, and the same for query, key and value. `output` is contiguous. With `causal` a token sees
// itself and what precedes it. No float64; scale >= 0.
struct PackedAttention {
  std::int64_t sequences, heads, head_dim;
  const std::int32_t* cu_seqlens;
  const void* query;
  const void* key;
  const void* value;
  std::int64_t token_stride, head_stride;  // in elements
  DType dtype;
  double scale;
  bool causal;
  Dropout dropout;
  void* output;
  // (tokens, heads): log2 of the sum of each row's exp(score), to that base because what is made of it is a power of 2;
  // null where no backward pass will follow.
  float* logsumexp = nullptr;
};

// The gradients of query, key and value, whose dtype they have. `output` and `logsumexp` are the forward pass's;
// `grad_output` and `output` are contiguous.
struct PackedAttentionBackward {
  PackedAttention forward;
  const void* grad_output;
  void* grad_query;
  void* grad_key;
  void* grad_value;
  std::int64_t grad_token_stride, grad_head_stride;  // in elements
};

enum class Activation : std::uint8_t { kNone, kRelu, kGelu, kGeluTanh };

// output = dropout(activation(input + bias)), for another activation than kNone. `output` may be `input`. No operand is
// float64.
struct BiasActivationForward {
  std::int64_t rows, cols;
  ConstRows input;
  ConstVector bias;
  Activation activation;
  Dropout dropout{};
  Rows output;
};

// grad_input = dropout'(grad_output) * activation'(input + bias), and grad_bias the sum of its rows. `output` is the
// forward pass's, computed again: within a rounding or two, where that pass has used another approximation.
struct BiasActivationBackward {
  std::int64_t rows, cols;
  ConstRows grad_output, input;
  ConstVector bias;
  Activation activation;
  Dropout dropout{};
  Rows grad_input;
  Vector grad_bias;
  Rows output{};
  void* workspace = nullptr;
};

// A weight, (out_features, in_features), in panels for prepacked_linear: `prepacked` is as large as
// prepacked_weight_bytes says.
struct PrepackWeight {
  std::int64_t out_features, in_features;
  ConstRows weight;
  void* prepacked;
};

// output = activation(input * weight^T + bias). Rows are `cols` = in_features long, those of the output out_features.
struct PrepackedLinear {
  std::int64_t rows, cols, out_features;
  ConstRows input;
  const void* prepacked;
  ConstVector bias;
  Activation activation;
  Rows output;
};

}  // namespace resnorm
