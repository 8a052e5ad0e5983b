// SPDX-License-Identifier: BSD-3-Clause
// at::assert_no_partial_overlap and at::assert_no_overlap see overlaps only between tensors without gaps; slices of a
// wider buffer, where `out` tensors often lie, have gaps.
#include "overlap.h"

#include <ATen/MemoryOverlap.h>
#include <c10/util/SmallVector.h>

#include <algorithm>

namespace resnorm {

namespace {

// A step of `stride` bytes that can be taken any number of times from `least` to `most`.
struct Step {
  int64_t stride, least, most;
};

// Whether steps of those kinds can add up to `distance`.
bool add_up_to(c10::ArrayRef<Step> steps, int64_t distance) {
  if (steps.empty()) return distance == 0;
  const auto [stride, least, most] = steps.front();
  const auto rest = steps.slice(1);
  int64_t rest_least = 0, rest_most = 0;
  for (const auto& step : rest) {
    rest_least += step.stride * step.least;
    rest_most += step.stride * step.most;
  }
  // Truncating division may give one count too many at either end.
  const auto first = std::max((distance - rest_most) / stride - 1, least);
  const auto last = std::min((distance - rest_least) / stride + 1, most);
  for (auto count = first; count <= last; ++count) {
    if (add_up_to(rest, distance - count * stride)) return true;
  }
  return false;
}

int64_t address(const at::Tensor& tensor) { return reinterpret_cast<intptr_t>(tensor.const_data_ptr()); }

// Whether any byte belongs to an element of both: address(a) + steps in a == address(b) + steps in b.
bool share_memory(const at::Tensor& a, const at::Tensor& b) {
  if (a.numel() == 0 || b.numel() == 0) return false;
  c10::SmallVector<Step, 16> steps;
  const auto add = [&](int64_t stride, int64_t least, int64_t most) {
    const auto same = std::find_if(steps.begin(), steps.end(), [=](const Step& step) { return step.stride == stride; });
    if (same == steps.end()) {
      steps.push_back({stride, least, most});
    } else {
      same->least += least;
      same->most += most;
    }
  };
  for (int64_t dim = 0; dim < a.dim(); ++dim) {
    if (a.size(dim) > 1 && a.stride(dim) != 0) add(a.stride(dim) * a.itemsize(), 0, a.size(dim) - 1);
  }
  for (int64_t dim = 0; dim < b.dim(); ++dim) {
    if (b.size(dim) > 1 && b.stride(dim) != 0) add(b.stride(dim) * b.itemsize(), 1 - b.size(dim), 0);
  }
  add(1, 1 - static_cast<int64_t>(b.itemsize()), static_cast<int64_t>(a.itemsize()) - 1);
  std::sort(steps.begin(), steps.end(), [](const Step& x, const Step& y) { return x.stride > y.stride; });
  return add_up_to(steps, address(b) - address(a));
}

bool same_elements(const at::Tensor& a, const at::Tensor& b) {
  if (address(a) != address(b) || a.scalar_type() != b.scalar_type() || a.sizes() != b.sizes()) return false;
  for (int64_t dim = 0; dim < a.dim(); ++dim) {
    if (a.size(dim) > 1 && a.stride(dim) != b.stride(dim)) return false;
  }
  return true;
}

}  // namespace

void check_overlap(const at::Tensor& written, std::initializer_list<at::Tensor> whole,
                   std::initializer_list<std::optional<at::Tensor>> apart) {
  at::assert_no_internal_overlap(written);
  for (const auto& tensor : whole) {
    TORCH_CHECK(
        same_elements(written, tensor) || !share_memory(written, tensor),
        "unsupported operation: some elements of the input tensor and the written-to tensor refer to a single memory ",
        "location. Please clone() the tensor before performing the operation.");
  }
  for (const auto& tensor : apart) {
    TORCH_CHECK(!tensor.has_value() || !share_memory(written, *tensor),
                "unsupported operation: an argument and the written-to tensor refer to a single memory location. ",
                "Please clone() the tensor before performing the operation.");
  }
}

}  // namespace resnorm
