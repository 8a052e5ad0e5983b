// SPDX-License-Identifier: BSD-3-Clause
// oneDNN, through operators that PyTorch keeps for its own compiler. They lose gradients, so nothing here may run where
// autograd records. Weights that are not prepacked are taken too.
#include <ATen/Context.h>
#include <ATen/core/List.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include <algorithm>

#include "choice.h"

namespace resnorm::engine {

namespace {

using PointwiseSignature = Tensor(const Tensor&, const Tensor&, const OptionalTensor&, c10::string_view,
                                  c10::List<std::optional<at::Scalar>>, std::optional<c10::string_view>);
using PackSignature = Tensor(const Tensor&, std::optional<int64_t>);
using Bf16Signature = bool();

// The operator of this name if it exists and has the signature known here.
template <typename Signature>
std::optional<c10::TypedOperatorHandle<Signature>> find_operator(const char* name) {
  const auto op = c10::Dispatcher::singleton().findSchema({name, ""});
  if (!op.has_value()) return std::nullopt;
  try {
    return op->typed<Signature>();
  } catch (const c10::Error&) {
    return std::nullopt;
  }
}

struct Operators {
  std::optional<c10::TypedOperatorHandle<PointwiseSignature>> pointwise =
      find_operator<PointwiseSignature>("mkldnn::_linear_pointwise");
  std::optional<c10::TypedOperatorHandle<PackSignature>> pack =
      find_operator<PackSignature>("mkldnn::_reorder_linear_weight");
  std::optional<c10::TypedOperatorHandle<Bf16Signature>> has_bf16 =
      find_operator<Bf16Signature>("mkldnn::_is_mkldnn_bf16_supported");

  bool complete() const { return pointwise && pack && has_bf16; }
};

const Operators& operators() {
  static const Operators found;
  return found;
}

// oneDNN compiles and keeps a primitive of half a megabyte for every row count it meets. So all inputs are cut into
// pieces of a few dozen row counts: multiples of kRowGranule, of kTileRows above that, and short ends padded to a
// multiple of kShortGranule. A float32 product also slows down beyond kTileRows; a bfloat16 one does not.
constexpr int64_t kShortGranule = 16, kRowGranule = 64, kTileRows = 2048, kMaxTiles = 8;

int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

int64_t next_piece(int64_t rows, at::ScalarType dtype) {
  const auto most = std::min(rows, dtype == at::kFloat ? kTileRows : kMaxTiles * kTileRows);
  const auto granule = most >= kTileRows ? kTileRows : most >= kRowGranule ? kRowGranule : 1;
  return most - most % granule;
}

Tensor product(const Tensor& input, const Tensor& weight, const OptionalTensor& bias, Activation activation) {
  static const c10::List<std::optional<at::Scalar>> no_scalars;
  const auto call = [&](c10::string_view name, c10::string_view algorithm) {
    return operators().pointwise->call(input, weight, bias, name, no_scalars, algorithm);
  };
  switch (activation) {
    case Activation::kNone:
      return call("none", "");
    case Activation::kRelu:
      return call("relu", "");
    case Activation::kGelu:
      return call("gelu", "none");
    case Activation::kGeluTanh:
      return call("gelu", "tanh");
  }
  TORCH_INTERNAL_ASSERT(false, "unknown activation");
}

int64_t padded_rows(int64_t rows) { return round_up(rows, rows <= kRowGranule ? kShortGranule : kRowGranule); }

Tensor multiply_in_pieces(const Tensor& input, const Tensor& weight, const OptionalTensor& bias, Activation activation,
                          Tensor output) {
  const auto rows = input.size(0);
  for (int64_t begin = 0; begin < rows;) {
    const auto count = next_piece(rows - begin, input.scalar_type());
    auto piece = input.narrow(0, begin, count);
    if (const auto padded = padded_rows(count); padded != count) {
      auto buffer = at::zeros({padded, input.size(1)}, input.options());
      buffer.narrow(0, 0, count).copy_(piece);
      piece = std::move(buffer);
    }
    output.narrow(0, begin, count).copy_(product(piece, weight, bias, activation).narrow(0, 0, count));
    begin += count;
  }
  return output;
}

bool supports(at::ScalarType dtype) {
  if (!operators().complete() || !at::globalContext().userEnabledMkldnn()) return false;
  static const bool has_bf16 = operators().has_bf16->call();
  return dtype == at::kFloat || (dtype == at::kBFloat16 && has_bf16);
}

Tensor prepack(const Tensor& weight) { return operators().pack->call(weight.contiguous(), kTileRows); }

Tensor multiply(const Tensor& input, const Tensor& weight, const OptionalTensor& bias, Activation activation,
                int64_t out_features, const Tensor& memory) {
  const auto matrix = input.contiguous();
  const auto vector = bias.has_value() ? OptionalTensor(bias->contiguous()) : std::nullopt;
  const auto rows = matrix.size(0);
  // One piece of a known row count: no copy of the result, and none into the memory.
  if (rows == padded_rows(rows) && rows == next_piece(rows, matrix.scalar_type())) {
    return product(matrix, weight, vector, activation);
  }
  return multiply_in_pieces(matrix, weight, vector, activation,
                            memory.defined() ? memory : at::empty({rows, out_features}, matrix.options()));
}

}  // namespace

const LinearBackend onednn = {"onednn", supports, prepack, multiply, padded_rows};
const LinearBackend onednn_unpacked = {"onednn", supports, [](const Tensor& weight) { return weight; }, multiply,
                                       padded_rows};

}  // namespace resnorm::engine
