// SPDX-License-Identifier: BSD-3-Clause
// The CPU kernels as a table for each instruction set, and how they are run in parallel.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../arguments.h"

namespace resnorm::cpu {

// Calls body(context, begin, end) over ranges that cover [0, count), on as many threads as the caller owns; no range
// but the last is shorter than `grain`.
using RangeBody = void (*)(const void* context, std::int64_t begin, std::int64_t end);
using ParallelFor = void (*)(std::int64_t count, std::int64_t grain, RangeBody body, const void* context);

// One instruction set's kernels, a family at a time. A family's source file is compiled once per instruction set, with
// the set's name in RESNORM_ISA, and its table is all that leaves that translation unit.
struct NormForwardKernels {
  void (*norm_forward)(const NormForward&, ParallelFor);
};

struct NormBackwardKernels {
  void (*norm_backward)(const NormBackward&, ParallelFor);
};

struct ResidualAddKernels {
  void (*residual_add_forward)(const ResidualAddForward&, ParallelFor);
  void (*residual_add_backward)(const ResidualAddBackward&, ParallelFor);
};

struct ActivationKernels {
  void (*bias_activation_forward)(const BiasActivationForward&, ParallelFor);
  void (*bias_activation_backward)(const BiasActivationBackward&, ParallelFor);
};

struct AttentionKernels {
  void (*packed_attention)(const PackedAttention&, ParallelFor);
};

struct AttentionBackwardKernels {
  void (*packed_attention_backward)(const PackedAttentionBackward&, ParallelFor);
};

struct LinearKernels {
  // 0 for a dtype that is not to be packed.
  std::size_t (*prepacked_weight_bytes)(DType dtype, std::int64_t out_features, std::int64_t in_features);
  void (*prepack_weight)(const PrepackWeight&, ParallelFor);
  void (*prepacked_linear)(const PrepackedLinear&, ParallelFor);
};

struct KernelTable : NormForwardKernels,
                     NormBackwardKernels,
                     ResidualAddKernels,
                     ActivationKernels,
                     AttentionKernels,
                     AttentionBackwardKernels,
                     LinearKernels {
  const char* isa;
};

// The families' tables of an instruction set.
#define RESNORM_DECLARE_KERNELS(isa)                                \
  namespace isa {                                                   \
  extern const NormForwardKernels norm_forward_kernels;             \
  extern const NormBackwardKernels norm_backward_kernels;           \
  extern const ResidualAddKernels residual_add_kernels;             \
  extern const ActivationKernels activation_kernels;                \
  extern const AttentionKernels attention_kernels;                  \
  extern const AttentionBackwardKernels attention_backward_kernels; \
  extern const LinearKernels linear_kernels;                        \
  }

// Bytes that a backward pass needs to sum `column_sums` (1 to 3) columns' gradients: the partial sums of row blocks
// whose number depends on the sizes only, never on the threads, so that results repeat bitwise.
std::size_t backward_workspace_bytes(std::int64_t rows, std::int64_t cols, int column_sums, DType dtype);

}  // namespace resnorm::cpu
