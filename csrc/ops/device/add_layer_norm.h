// SPDX-License-Identifier: BSD-3-Clause
// add_layer_norm by a device's kernels, from tensors to operands. Kernels is cpu/kernel_call.h's or
// cuda/kernel_call.h's.
#pragma once

#include <torch/library.h>

#include "../add_layer_norm.h"
#include "../operands.h"
#include "../overlap.h"

namespace resnorm {

template <class Kernels>
class AddLayerNormOn {
 public:
  static void implement(torch::Library& m) {
    m.impl("add_layer_norm", run);
    m.impl("add_layer_norm_out", run_out);
    m.impl("_add_layer_norm_forward", run_forward);
    m.impl("_add_layer_norm_backward", run_backward);
  }

 private:
  struct Parameters {
    const OptionalTensor &weight, &bias;
    double eps;
    const OptionalTensor& input_bias;
    double dropout_p;
    const OptionalTensor& seed;
  };

  struct Results {
    Rows output, sum;  // a sum that is not stored has its dtype alone
    void* mean = nullptr;
    void* rstd = nullptr;
  };

  static void launch(const Tensor& input, const Tensor& residual, int64_t row_dims, const Parameters& parameters,
                     const Results& results) {
    Kernels kernels("add_layer_norm", input);
    const auto counts = row_counts(input, row_dims);
    const RowView input_rows(input, row_dims), residual_rows(residual, row_dims);
    const VectorView weight(parameters.weight), bias(parameters.bias), input_bias(parameters.input_bias);
    const auto dropout = kernels.dropout(parameters.dropout_p, parameters.seed);
    kernels.run(AddLayerNormForward{.rows = counts.rows,
                                    .cols = counts.cols,
                                    .input = input_rows.const_rows(),
                                    .residual = residual_rows.const_rows(),
                                    .input_bias = input_bias.const_vector(),
                                    .weight = weight.const_vector(),
                                    .bias = bias.const_vector(),
                                    .dropout = dropout,
                                    .eps = parameters.eps,
                                    .output = results.output,
                                    .sum = results.sum,
                                    .mean = results.mean,
                                    .rstd = results.rstd});
  }

  static std::tuple<Tensor, Tensor> run(const Tensor& input, const Tensor& residual,
                                        c10::SymIntArrayRef normalized_shape, const OptionalTensor& weight,
                                        const OptionalTensor& bias, double eps, const OptionalTensor& input_bias,
                                        double dropout_p, const OptionalTensor& seed, bool prenorm,
                                        std::optional<at::ScalarType> residual_dtype) {
    auto results = add_layer_norm_meta(input, residual, normalized_shape, weight, bias, eps, input_bias, dropout_p,
                                       seed, prenorm, residual_dtype);
    const auto& [output, sum] = results;
    if (output.numel() == 0) return results;
    const auto row_dims = static_cast<int64_t>(normalized_shape.size());
    const auto sum_rows =
        prenorm ? result_rows(sum, row_dims, true) : unstored_rows(sum_dtype(input, residual, residual_dtype));
    launch(input, residual, row_dims, {weight, bias, eps, input_bias, dropout_p, seed},
           {.output = result_rows(output, row_dims, true), .sum = sum_rows});
    return results;
  }

  static void run_out(const Tensor& input, const Tensor& residual, c10::SymIntArrayRef normalized_shape,
                      const OptionalTensor& weight, const OptionalTensor& bias, double eps,
                      const OptionalTensor& input_bias, double dropout_p, const OptionalTensor& seed,
                      std::optional<at::ScalarType> residual_dtype, Tensor output, OptionalTensor sum) {
    add_layer_norm_out_meta(input, residual, normalized_shape, weight, bias, eps, input_bias, dropout_p, seed,
                            residual_dtype, output, sum);
    check_overlap(output, {input, residual}, {weight, bias, input_bias, seed, sum});
    if (sum.has_value()) check_overlap(*sum, {input, residual}, {weight, bias, input_bias, seed});
    if (output.numel() == 0) return;
    const auto row_dims = static_cast<int64_t>(normalized_shape.size());
    OutputRows output_rows(output, row_dims);
    std::optional<OutputRows> sum_rows;
    if (sum.has_value()) sum_rows.emplace(*sum, row_dims);
    launch(
        input, residual, row_dims, {weight, bias, eps, input_bias, dropout_p, seed},
        {.output = output_rows.rows(),
         .sum = sum_rows.has_value() ? sum_rows->rows() : unstored_rows(sum_dtype(input, residual, residual_dtype))});
    output_rows.commit();
    if (sum_rows.has_value()) sum_rows->commit();
  }

