// SPDX-License-Identifier: BSD-3-Clause
#include <algorithm>
#include <limits>

#include "alignment.h"
#include "column_sums.h"
#include "element_types.cuh"
#include "launch.cuh"
#include "residual_add.h"
#include "residual_add_backward.cuh"
#include "residual_add_forward.cuh"
#include "residual_add_generic.cuh"

namespace resnorm::cuda {

namespace {

constexpr std::int64_t kMaxRowSubsets = 1 << 15;  // of kernels that need no more blocks than keep the device busy

// ---- Forward

using ForwardKernel = Kernel<ResidualAddArguments>;
using ForwardKernelOfPlan = ForwardKernel (*)(const Plan& plan, bool drops);

template <class Types>
ForwardKernel forward_kernel(const Plan& plan, bool drops) {
  constexpr int kVector = kVectorBytes / sizeof(typename Types::Branch);
  const auto choose = [&]<bool kDrops>() {
    return plan.shifted ? kernel_of<residual_add_forward<Types, kVector, true, kDrops>, ResidualAddArguments>()
                        : kernel_of<residual_add_forward<Types, kVector, false, kDrops>, ResidualAddArguments>();
  };
  return drops ? choose.template operator()<true>() : choose.template operator()<false>();
}

ForwardKernelOfPlan kernels_for(const ResidualAddForward& a) {
  return with_element_types<ForwardKernelOfPlan>(
      a.input.dtype, a.residual.dtype, a.output.dtype,
      []<class Types>() -> ForwardKernelOfPlan { return forward_kernel<Types>; });
}

Alignment alignment_of(const ResidualAddForward& a) {
  return Alignment(a.rows, kVectorBytes / size_of(a.input.dtype)).with(a.input).with(a.residual).with(a.output);
}

// Rows that lie without gaps are one long row: no element but the first and last few is outside of a whole vector then,
// however odd the rows are.
template <class Arguments, class... Matrices>
Arguments flattened(Arguments a, bool has_bias, const Matrices&... matrices) {
  if (has_bias || !((matrices.data == nullptr || matrices.row_stride == a.cols) && ...)) return a;
  a.cols *= a.rows;
  a.rows = 1;
  return a;
}

ResidualAddForward flattened(const ResidualAddForward& a) {
  return flattened(a, a.input_bias.data != nullptr, a.input, a.residual, a.output);
}

// ---- Backward

using BackwardKernel = Kernel<ResidualAddBackwardArguments>;
using BackwardKernelOfPlan = BackwardKernel (*)(const Plan& plan, bool drops, bool input_bias);

template <class Gradient, class Result>
BackwardKernel backward_kernel(const Plan& plan, bool drops, bool input_bias) {
  constexpr int kVector = kVectorBytes / sizeof(Result);
  const auto choose = [&]<bool kShifted, bool kDrops>() {
    return input_bias ? kernel_of<residual_add_backward<Gradient, Result, kVector, kShifted, kDrops, true>,
                                  ResidualAddBackwardArguments>()
                      : kernel_of<residual_add_backward<Gradient, Result, kVector, kShifted, kDrops, false>,
                                  ResidualAddBackwardArguments>();
  };
  if (plan.shifted) return drops ? choose.template operator()<true, true>() : choose.template operator()<true, false>();
  return drops ? choose.template operator()<false, true>() : choose.template operator()<false, false>();
}

// The type of grad_input, whether or not it is wanted.
DType branch_of(const ResidualAddBackward& a) {
  return a.grad_input.data == nullptr ? a.grad_output.dtype : a.grad_input.dtype;
}

BackwardKernelOfPlan kernels_for(const ResidualAddBackward& a) {
  return with_element_types<BackwardKernelOfPlan>(branch_of(a), a.grad_output.dtype, a.grad_output.dtype,
                                                  []<class Types>() -> BackwardKernelOfPlan {
                                                    return backward_kernel<typename Types::Sum, typename Types::Branch>;
                                                  });
}

int vector_of(const ResidualAddBackward& a) { return kVectorBytes / size_of(branch_of(a)); }

Alignment alignment_of(const ResidualAddBackward& a) {
  return Alignment(a.rows, vector_of(a)).with(a.grad_output).with(a.grad_input);
}

ResidualAddBackward flattened(const ResidualAddBackward& a) {
  return flattened(a, a.grad_input_bias.data != nullptr, a.grad_output, a.grad_input);
}

bool is_float64(const ResidualAddBackward& a) {
  return a.grad_output.dtype == DType::kFloat64 || branch_of(a) == DType::kFloat64;
}

// ---- Any types and alignment

ColumnOfSubset generic_place(std::int64_t rows, std::int64_t cols, std::int64_t most_blocks) {
  const std::int64_t tiles = (cols + kGenericThreads - 1) / kGenericThreads;
  return {tiles, std::clamp<std::int64_t>(most_blocks / tiles, 1, std::max<std::int64_t>(rows, 1))};
}

template <auto kernel, class Arguments>
cudaError_t launch_generic(const Arguments& a, const ColumnOfSubset& place, const std::int64_t* seed,
                           cudaStream_t stream) {
  const LaunchShape shape = {static_cast<int>(place.tiles * place.row_subsets), 1, kGenericThreads, 0};
  return launch<kernel>(shape, stream, a, seed, place);
}

}  // namespace

Plan residual_add_forward_plan(const ResidualAddForward& arguments) {
  const ResidualAddForward a = flattened(arguments);
  const Alignment alignment = alignment_of(a);
  const auto bias = ParameterTypes(a.input.dtype).with(a.input_bias);
  if (kernels_for(a) == nullptr || !alignment.alike() || !bias.alike()) return {.generic = true};
  return elementwise_plan(a.cols, size_of(a.input.dtype), alignment.shifted(a.cols) || !bias.aligned(),
                          kElementwiseThreads, kElementwiseItems);
}

cudaError_t residual_add_forward(const ResidualAddForward& arguments, const Plan& plan, const std::int64_t* seed,
                                 cudaStream_t stream) {
  const ResidualAddForward a = flattened(arguments);
  if (plan.generic) {
    const auto place = generic_place(a.rows, a.cols, kMaxRowSubsets);
    const bool is_float64 =
        a.input.dtype == DType::kFloat64 || a.residual.dtype == DType::kFloat64 || a.output.dtype == DType::kFloat64;
    return is_float64 ? launch_generic<residual_add_forward_generic<double>>(a, place, seed, stream)
                      : launch_generic<residual_add_forward_generic<float>>(a, place, seed, stream);
  }
  const std::int64_t row_blocks = (a.rows + plan.groups() - 1) / plan.groups();
  const LaunchShape shape = {static_cast<int>(row_blocks * plan.tiles), 1, plan.threads, 0};
  return kernels_for(a)(plan, a.dropout.threshold > 0)
      .launch(shape, stream,
              {.input = a.input.data,
               .input_bias = a.input_bias.data,
               .residual = a.residual.data,
               .output = a.output.data,
               .seed = seed,
               .rows = a.rows,
               .cols = a.cols,
               .tiles = plan.tiles,
               .input_stride = a.input.row_stride,
               .residual_stride = a.residual.row_stride,
               .output_stride = a.output.row_stride,
               .row_threads = plan.row_threads,
               .first_element = alignment_of(a).first_element(),
               .float32_parameters = ParameterTypes(a.input.dtype).with(a.input_bias).float32(),
               .threshold = a.dropout.threshold,
               .scale = a.dropout.scale});
}

Plan residual_add_backward_plan(const ResidualAddBackward& arguments, const Device& device) {
  const ResidualAddBackward a = flattened(arguments);
  const bool sums = a.grad_input_bias.data != nullptr;
  const Alignment alignment = alignment_of(a);
  if (kernels_for(a) == nullptr || !alignment.alike()) {
    const auto place = generic_place(a.rows, a.cols, sums ? device.multiprocessors : kMaxRowSubsets);
    return {.generic = true,
            .tiles = place.tiles,
            .row_subsets = static_cast<int>(place.row_subsets),
            .overlaps = sums && has_overlapping_kernels(device.architecture)};
  }
  Plan plan =
      elementwise_plan(a.cols, size_of(branch_of(a)), alignment.shifted(a.cols),
                       sums ? kColumnSumThreads : kElementwiseThreads, sums ? kColumnSumItems : kElementwiseItems);
  const std::int64_t apart = sums && plan.shifted ? vector_of(a) : 1;  // subsets are a multiple of it
  const std::int64_t wanted = std::max<std::int64_t>(1, (a.rows + plan.groups() - 1) / plan.groups());
  const std::int64_t most = sums ? std::max<std::int64_t>(device.multiprocessors / plan.tiles / apart * apart, apart)
                                 : std::numeric_limits<int>::max() / plan.tiles;
  plan.row_subsets = static_cast<int>(std::min((wanted + apart - 1) / apart * apart, most));
  plan.overlaps = sums && has_overlapping_kernels(device.architecture);
  return plan;
}

std::size_t residual_add_backward_workspace_bytes(const ResidualAddBackward& a, const Plan& plan) {
  if (a.grad_input_bias.data == nullptr) return 0;
  return static_cast<std::size_t>(plan.row_subsets) * static_cast<std::size_t>(a.cols) * (is_float64(a) ? 8 : 4);
}

cudaError_t residual_add_backward(const ResidualAddBackward& arguments, const Plan& plan, const std::int64_t* seed,
                                  cudaStream_t stream) {
  const ResidualAddBackward a = flattened(arguments);
  const bool sums = a.grad_input_bias.data != nullptr;
  cudaError_t error = cudaSuccess;
  if (plan.generic) {
    const ColumnOfSubset place = {plan.tiles, plan.row_subsets};
    error = is_float64(a) ? launch_generic<residual_add_backward_generic<double>>(a, place, seed, stream)
                          : launch_generic<residual_add_backward_generic<float>>(a, place, seed, stream);
  } else {
    const int exchange = plan.groups() * exchange_size(plan.row_threads, vector_of(a));
    const LaunchShape shape = {static_cast<int>(plan.row_subsets * plan.tiles), 1, plan.threads,
                               sums ? exchange * static_cast<int>(sizeof(float)) : 0};
    error = kernels_for(a)(plan, a.dropout.threshold > 0, sums)
                .launch(shape, stream,
                        {.grad_output = a.grad_output.data,
                         .grad_input = a.grad_input.data,
                         .partials = static_cast<float*>(a.workspace),
                         .seed = seed,
                         .rows = a.rows,
                         .cols = a.cols,
                         .tiles = plan.tiles,
                         .row_subsets = plan.row_subsets,
                         .grad_output_stride = a.grad_output.row_stride,
                         .grad_input_stride = a.grad_input.row_stride,
                         .row_threads = plan.row_threads,
                         .first_element = alignment_of(a).first_element(),
                         .threshold = a.dropout.threshold,
                         .scale = a.dropout.scale});
  }
  if (error != cudaSuccess || !sums) return error;
  return finish_column_sums(a.workspace, is_float64(a), plan, a.cols, {a.grad_input_bias}, stream);
}

}  // namespace resnorm::cuda
