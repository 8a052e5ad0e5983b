// SPDX-License-Identifier: BSD-3-Clause
#include "onednn_linear.h"

#include <ATen/Context.h>
#include <ATen/core/List.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/add.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include <algorithm>

namespace resnorm::onednn {

namespace {

using PointwiseSignature = Tensor(const Tensor&, const Tensor&, const OptionalTensor&, c10::string_view,
                                  c10::List<std::optional<at::Scalar>>, std::optional<c10::string_view>);
using BinarySignature = Tensor(const Tensor&, const Tensor&, const Tensor&, const OptionalTensor&, c10::string_view);
using PackSignature = Tensor(const Tensor&, std::optional<int64_t>);
using Bf16Signature = bool();

// The operator of this name if it exists and has the signature known here.
template <typename Signature>
std::optional<c10::TypedOperatorHandle<Signature>> find_operator(const char* name, const char* overload = "") {
  const auto op = c10::Dispatcher::singleton().findSchema({name, overload});
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
  std::optional<c10::TypedOperatorHandle<BinarySignature>> binary =
      find_operator<BinarySignature>("mkldnn::_linear_pointwise", "binary");
  std::optional<c10::TypedOperatorHandle<PackSignature>> pack =
      find_operator<PackSignature>("mkldnn::_reorder_linear_weight");
  std::optional<c10::TypedOperatorHandle<Bf16Signature>> has_bf16 =
      find_operator<Bf16Signature>("mkldnn::_is_mkldnn_bf16_supported");

  bool complete() const { return pointwise && binary && pack && has_bf16; }
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

// The whole input is one piece of a known row count: no copy of the result.
Tensor linear_in_one_piece(const Tensor& input, const Tensor& weight, const OptionalTensor& bias, Activation activation,
                           const OptionalTensor& residual) {
  if (!residual.has_value()) return product(input, weight, bias, activation);
  if (activation == Activation::kNone && residual->scalar_type() == input.scalar_type()) {
    return operators().binary->call(input, residual->contiguous(), weight, bias, "add");
  }
  return at::add(product(input, weight, bias, activation), *residual);
}

Tensor linear_in_pieces(const Tensor& input, const Tensor& weight, const OptionalTensor& bias, Activation activation,
                        const OptionalTensor& residual) {
  const auto rows = input.size(0);
  const auto dtype =
      residual.has_value() ? c10::promoteTypes(input.scalar_type(), residual->scalar_type()) : input.scalar_type();
  auto output = at::empty({rows, weight.size(0)}, input.options().dtype(dtype));
  for (int64_t begin = 0; begin < rows;) {
    const auto count = next_piece(rows - begin, input.scalar_type());
    auto piece = input.narrow(0, begin, count);
    if (const auto padded = padded_rows(count); padded != count) {
      auto buffer = at::zeros({padded, input.size(1)}, input.options());
      buffer.narrow(0, 0, count).copy_(piece);
      piece = std::move(buffer);
    }
    const auto result = product(piece, weight, bias, activation).narrow(0, 0, count);
    auto target = output.narrow(0, begin, count);
    if (residual.has_value()) {
      at::add_out(target, result, residual->narrow(0, begin, count));
    } else {
      target.copy_(result);
    }
    begin += count;
  }
  return output;
}

}  // namespace

bool supports(at::ScalarType dtype) {
  if (!operators().complete() || !at::globalContext().userEnabledMkldnn()) return false;
  static const bool has_bf16 = operators().has_bf16->call();
  return dtype == at::kFloat || (dtype == at::kBFloat16 && has_bf16);
}

Tensor prepack_weight(const Tensor& weight) { return operators().pack->call(weight.contiguous(), kTileRows); }

Tensor linear(const Tensor& input, const Tensor& weight, const OptionalTensor& bias, Activation activation,
              const OptionalTensor& residual) {
  const auto matrix = input.reshape({-1, input.size(-1)}).contiguous();
  const auto vector = bias.has_value() ? OptionalTensor(bias->contiguous()) : std::nullopt;
  const auto matrix_residual =
      residual.has_value() ? OptionalTensor(residual->reshape({-1, residual->size(-1)})) : std::nullopt;
  const auto rows = matrix.size(0);
  const bool whole = rows == padded_rows(rows) && rows == next_piece(rows, input.scalar_type());
  auto output = (whole ? linear_in_one_piece : linear_in_pieces)(matrix, weight, vector, activation, matrix_residual);
  if (input.dim() == 2) return output;
  auto sizes = input.sizes().vec();
  sizes.back() = output.size(-1);
  return output.view(sizes);
}

int64_t padded_rows(int64_t rows) { return round_up(rows, rows <= kRowGranule ? kShortGranule : kRowGranule); }

}  // namespace resnorm::onednn
