// SPDX-License-Identifier: BSD-3-Clause
#include "data_writes.h"

#include <ATen/core/VariableHooksInterface.h>

#include <algorithm>
#include <shared_mutex>
#include <type_traits>
#include <unordered_map>

namespace resnorm {

namespace {

struct Watched {
  std::shared_ptr<DataAliases> aliases;
  int64_t watchers = 0;
};

std::shared_mutex watched_mutex;
std::unordered_map<const c10::StorageImpl*, Watched> watched;

// The counts of aliases that live, of storages that nobody watches yet. An alias keeps its storage alive, so that an
// address here is of the storage that it was; what is left of others is thrown out whenever their number has doubled.
std::mutex early_mutex;
std::unordered_multimap<const c10::StorageImpl*, c10::VariableVersion> early;
size_t early_limit = 1024;

void note_early(const c10::StorageImpl* storage, const c10::VariableVersion& version) {
  const std::lock_guard lock(early_mutex);
  if (early.size() >= early_limit) {
    std::erase_if(early, [](const auto& entry) { return entry.second.unique(); });
    early_limit = std::max<size_t>(1024, 2 * early.size());
  }
  early.emplace(storage, version);
}

// `alias` has come to share the memory of another tensor, and counts its writes for itself.
void note_alias(const at::TensorBase& alias) {
  if (!alias.is_cpu() || !alias.has_storage()) return;
  const auto* const storage = alias.storage().unsafeGetStorageImpl();
  const auto& version = alias.unsafeGetTensorImpl()->version_counter();
  const std::shared_lock lock(watched_mutex);  // until it is noted: or a watch that begins here would miss it
  const auto found = watched.find(storage);
  if (found != watched.end()) {
    found->second.aliases->add(version);
  } else if (version.enabled()) {
    note_early(storage, version);
  }
}

using Hooks = at::impl::VariableHooksInterface;
using GradFn = decltype(std::declval<const Hooks&>().grad_fn(std::declval<const at::TensorBase&>()));

// What autograd does for tensors, handed on as it is, but that aliases are noted.
class NotingHooks : public Hooks {
 public:
  explicit NotingHooks(const Hooks& inner) : inner_(inner) {}

  at::TensorBase variable_data(const at::TensorBase& self) const override {
    auto alias = inner_.variable_data(self);
    note_alias(alias);
    return alias;
  }
  at::TensorBase tensor_data(const at::TensorBase& self) const override {
    auto alias = inner_.tensor_data(self);
    note_alias(alias);
    return alias;
  }

  GradFn grad_fn(const at::TensorBase& self) const override { return inner_.grad_fn(self); }
  unsigned _register_hook(const at::TensorBase& self,
                          std::function<at::TensorBase(const at::TensorBase&)> hook) const override {
    return inner_._register_hook(self, std::move(hook));
  }
  void remove_hook(const at::TensorBase& self, unsigned pos) const override { inner_.remove_hook(self, pos); }
  bool is_view(const at::TensorBase& self) const override { return inner_.is_view(self); }
  const at::TensorBase& base(const at::TensorBase& self) const override { return inner_.base(self); }
  const std::string& name(const at::TensorBase& self) const override { return inner_.name(self); }
  bool is_leaf(const at::TensorBase& self) const override { return inner_.is_leaf(self); }
  int64_t output_nr(const at::TensorBase& self) const override { return inner_.output_nr(self); }
  void set_data(const at::TensorBase& self, const at::TensorBase& data) const override {
    inner_.set_data(self, data);
    note_alias(data);
  }
  at::TensorBase data(const at::TensorBase& self) const override { return inner_.data(self); }
  int64_t _version(const at::TensorBase& self) const override { return inner_._version(self); }
  void retain_grad(const at::TensorBase& self) const override { inner_.retain_grad(self); }
  bool retains_grad(const at::TensorBase& self) const override { return inner_.retains_grad(self); }
  void _backward(const at::Tensor& self, at::TensorList inputs, const std::optional<at::Tensor>& gradient,
                 std::optional<bool> keep_graph, bool create_graph) const override {
    inner_._backward(self, inputs, gradient, keep_graph, create_graph);
  }
  void requires_grad_(const at::TensorBase& self, bool value) const override { inner_.requires_grad_(self, value); }
  void basic_autograd_not_implemented_fallback(const c10::OperatorHandle& op, c10::DispatchKeySet keys,
                                               torch::jit::Stack* stack) const override {
    inner_.basic_autograd_not_implemented_fallback(op, keys, stack);
  }
  std::optional<c10::ScalarType> grad_dtype(const at::TensorBase& self) const override {
    return inner_.grad_dtype(self);
  }
  void set_grad_dtype(const at::TensorBase& self, const std::optional<c10::ScalarType>& dtype) const override {
    inner_.set_grad_dtype(self, dtype);
  }

