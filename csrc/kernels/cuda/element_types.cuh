// SPDX-License-Identifier: BSD-3-Clause
// The element types that kernels are compiled for: those of the branch that is added (input and output, or their
// gradients) and of the residual stream before and after.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "plan.h"

namespace resnorm::cuda {

template <class Branch_, class Residual_, class Sum_>
struct ElementTypes {
  using Branch = Branch_;
  using Residual = Residual_;
  using Sum = Sum_;
};

// All of one type; a float32 residual and sum beside a half-precision branch; a residual of the branch's type whose
// sum is float32.
template <class Value>
using SameTypes = ElementTypes<Value, Value, Value>;
template <class Half>
using Float32Residual = ElementTypes<Half, float, float>;
template <class Half>
using WideningResidual = ElementTypes<Half, Half, float>;

// declare(types) for each of these.
#define RESNORM_FOR_ELEMENT_TYPES(declare)  \
  declare(SameTypes<float>);                \
  declare(SameTypes<__nv_bfloat16>);        \
  declare(Float32Residual<__nv_bfloat16>);  \
  declare(WideningResidual<__nv_bfloat16>); \
  declare(SameTypes<__half>);               \
  declare(Float32Residual<__half>);         \
  declare(WideningResidual<__half>)

// What `visit`, a template of ElementTypes, returns for these types; an empty value for a combination without kernels.
template <class Result, class Visit>
Result with_element_types(DType branch, DType residual, DType sum, const Visit& visit) {
  if (!has_kernels(branch, residual, sum)) return {};
  const auto half_types = [&]<class Half>() -> Result {
    if (sum == branch) return visit.template operator()<SameTypes<Half>>();
    if (residual == branch) return visit.template operator()<WideningResidual<Half>>();
    return visit.template operator()<Float32Residual<Half>>();
  };
  switch (branch) {
    case DType::kFloat32:
      return visit.template operator()<SameTypes<float>>();
    case DType::kBFloat16:
      return half_types.template operator()<__nv_bfloat16>();
    case DType::kFloat16:
      return half_types.template operator()<__half>();
    default:
      return {};
  }
}

}  // namespace resnorm::cuda
