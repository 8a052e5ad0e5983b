// SPDX-License-Identifier: BSD-3-Clause
// Between the dispatcher, which passes the arguments of a schema one by one, and the functions that take a NormCall.
#pragma once

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "norm.h"
#include "support/operator_handle.h"

namespace resnorm {

// A public operator's arguments as a NormCall.
NormCall norm_call(const Tensor& input, c10::SymIntArrayRef normalized_shape, const OptionalTensor& weight,
                   const OptionalTensor& bias, double eps);
NormCall norm_call(const Tensor& input, c10::SymIntArrayRef normalized_shape, const OptionalTensor& weight,
                   std::optional<double> eps);
NormCall norm_call(const Tensor& input, const Tensor& residual, c10::SymIntArrayRef normalized_shape,
                   const OptionalTensor& weight, const OptionalTensor& bias, double eps,
                   const OptionalTensor& input_bias, double dropout_p, const OptionalTensor& seed, bool prenorm,
                   std::optional<at::ScalarType> residual_dtype);
NormCall norm_call(const Tensor& input, const Tensor& residual, c10::SymIntArrayRef normalized_shape,
                   const OptionalTensor& weight, std::optional<double> eps, const OptionalTensor& input_bias,
                   double dropout_p, const OptionalTensor& seed, bool prenorm,
                   std::optional<at::ScalarType> residual_dtype);

// Results as an operator returns them. A graph holds a tensor for every result of a public operator.
template <class Result>
Result norm_result(NormResults results, const NormCall& call);
template <>
inline Tensor norm_result(NormResults results, const NormCall& /*call*/) {
  return std::move(results.output);
}
template <>
inline std::tuple<Tensor, Tensor> norm_result(NormResults results, const NormCall& call) {
  return {std::move(results.output), call.wants_sum ? std::move(results.sum) : at::empty({0}, call.input.options())};
}

struct LayerNormOperator {
  static constexpr const char* kName = "layer_norm";
  using Signature = decltype(layer_norm);
};
struct RmsNormOperator {
  static constexpr const char* kName = "rms_norm";
  using Signature = decltype(rms_norm);
};
struct AddLayerNormOperator {
  static constexpr const char* kName = "add_layer_norm";
  using Signature = decltype(add_layer_norm);
};
struct AddRmsNormOperator {
  static constexpr const char* kName = "add_rms_norm";
  using Signature = decltype(add_rms_norm);
};
struct NormForwardOperator {
  static constexpr const char* kName = "_norm_forward";
  using Signature = std::tuple<Tensor, Tensor, Tensor, Tensor>(
      const Tensor& input, const OptionalTensor& residual, const OptionalTensor& input_bias, double dropout_p,
      const OptionalTensor& seed, std::optional<at::ScalarType> residual_dtype, c10::SymIntArrayRef normalized_shape,
      const OptionalTensor& weight, const OptionalTensor& bias, double eps, bool centered, bool wants_sum,
      bool wants_statistics);
};
struct NormBackwardOperator {
  static constexpr const char* kName = "_norm_backward";
  using Signature = NormGradients(const Tensor& grad_output, const OptionalTensor& grad_sum, const Tensor& sum,
                                  const OptionalTensor& mean, const Tensor& rstd, const OptionalTensor& input_bias,
                                  double dropout_p, const OptionalTensor& seed, at::ScalarType residual_dtype,
                                  c10::SymIntArrayRef normalized_shape, const OptionalTensor& weight,
                                  const OptionalTensor& bias, double eps, bool centered,
                                  std::array<bool, 5> output_mask);
};

// The operator as torch.ops.resnorm holds it.
template <class Operator, class... Args>
auto call_norm_operator(Args&&... args) {
  static const auto op = operator_handle((std::string("resnorm::") + Operator::kName).c_str(),
                                         static_cast<typename Operator::Signature*>(nullptr));
  return op.call(std::forward<Args>(args)...);
}

// `run`, a function of a NormCall, as the kernel of an operator.
template <class Operator, auto run, class Signature = typename Operator::Signature>
struct NormKernel;

template <class Operator, auto run, class Result, class... Args>
struct NormKernel<Operator, run, Result(Args...)> {
  static Result kernel(Args... args) {
    const auto call = norm_call(args...);
    return norm_result<Result>(run(call), call);
  }
};

template <auto run, class Result, class... Args>
struct NormKernel<NormForwardOperator, run, Result(Args...)> {
  static Result kernel(Args... args) {
    auto [output, sum, mean, rstd] = run(NormCall{args...});
    return {std::move(output), std::move(sum), std::move(mean), std::move(rstd)};
  }
};

template <auto run, class Result, class... Args>
struct NormKernel<NormBackwardOperator, run, Result(Args...)> {
  static Result kernel(Args... args) { return run(NormBackwardCall{args...}); }
};

template <auto run>
void norm_out_kernel(const Tensor& input, const OptionalTensor& residual, const OptionalTensor& input_bias,
                     double dropout_p, const OptionalTensor& seed, std::optional<at::ScalarType> residual_dtype,
                     c10::SymIntArrayRef normalized_shape, const OptionalTensor& weight, const OptionalTensor& bias,
                     double eps, bool centered, Tensor output, OptionalTensor sum) {
  const NormCall call = {input,  residual, input_bias, dropout_p, seed, residual_dtype, normalized_shape,
                         weight, bias,     eps,        centered};
  run(call, output, sum);
}

// The whole family behind one key.
template <auto forward, auto backward, auto out>
void implement_norms(torch::Library& m) {
  m.impl("layer_norm", NormKernel<LayerNormOperator, forward>::kernel);
  m.impl("rms_norm", NormKernel<RmsNormOperator, forward>::kernel);
  m.impl("add_layer_norm", NormKernel<AddLayerNormOperator, forward>::kernel);
  m.impl("add_rms_norm", NormKernel<AddRmsNormOperator, forward>::kernel);
  m.impl("_norm_forward", NormKernel<NormForwardOperator, forward>::kernel);
  m.impl("_norm_backward", NormKernel<NormBackwardOperator, backward>::kernel);
  m.impl("_norm_out", norm_out_kernel<out>);
}

}  // namespace resnorm
