// SPDX-License-Identifier: BSD-3-Clause
// Writes into tensors through `.data`, which torch hides: `weight.data` is an alias with a count of versions of its
// own, so clipping or masking it leaves the weight's count as it was. Whoever keeps something made of weights watches
// their storages here: every alias that `.data` makes of one, or that `weight.data = alias` makes it an alias of, is
// noted, and with it the count that its writes, and those of its views, do raise.
#pragma once

#include <ATen/core/Tensor.h>

#include <memory>
#include <mutex>
#include <vector>

namespace resnorm {

// Notes aliases from now on, in the whole process: reading `.data` costs a look-up more.
void note_data_aliases();

// The aliases of one storage.
class DataAliases {
 public:
  void add(const c10::VariableVersion& version);

  // How many writes there have been through them, at least; grows with each.
  int64_t writes();

  // Those that are still there.
  std::vector<c10::VariableVersion> living();

 private:
  void forget_dead();

  std::mutex mutex_;
  int64_t past_ = 0;  // writes through aliases that are gone
  std::vector<c10::VariableVersion> versions_;
};

// Watches the storages of tensors for as long as it lives; keeps none of them.
class DataWatch {
 public:
  explicit DataWatch(const std::vector<at::Tensor>& tensors);
  ~DataWatch();
  DataWatch(const DataWatch&) = delete;
  DataWatch& operator=(const DataWatch&) = delete;

  int64_t writes() const;

  // Whether nobody keeps the memory of one of the tensors.
  bool expired() const;

 private:
  // Weak, by which no other storage can come to lie where these lie.
  std::vector<c10::weak_intrusive_ptr<c10::StorageImpl>> storages_;
  std::vector<std::shared_ptr<DataAliases>> aliases_;
};

}  // namespace resnorm
