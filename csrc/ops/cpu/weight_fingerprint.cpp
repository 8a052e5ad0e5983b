// SPDX-License-Identifier: BSD-3-Clause
#include "weight_fingerprint.h"

#include <c10/util/hash.h>

#include <algorithm>
#include <cstring>

namespace resnorm {

namespace {

constexpr int64_t kSamples = 8;

template <typename T>
void mix(size_t& hash, const T& value) {
  hash = c10::hash_combine(hash, std::hash<T>{}(value));
}

void mix_samples(size_t& hash, const at::Tensor& weight) {
  if (!weight.is_cpu() || !weight.is_non_overlapping_and_dense() || weight.numel() == 0) return;
  const auto item = static_cast<int64_t>(weight.element_size()), last = weight.numel() - 1;
  const auto end = static_cast<std::size_t>((weight.storage_offset() + last + 1) * item);
  if (weight.storage().nbytes() < end) return;  // freed, as by those who gather parameters for each call
  const auto* bytes = static_cast<const char*>(weight.const_data_ptr());
  for (int64_t i = 0; i < kSamples; ++i) {
    uint64_t value = 0;
    std::memcpy(&value, bytes + last * i / (kSamples - 1) * item, std::min<int64_t>(item, sizeof(value)));
    mix(hash, value);
  }
}

}  // namespace

int64_t weight_fingerprint(const std::vector<at::Tensor>& weights) {
  size_t hash = weights.size();
  for (const auto& weight : weights) {
    const auto* impl = weight.unsafeGetTensorImpl();
    mix(hash, reinterpret_cast<uintptr_t>(weight.storage().unsafeGetStorageImpl()));
    mix(hash, reinterpret_cast<uintptr_t>(weight.const_data_ptr()));
    mix(hash, static_cast<int>(weight.scalar_type()));
    mix(hash, weight.is_neg());
    mix(hash, weight.is_inference() ? 0U : impl->version_counter().current_version());
    for (const auto size : weight.sizes()) mix(hash, size);
    for (const auto stride : weight.strides()) mix(hash, stride);
    mix_samples(hash, weight);
  }
  return static_cast<int64_t>(hash);
}

}  // namespace resnorm
