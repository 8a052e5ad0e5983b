// SPDX-License-Identifier: BSD-3-Clause
// The element types that kernels are compiled for: those of the branch that is added (input and output, or their
// gradients) and of the residual stream before and after.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "plan.h"

namespace resnorm::cuda {

template <class Branch_, class Residual_, class Sum_>
struct Stream {
  using Branch = Branch_;
  using Residual = Residual_;
  using Sum = Sum_;
};

// A stream of the branch's type, a float32 stream beside a half-precision branch, and one that becomes float32 here.
template <class Value>
using SameStream = Stream<Value, Value, Value>;
template <class Half>
using Float32Stream = Stream<Half, float, float>;
template <class Half>
using WideningStream = Stream<Half, Half, float>;

// declare(a Stream) for each of these types.
#define RESNORM_FOR_STREAMS(declare)      \
  declare(SameStream<float>);             \
  declare(SameStream<__nv_bfloat16>);     \
  declare(Float32Stream<__nv_bfloat16>);  \
  declare(WideningStream<__nv_bfloat16>); \
  declare(SameStream<__half>);            \
  declare(Float32Stream<__half>);         \
  declare(WideningStream<__half>)

// What `visit`, a template of the stream, returns for these types; an empty value for a combination without kernels.
template <class Result, class Visit>
Result with_stream(DType branch, DType residual, DType sum, const Visit& visit) {
  if (!has_kernels(branch, residual, sum)) return {};
  const auto half_stream = [&]<class Half>() -> Result {
    if (sum == branch) return visit.template operator()<SameStream<Half>>();
    if (residual == branch) return visit.template operator()<WideningStream<Half>>();
    return visit.template operator()<Float32Stream<Half>>();
  };
  switch (branch) {
    case DType::kFloat32:
      return visit.template operator()<SameStream<float>>();
    case DType::kBFloat16:
      return half_stream.template operator()<__nv_bfloat16>();
    case DType::kFloat16:
      return half_stream.template operator()<__half>();
    default:
      return {};
  }
}

}  // namespace resnorm::cuda
