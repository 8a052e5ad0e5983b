// SPDX-License-Identifier: BSD-3-Clause
#include "layer_cache.h"

#include <ATen/ops/from_blob.h>
#include <c10/util/hash.h>

#include <algorithm>
#include <mutex>

#include "../data_writes.h"
#include "../ops/cpu/weight_fingerprint.h"
#include "linear/choice.h"

namespace resnorm::engine {

namespace {

struct Entry {
  const at::TensorImpl* first;  // parameter: one entry for those of one stack, whatever memory they have had
  size_t options;
  size_t identity;      // of the options and of where the parameters lie
  int64_t fingerprint;  // of the parameters
  int64_t writes;       // into them through `.data`
  std::unique_ptr<DataWatch> watch;
  std::shared_ptr<const CachedLayers> layers;
};

std::mutex mutex;
std::vector<Entry> entries;

size_t hash_of(int64_t layers, const LayerOptions& options, std::optional<at::ScalarType> product_dtype) {
  return c10::get_hash(layers, options.head_dim, options.scale, options.attention_eps, options.feed_forward_eps,
                       static_cast<int>(options.activation),
                       static_cast<int>(product_dtype.value_or(at::ScalarType::Undefined)));
}

size_t identity_of(const c10::List<OptionalTensor>& parameters, size_t hash) {
  for (const OptionalTensor& each : parameters) {
    const auto place = each.has_value() ? c10::get_hash(each->storage().unsafeGetStorageImpl(), each->const_data_ptr())
                                        : size_t{0};  // in its place too nothing else may come to be
    hash = c10::hash_combine(hash, place);
  }
  return hash;
}

// An alias that does not keep the memory: it is read in calls alone that have the parameter as an argument, and the
// cache is not to keep parameters that nobody else has.
Tensor borrowed(const Tensor& tensor) {
  if (tensor.is_neg() || tensor.is_inference()) return tensor;
  return at::from_blob(tensor.data_ptr(), tensor.sizes(), tensor.strides(), tensor.options());
}

Precision precision_of(const std::vector<LayerParameters>& layers, at::ScalarType dtype,
                       std::optional<at::ScalarType> product_dtype) {
  std::vector<LinearShape> shapes;
  for (const auto& layer : layers) {
    for (const auto* linear : {&layer.projections, &layer.attention_output, &layer.intermediate, &layer.output}) {
      int64_t out_features = 0;
      for (const auto& weight : linear->weights) out_features += weight.size(0);
      shapes.push_back({dtype, linear->weights.front().size(1), out_features});
    }
  }
  const auto stream = fastest_product_dtype(shapes);
  if (!product_dtype.has_value() || *product_dtype == dtype) return {stream, stream};
  for (auto& shape : shapes) shape.dtype = *product_dtype;
  return {fastest_product_dtype(shapes), stream};
}

std::shared_ptr<const CachedLayers> prepare(const c10::List<OptionalTensor>& parameters, int64_t count,
                                            const LayerOptions& options, std::optional<at::ScalarType> product_dtype) {
  std::vector<OptionalTensor> borrowed_parameters;
  for (const OptionalTensor& each : parameters) {
    borrowed_parameters.push_back(each.has_value() ? OptionalTensor(borrowed(*each)) : std::nullopt);
  }
  const auto per_layer = borrowed_parameters.size() / count;
  std::vector<LayerParameters> layers;
  for (int64_t i = 0; i < count; ++i) {
    layers.push_back(
        layer_parameters(c10::ArrayRef<OptionalTensor>(borrowed_parameters).slice(i * per_layer, per_layer)));
  }
  auto result = std::make_shared<CachedLayers>();
  const auto dtype = layers.front().projections.weights.front().scalar_type();
  result->precision = precision_of(layers, dtype, product_dtype);
  for (const auto& layer : layers) result->layers.push_back(prepare_layer(layer, options, result->precision));
  return result;
}

}  // namespace

std::shared_ptr<const CachedLayers> cached_layers(const c10::List<OptionalTensor>& parameters, int64_t layers,
                                                  const LayerOptions& options,
                                                  std::optional<at::ScalarType> product_dtype) {
  std::vector<Tensor> tensors;
  tensors.reserve(parameters.size());
  bool counted = true;
  for (const OptionalTensor& each : parameters) {
    if (!each.has_value()) continue;
    counted = counted && !each->is_inference();
    tensors.push_back(*each);
  }
  if (!counted) return prepare(parameters, layers, options, product_dtype);  // changes would not be seen
  const auto* const first = tensors.front().unsafeGetTensorImpl();
  const auto options_hash = hash_of(layers, options, product_dtype);
  const auto identity = identity_of(parameters, options_hash);
  const auto fingerprint = weight_fingerprint(tensors);
  {
    const std::lock_guard lock(mutex);
    std::erase_if(entries, [](const Entry& entry) { return entry.watch->expired(); });
    for (const auto& entry : entries) {
      if (entry.identity == identity && entry.fingerprint == fingerprint && entry.writes == entry.watch->writes()) {
        return entry.layers;
      }
    }
    std::erase_if(entries, [&](const Entry& entry) {
      return entry.identity == identity || (entry.first == first && entry.options == options_hash);
    });
  }
  auto watch = std::make_unique<DataWatch>(tensors);  // before the parameters are read
  const auto writes = watch->writes();
  auto prepared = prepare(parameters, layers, options, product_dtype);
  const std::lock_guard lock(mutex);
  entries.push_back({first, options_hash, identity, fingerprint, writes, std::move(watch), prepared});
  return prepared;
}

void clear_layer_cache() {
  const std::lock_guard lock(mutex);
  entries.clear();
}

}  // namespace resnorm::engine
