// SPDX-License-Identifier: BSD-3-Clause
// Single elements of a type known at run time: for the combinations of types that have no kernel of their own.
#pragma once

#include "../arguments.h"
#include "words.cuh"

namespace resnorm::cuda {

inline constexpr int kGenericThreads = 256;

template <class Value>
RESNORM_DEVICE Value load_element(const void* from, DType dtype, std::int64_t index) {
  float value[1];
  switch (dtype) {
    case DType::kFloat64:
      return static_cast<Value>(static_cast<const double*>(from)[index]);
    case DType::kFloat32:
      return static_cast<Value>(static_cast<const float*>(from)[index]);
    case DType::kBFloat16:
      ElementWords<__nv_bfloat16>::unpack(load_kept<Words<2>>(static_cast<const __nv_bfloat16*>(from) + index), value);
      return value[0];
    default:
      ElementWords<__half>::unpack(load_kept<Words<2>>(static_cast<const __half*>(from) + index), value);
      return value[0];
  }
}

template <class Value>
RESNORM_DEVICE void store_element(void* to, DType dtype, std::int64_t index, Value value) {
  const float rounded[1] = {static_cast<float>(value)};
  switch (dtype) {
    case DType::kFloat64:
      static_cast<double*>(to)[index] = value;
      break;
    case DType::kFloat32:
      static_cast<float*>(to)[index] = rounded[0];
      break;
    case DType::kBFloat16:
      store(static_cast<__nv_bfloat16*>(to) + index, ElementWords<__nv_bfloat16>::pack(rounded));
      break;
    default:
      store(static_cast<__half*>(to) + index, ElementWords<__half>::pack(rounded));
  }
}

}  // namespace resnorm::cuda
