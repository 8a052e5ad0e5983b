// SPDX-License-Identifier: BSD-3-Clause
// The norms, one family: layer_norm and rms_norm of an input, add_layer_norm and add_rms_norm of the sum = residual +
// dropout(input + input_bias). An RMS norm is one that is not centered: it takes no mean off and has no bias.
//
// What the public operators are given becomes a NormCall, and one function for each dispatch key does the rest. A
// private triple serves them all: _norm_forward also returns what a backward pass needs, _norm_backward is that pass,
// _norm_out writes into given tensors.
#pragma once

#include <array>
#include <tuple>

#include "support/checks.h"

namespace resnorm {

// The arguments of _norm_forward, in the order of its schema.
struct NormCall {
  const Tensor& input;
  OptionalTensor residual;  // without it, none of the four that follow
  const OptionalTensor& input_bias;
  double dropout_p;
  const OptionalTensor& seed;
  std::optional<at::ScalarType> residual_dtype;
  c10::SymIntArrayRef normalized_shape;
  const OptionalTensor& weight;
  const OptionalTensor& bias;
  double eps;
  bool centered;
  bool wants_sum = false, wants_statistics = false;
};

// What was not wanted, the sum without a residual and the mean of an RMS norm are undefined.
struct NormResults {
  Tensor output, sum, mean, rstd;
};

// The arguments of _norm_backward, in the order of its schema. `sum` is the input where there is no residual.
struct NormBackwardCall {
  const Tensor& grad_output;
  const OptionalTensor& grad_sum;
  const Tensor& sum;
  const OptionalTensor& mean;
  const Tensor& rstd;
  const OptionalTensor& input_bias;
  double dropout_p;
  const OptionalTensor& seed;
  at::ScalarType residual_dtype;
  c10::SymIntArrayRef normalized_shape;
  const OptionalTensor& weight;
  const OptionalTensor& bias;
  double eps;
  bool centered;
  std::array<bool, 5> output_mask;  // which gradients are wanted
};

// Gradients of (input, residual, input_bias, weight, bias); those that are not wanted are undefined.
using NormGradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

// ---- Through the dispatcher

NormResults norm_forward(const NormCall& call);
NormGradients norm_backward(const NormBackwardCall& call);
// `output` may be the input or the residual, and `sum`, where given, the other of the two.
void norm_out(const NormCall& call, Tensor output, OptionalTensor sum);

// The public operators as Python calls them in eager code. Where a sum is not wanted the triple is called instead: a
// public operator returns an empty one.

Tensor layer_norm(const Tensor& input, c10::SymIntArrayRef normalized_shape, const OptionalTensor& weight,
                  const OptionalTensor& bias, double eps);
void layer_norm_out(const Tensor& input, c10::SymIntArrayRef normalized_shape, const OptionalTensor& weight,
                    const OptionalTensor& bias, double eps, Tensor output);

// Where no eps is given it is the machine epsilon of the accumulation type, as in torch's kernels.
Tensor rms_norm(const Tensor& input, c10::SymIntArrayRef normalized_shape, const OptionalTensor& weight,
                std::optional<double> eps);
void rms_norm_out(const Tensor& input, c10::SymIntArrayRef normalized_shape, const OptionalTensor& weight,
                  std::optional<double> eps, Tensor output);

// (output, sum); without `prenorm` the sum is never stored, and undefined.
std::tuple<Tensor, Tensor> add_layer_norm(const Tensor& input, const Tensor& residual,
                                          c10::SymIntArrayRef normalized_shape, const OptionalTensor& weight,
                                          const OptionalTensor& bias, double eps, const OptionalTensor& input_bias,
                                          double dropout_p, const OptionalTensor& seed, bool prenorm,
                                          std::optional<at::ScalarType> residual_dtype);
void add_layer_norm_out(const Tensor& input, const Tensor& residual, c10::SymIntArrayRef normalized_shape,
                        const OptionalTensor& weight, const OptionalTensor& bias, double eps,
                        const OptionalTensor& input_bias, double dropout_p, const OptionalTensor& seed,
                        std::optional<at::ScalarType> residual_dtype, Tensor output, OptionalTensor sum);

std::tuple<Tensor, Tensor> add_rms_norm(const Tensor& input, const Tensor& residual,
                                        c10::SymIntArrayRef normalized_shape, const OptionalTensor& weight,
                                        std::optional<double> eps, const OptionalTensor& input_bias, double dropout_p,
                                        const OptionalTensor& seed, bool prenorm,
                                        std::optional<at::ScalarType> residual_dtype);
void add_rms_norm_out(const Tensor& input, const Tensor& residual, c10::SymIntArrayRef normalized_shape,
                      const OptionalTensor& weight, std::optional<double> eps, const OptionalTensor& input_bias,
                      double dropout_p, const OptionalTensor& seed, std::optional<at::ScalarType> residual_dtype,
                      Tensor output, OptionalTensor sum);

// ---- For the functions behind the keys

// The public name of the operator that is called.
const char* norm_name(bool adds, bool centered);

// The dtype of what is normalized, which is the input where nothing is added, and the one it is computed in.
at::ScalarType norm_sum_dtype(const NormCall& call);
at::ScalarType norm_accumulation_dtype(const NormCall& call);

// Checked arguments, allocated results: the whole of the meta kernels, the first step of every other.
NormResults norm_forward_meta(const NormCall& call);
NormGradients norm_backward_meta(const NormBackwardCall& call);
void norm_out_meta(const NormCall& call, const Tensor& output, const OptionalTensor& sum);

// No element may be read after it was written.
void check_norm_overlap(const NormCall& call, const Tensor& output, const OptionalTensor& sum);

}  // namespace resnorm
