// SPDX-License-Identifier: BSD-3-Clause
// layer_norm by a device's kernels, from tensors to operands. Kernels is cpu/kernel_call.h's or cuda/kernel_call.h's.
#pragma once

#include <torch/library.h>

#include "../layer_norm.h"
#include "../operands.h"
#include "../overlap.h"

namespace resnorm {

template <class Kernels>
class LayerNormOn {
 public:
  static void implement(torch::Library& m) {
    m.impl("layer_norm", run);
    m.impl("layer_norm_out", run_out);
    m.impl("_layer_norm_forward", run_forward);
    m.impl("_layer_norm_backward", run_backward);
  }

 private:
  static void launch(const Tensor& input, int64_t row_dims, const OptionalTensor& weight, const OptionalTensor& bias,
                     double eps, Rows output, void* mean = nullptr, void* rstd = nullptr) {
    const Kernels kernels("layer_norm", input);
    const auto counts = row_counts(input, row_dims);
    const RowView input_rows(input, row_dims);
    const VectorView weight_view(weight), bias_view(bias);
    kernels.run(LayerNormForward{.rows = counts.rows,
                                 .cols = counts.cols,
                                 .input = input_rows.const_rows(),
                                 .weight = weight_view.const_vector(),
                                 .bias = bias_view.const_vector(),
                                 .eps = eps,
                                 .output = output,
                                 .mean = mean,
                                 .rstd = rstd});
  }

  static Tensor run(const Tensor& input, c10::SymIntArrayRef normalized_shape, const OptionalTensor& weight,
                    const OptionalTensor& bias, double eps) {
    auto output = layer_norm_meta(input, normalized_shape, weight, bias, eps);
    if (output.numel() == 0) return output;
    const auto row_dims = static_cast<int64_t>(normalized_shape.size());
    launch(input, row_dims, weight, bias, eps, result_rows(output, row_dims, true));
    return output;
  }

  static void run_out(const Tensor& input, c10::SymIntArrayRef normalized_shape, const OptionalTensor& weight,
                      const OptionalTensor& bias, double eps, Tensor output) {
    layer_norm_out_meta(input, normalized_shape, weight, bias, eps, output);
    check_overlap(output, {input}, {weight, bias});
    if (output.numel() == 0) return;
    const auto row_dims = static_cast<int64_t>(normalized_shape.size());
    OutputRows output_rows(output, row_dims);
    launch(input, row_dims, weight, bias, eps, output_rows.rows());
    output_rows.commit();
  }

  static std::tuple<Tensor, Tensor, Tensor> run_forward(const Tensor& input, c10::SymIntArrayRef normalized_shape,
                                                        const OptionalTensor& weight, const OptionalTensor& bias,
                                                        double eps) {
    auto results = layer_norm_forward_meta(input, normalized_shape, weight, bias, eps);
    const auto& [output, mean, rstd] = results;
    if (output.numel() == 0) return results;
    const auto row_dims = static_cast<int64_t>(normalized_shape.size());
    launch(input, row_dims, weight, bias, eps, result_rows(output, row_dims, true), mean.mutable_data_ptr(),
           rstd.mutable_data_ptr());
    return results;
  }

  static std::tuple<Tensor, Tensor, Tensor> run_backward(const Tensor& grad_output, const Tensor& input,
                                                         c10::SymIntArrayRef normalized_shape,
                                                         const OptionalTensor& weight, const OptionalTensor& bias,
                                                         const Tensor& mean, const Tensor& rstd, double eps,
                                                         std::array<bool, 3> output_mask) {
    auto results =
        layer_norm_backward_meta(grad_output, input, normalized_shape, weight, bias, mean, rstd, eps, output_mask);
    const auto& [grad_input, grad_weight, grad_bias] = results;
    const auto row_dims = static_cast<int64_t>(normalized_shape.size());
    const auto counts = row_counts(input, row_dims);
    if (counts.cols == 0) return results;  // all of them empty; the kernels take rows of at least one element
    const Kernels kernels("the backward pass of layer_norm", input);
    const RowView grad_output_rows(grad_output, row_dims), input_rows(input, row_dims);
    const VectorView weight_view(weight), mean_view(mean), rstd_view(rstd);
    kernels.run(LayerNormBackward{.rows = counts.rows,
                                  .cols = counts.cols,
                                  .grad_output = grad_output_rows.const_rows(),
                                  .input = input_rows.const_rows(),
                                  .weight = weight_view.const_vector(),
                                  .mean = mean_view.const_vector().data,
                                  .rstd = rstd_view.const_vector().data,
                                  .grad_input = result_rows(grad_input, row_dims, output_mask[0]),
                                  .grad_weight = result_vector(grad_weight, output_mask[1]),
                                  .grad_bias = result_vector(grad_bias, output_mask[2])});
    return results;
  }
};

}  // namespace resnorm