 private:
  const Hooks& inner_;
};

// A release of torch whose autograd has more functions than these goes on without: writes through `.data` are then
// found by the sampled values alone (weight_fingerprint.h).
template <class Noting>
void install() {
  if constexpr (!std::is_abstract_v<Noting>) {
    at::impl::SetVariableHooks(new Noting(*at::impl::GetVariableHooks()));  // for as long as the process lives
  }
}

}  // namespace

void note_data_aliases() {
  static std::once_flag once;
  std::call_once(once, install<NotingHooks>);
}

void DataAliases::add(const c10::VariableVersion& version) {
  const std::lock_guard lock(mutex_);
  if (!version.enabled()) {  // made in inference mode: its writes are not counted, so this counts as one
    ++past_;
    return;
  }
  if (versions_.size() == versions_.capacity()) forget_dead();  // or a loop that reads `.data` would fill memory
  versions_.push_back(version);
}

int64_t DataAliases::writes() {
  const std::lock_guard lock(mutex_);
  forget_dead();
  int64_t writes = past_;
  for (const auto& version : versions_) writes += version.current_version();
  return writes;
}

std::vector<c10::VariableVersion> DataAliases::living() {
  const std::lock_guard lock(mutex_);
  forget_dead();
  return versions_;
}

void DataAliases::forget_dead() {
  const auto is_dead = [&](const c10::VariableVersion& version) {
    if (!version.unique()) return false;
    past_ += version.current_version();
    return true;
  };
  versions_.erase(std::remove_if(versions_.begin(), versions_.end(), is_dead), versions_.end());
}

DataWatch::DataWatch(const std::vector<at::Tensor>& tensors) {
  const std::lock_guard lock(watched_mutex);
  for (const auto& tensor : tensors) {
    if (!tensor.has_storage()) continue;
    storages_.emplace_back(tensor.storage().getWeakStorageImpl());
    const auto* const storage = tensor.storage().unsafeGetStorageImpl();
    auto& entry = watched[storage];
    if (entry.watchers++ == 0) entry.aliases = std::make_shared<DataAliases>();
    aliases_.push_back(entry.aliases);
    const std::lock_guard early_lock(early_mutex);
    const auto [first, last] = early.equal_range(storage);
    for (auto alias = first; alias != last; ++alias) entry.aliases->add(alias->second);
    early.erase(first, last);
  }
}

DataWatch::~DataWatch() {
  const std::lock_guard lock(watched_mutex);
  for (const auto& storage : storages_) {
    const auto found = watched.find(storage._unsafe_get_target());
    if (--found->second.watchers > 0) continue;
    for (const auto& version : found->second.aliases->living()) note_early(storage._unsafe_get_target(), version);
    watched.erase(found);
  }
}

bool DataWatch::expired() const {
  return std::any_of(storages_.begin(), storages_.end(), [](const auto& storage) { return storage.expired(); });
}

int64_t DataWatch::writes() const {
  int64_t writes = 0;
  for (const auto& aliases : aliases_) writes += aliases->writes();
  return writes;
}

}  // namespace resnorm
