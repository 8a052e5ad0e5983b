// SPDX-License-Identifier: BSD-3-Clause
// Which tensors an operator may write into.
#pragma once

#include <ATen/core/Tensor.h>

#include <initializer_list>
#include <optional>

namespace resnorm {

// Throws where `written` overlaps itself, one of `whole` in part (the same elements in place are fine) or any of
// `apart` at all.
void check_overlap(const at::Tensor& written, std::initializer_list<at::Tensor> whole,
                   std::initializer_list<std::optional<at::Tensor>> apart);

}  // namespace resnorm