  static std::tuple<Tensor, Tensor, Tensor, Tensor> run_forward(
      const Tensor& input, const Tensor& residual, c10::SymIntArrayRef normalized_shape, const OptionalTensor& weight,
      const OptionalTensor& bias, double eps, const OptionalTensor& input_bias, double dropout_p,
      const OptionalTensor& seed, std::optional<at::ScalarType> residual_dtype) {
    auto results = add_layer_norm_forward_meta(input, residual, normalized_shape, weight, bias, eps, input_bias,
                                               dropout_p, seed, residual_dtype);
    const auto& [output, sum, mean, rstd] = results;
    if (output.numel() == 0) return results;
    const auto row_dims = static_cast<int64_t>(normalized_shape.size());
    launch(input, residual, row_dims, {weight, bias, eps, input_bias, dropout_p, seed},
           {.output = result_rows(output, row_dims, true),
            .sum = result_rows(sum, row_dims, true),
            .mean = mean.mutable_data_ptr(),
            .rstd = rstd.mutable_data_ptr()});
    return results;
  }

  static std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> run_backward(
      const Tensor& grad_output, const OptionalTensor& grad_sum, const Tensor& sum,
      c10::SymIntArrayRef normalized_shape, const OptionalTensor& weight, const OptionalTensor& bias,
      const OptionalTensor& input_bias, const Tensor& mean, const Tensor& rstd, double eps, double dropout_p,
      const OptionalTensor& seed, at::ScalarType residual_dtype, std::array<bool, 5> output_mask) {
    auto results = add_layer_norm_backward_meta(grad_output, grad_sum, sum, normalized_shape, weight, bias, input_bias,
                                                mean, rstd, eps, dropout_p, seed, residual_dtype, output_mask);
    const auto& [grad_input, grad_residual, grad_weight, grad_bias, grad_input_bias] = results;
    const auto row_dims = static_cast<int64_t>(normalized_shape.size());
    const auto counts = row_counts(sum, row_dims);
    if (counts.cols == 0) return results;  // all of them empty; the kernels take rows of at least one element
    Kernels kernels("the backward pass of add_layer_norm", sum);
    const RowView grad_output_rows(grad_output, row_dims), sum_rows(sum, row_dims);
    std::optional<RowView> grad_sum_rows;
    if (grad_sum.has_value()) grad_sum_rows.emplace(*grad_sum, row_dims);
    const VectorView weight_view(weight), mean_view(mean), rstd_view(rstd);
    const auto dropout = kernels.dropout(dropout_p, seed);
    kernels.run(AddLayerNormBackward{.rows = counts.rows,
                                     .cols = counts.cols,
                                     .grad_output = grad_output_rows.const_rows(),
                                     .grad_sum = grad_sum_rows.has_value() ? grad_sum_rows->const_rows() : ConstRows{},
                                     .sum = sum_rows.const_rows(),
                                     .weight = weight_view.const_vector(),
                                     .mean = mean_view.const_vector().data,
                                     .rstd = rstd_view.const_vector().data,
                                     .dropout = dropout,
                                     .grad_input = result_rows(grad_input, row_dims, output_mask[0]),
                                     .grad_residual = result_rows(grad_residual, row_dims, output_mask[1]),
                                     .grad_weight = result_vector(grad_weight, output_mask[2]),
                                     .grad_bias = result_vector(grad_bias, output_mask[3]),
                                     .grad_input_bias = result_vector(grad_input_bias, output_mask[4])});
    return results;
  }
};

}  // namespace resnorm
