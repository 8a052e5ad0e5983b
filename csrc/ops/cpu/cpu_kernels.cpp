// SPDX-License-Identifier: BSD-3-Clause
#include "cpu_kernels.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#include <atomic>
#include <initializer_list>
#include <stdexcept>

#include "../../kernels/cpu/dispatch.h"
#include "../../kernels/cpu/workspace.h"
#include "../support/dropout.h"

namespace resnorm {

namespace {

template <class Arguments>
void run_backward(void (*kernel)(const Arguments&, cpu::ParallelFor), Arguments arguments,
                  std::initializer_list<Vector> sums, std::initializer_list<DType> accumulated) {
  int wanted = 0;
  for (const auto& sum : sums) wanted += sum.data != nullptr;
  auto accumulation = DType::kFloat32;
  for (const auto dtype : accumulated) {
    if (dtype == DType::kFloat64) accumulation = dtype;
  }
  const auto bytes = cpu::backward_workspace_bytes(arguments.rows, arguments.cols, wanted, accumulation);
  const auto workspace = at::empty({static_cast<int64_t>(bytes)}, at::TensorOptions().dtype(at::kByte));
  arguments.workspace = workspace.mutable_data_ptr();
  kernel(arguments, parallel_for);
}

}  // namespace

const cpu::KernelTable& cpu_kernels() {
  try {
    return cpu::kernels();
  } catch (const std::invalid_argument& error) {
    TORCH_CHECK_VALUE(false, error.what());
  }
}

void parallel_for(int64_t count, int64_t grain, cpu::RangeBody body, const void* context) {
  at::parallel_for(0, count, grain, [=](int64_t begin, int64_t end) { body(context, begin, end); });
}

int64_t free_workspaces() {
  std::atomic<int64_t> bytes = 0;
  // One piece for each thread of the pool.
  at::parallel_for(0, at::get_num_threads(), 1,
                   [&](int64_t, int64_t) { bytes += static_cast<int64_t>(cpu::free_thread_buffers()); });
  return bytes;
}

Dropout CpuKernels::dropout(double p, const std::optional<at::Tensor>& seed) {
  const auto threshold = dropout_threshold(p);
  if (threshold == 0) return {};
  return {threshold, dropout_scale(threshold), static_cast<std::uint64_t>(seed->item<int64_t>())};
}

void CpuKernels::run(const NormForward& a) { cpu_kernels().norm_forward(a, parallel_for); }

void CpuKernels::run(const NormBackward& a) {
  run_backward(cpu_kernels().norm_backward, a, {a.grad_weight, a.grad_bias, a.grad_input_bias},
               {a.sum.dtype, a.grad_output.dtype});
}

void CpuKernels::run(const ResidualAddForward& a) { cpu_kernels().residual_add_forward(a, parallel_for); }

void CpuKernels::run(const ResidualAddBackward& a) {
  run_backward(cpu_kernels().residual_add_backward, a, {a.grad_input_bias}, {a.grad_output.dtype, a.grad_input.dtype});
}

void CpuKernels::run(const BiasActivationForward& a) { cpu_kernels().bias_activation_forward(a, parallel_for); }

void CpuKernels::run(const BiasActivationBackward& a) {
  run_backward(cpu_kernels().bias_activation_backward, a, {a.grad_bias}, {});
}

}  // namespace resnorm
