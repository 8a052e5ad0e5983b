// SPDX-License-Identifier: BSD-3-Clause
// A formula as a device's kernel. Its results may be views, or one tensor twice, with whatever strides torch's
// operators gave them; an operator's results alias nothing and have the strides that its meta kernel promises.
#pragma once

#include <tuple>
#include <utility>

#include "checks.h"

namespace resnorm::composite {

// The gradient of a parameter that all rows share, of the gradients of the rows; undefined where it is not wanted.
inline Tensor parameter_gradient(bool wanted, const Tensor& rows, const OptionalTensor& parameter) {
  return wanted ? rows.sum_to_size_symint(parameter->sym_sizes()).to(parameter->scalar_type()) : Tensor();
}

template <auto meta, auto formula>
struct Materialized;

template <auto meta, typename Result, typename... Args, Result (*formula)(Args...)>
struct Materialized<meta, formula> {
  static Result kernel(Args... args) {
    Result results = meta(args...);
    copy(results, formula(args...));
    return results;
  }

 private:
  static void copy(const Tensor& to, const Tensor& from) {
    if (to.defined()) to.copy_(from);
  }

  template <typename... Tensors>
  static void copy(const std::tuple<Tensors...>& to, const std::tuple<Tensors...>& from) {
    [&]<size_t... i>(std::index_sequence<i...>) {
      (copy(std::get<i>(to), std::get<i>(from)), ...);
    }(std::index_sequence_for<Tensors...>());
  }
};

}  // namespace resnorm::composite
