#include "framework/pipeline/pipeline.h"

#include <algorithm>
#include <cmath>

#include "framework/base/error.h"
#include "framework/base/text.h"
#include "framework/pipeline/pin.h"

namespace sikv {
namespace {

using Clock = std::chrono::steady_clock;

template <typename Body>
double seconds(Body&& body) {
  const auto start = Clock::now();
  body();
  return std::chrono::duration<double>(Clock::now() - start).count();
}

// The options of a cache that fits into the device's free memory.
CacheOptions checked_options(const Composition& composition, const Device& device,
                             const sikv_shape& shape, int max_new_tokens) {
  const CacheOptions options = composition.cache_options(max_new_tokens);
  const uint64_t needed = composition.planned(shape.max_tokens, options).total();
  const uint64_t free = device.free_bytes();
  if (needed > free) {
    throw Error(
        "the cache needs {} for batch {} at {} tokens, but {} are free: the largest batch that "
        "fits is {}; lower the batch, the context or the number of layers",
        bytes_text(needed), shape.max_sequences, shape.max_tokens, bytes_text(free),
        free / (needed / static_cast<uint64_t>(shape.max_sequences)));
  }
  return options;
}

KvCache::Store store_of(const CodecInstance& codec) {
  return {codec.describe(), &codec.variant().codec(), codec.self()};
}

}  // namespace

Pipeline::Pipeline(const PipelineSpec& spec, const Registry& registry, Device& device,
                   const sikv_shape& shape, int max_new_tokens)
    : composition_(spec, registry, device, shape),
      device_(device),
      shape_(shape),
      scale_(1.0f / std::sqrt(static_cast<float>(shape.head_dim))),
      cache_(device, shape, store_of(composition_.keys()), store_of(composition_.values()),
             checked_options(composition_, device, shape, max_new_tokens)) {
  const size_t rows = static_cast<size_t>(cache_.num_rows());
  workspace_ = DeviceBuffer(
      device,
      std::max({composition_.selector_workspace(), composition_.kernel_workspace(),
                composition_.keys().workspace_bytes(), composition_.values().workspace_bytes()}));
  selection_.capacity = composition_.capacity();
  slots_ = DeviceBuffer(device, rows * static_cast<size_t>(selection_.capacity) * sizeof(int32_t));
  counts_ = DeviceBuffer(device, rows * sizeof(int32_t));
  selection_.slots = slots_.as<int32_t>();
  selection_.counts = counts_.as<int32_t>();
  if (composition_.selector().evicts()) {
    keep_slots_ =
        DeviceBuffer(device, rows * static_cast<size_t>(shape.max_tokens) * sizeof(int32_t));
    keep_counts_ = DeviceBuffer(device, rows * sizeof(int32_t));
  }
  for (int b = 0; b < shape.max_sequences; ++b) composition_.selector().begin_sequence(b);
}

void Pipeline::prefill(int layer, const sikv_rows& keys, const sikv_rows& values,
                       const void* queries, int num_queries) {
  const int H = shape_.num_kv_heads;
  std::vector<int32_t> encoded, first_slot;
  for (int b = 0; b < shape_.max_sequences; ++b) {
    if (keys.count[b] < 1) throw Error("sequence {} has an empty prompt: give at least 1 token", b);
    encoded.push_back(keys.count[b] / SIKV_PAGE_TOKENS * SIKV_PAGE_TOKENS);
    for (int h = 0; h < H; ++h) {
      first_slot.push_back(cache_.extend(layer, b * H + h, encoded.back()));
    }
  }
  const sikv_cache_view view = cache_.view(layer);
  void* const workspace = workspace_.as<>();
  void* const stream = device_.stream();
  times_.fit += seconds([&] {
    composition_.keys().fit(keys, view, workspace, stream);
    composition_.values().fit(values, view, workspace, stream);
    device_.synchronize();
  });
  sikv_rows full_keys = keys, full_values = values;
  full_keys.count = full_values.count = encoded.data();
  times_.encode += seconds([&] {
    composition_.keys().encode(full_keys, first_slot.data(), view, workspace, stream);
    composition_.values().encode(full_values, first_slot.data(), view, workspace, stream);
    device_.synchronize();
  });
  for (int b = 0; b < shape_.max_sequences; ++b) {
    const int done = encoded[static_cast<size_t>(b)];
    cache_.fill_tail(layer, b, keys, values, done, keys.count[b] - done);
    if (composition_.spec().pinned == 0) continue;
    for (int h = 0; h < H; ++h) {
      const int64_t query_elements =
          int64_t{num_queries} * shape_.num_query_heads * shape_.head_dim;
      const PinInput input{
          keys,
          b,
          h,
          done,
          static_cast<const char*>(queries) + b * query_elements * sikv_dtype_bytes(shape_.dtype),
          num_queries,
          shape_.num_query_heads,
          H,
          shape_.head_dim,
          scale_};
      const auto slots = choose_pinned(composition_.spec().pin, composition_.spec().pinned, input);
      cache_.pin(layer, b * H + h, slots, keys, values);
    }
  }
  times_.observe += seconds([&] {
    const sikv_cache_view filled = cache_.view(layer);
    const sikv_observe_args args{sizeof args, num_queries, &filled,   keys,
                                 values,      queries,     keys.count};
    composition_.selector().observe(args, workspace, stream);
    apply_evictions(layer);
    device_.synchronize();
  });
}

void Pipeline::begin_step() {
  ++step_;
  for (const char* stage : {"append", "select", "attend"}) times_.steps[stage].push_back(0.0);
  composition_.selector().begin_step(step_);
}

void Pipeline::append(int layer, const void* k, const void* v) {
  check_finite("K", layer, k, shape_.num_kv_heads);
  check_finite("V", layer, v, shape_.num_kv_heads);
  times_.steps["append"].back() += seconds([&] {
    flush_full_tails(layer);
    const int64_t bytes =
        int64_t{shape_.num_kv_heads} * shape_.head_dim * sikv_dtype_bytes(shape_.dtype);
    for (int b = 0; b < shape_.max_sequences; ++b) {
      const int length =
          cache_.encoded_len(layer, b * shape_.num_kv_heads) + cache_.tail_len(layer, b);
      if (length >= shape_.max_tokens) {
        throw Error("sequence {} of the batch grows past the {} tokens it was planned for", b,
                    shape_.max_tokens);
      }
      if (cache_.tail_len(layer, b) == cache_.tail_capacity()) {
        throw Error(
            "sequence {} of the batch generates more tokens than its tail was planned for ({})", b,
            cache_.tail_capacity());
      }
      cache_.push_tail(layer, b, static_cast<const char*>(k) + b * bytes,
                       static_cast<const char*>(v) + b * bytes);
    }
  });
}

void Pipeline::flush_full_tails(int layer) {
  if (composition_.spec().keep_generated) return;
  std::vector<bool> due;
  for (int b = 0; b < shape_.max_sequences; ++b) {
    due.push_back(cache_.tail_len(layer, b) == SIKV_PAGE_TOKENS);
  }
  if (std::none_of(due.begin(), due.end(), [](bool d) { return d; })) return;
  const int H = shape_.num_kv_heads;
  std::vector<int32_t> first_slot(static_cast<size_t>(cache_.num_rows()), 0);
  for (int b = 0; b < shape_.max_sequences; ++b) {
    for (int h = 0; h < H && due[static_cast<size_t>(b)]; ++h) {
      first_slot[static_cast<size_t>(b * H + h)] =
          cache_.extend(layer, b * H + h, SIKV_PAGE_TOKENS);
    }
  }
  const auto rows = cache_.tail_rows(layer, due, SIKV_PAGE_TOKENS);
  const sikv_cache_view view = cache_.view(layer);
  composition_.keys().encode(rows.k, first_slot.data(), view, workspace_.as<>(), device_.stream());
  composition_.values().encode(rows.v, first_slot.data(), view, workspace_.as<>(),
                               device_.stream());
  const sikv_observe_page_args args{sizeof args, 0, &view, rows.k, rows.v, first_slot.data()};
  composition_.selector().observe_page(args, workspace_.as<>(), device_.stream());
  for (int b = 0; b < shape_.max_sequences; ++b) {
    if (due[static_cast<size_t>(b)]) cache_.clear_tail(layer, b);
  }
  apply_evictions(layer);
}

void Pipeline::apply_evictions(int layer) {
  if (!composition_.selector().evicts()) return;
  const sikv_cache_view view = cache_.view(layer);
  auto* const slots = keep_slots_.as<int32_t>();
  auto* const counts = keep_counts_.as<int32_t>();
  std::fill_n(counts, cache_.num_rows(), SIKV_SELECT_ALL);
  const sikv_evict_args args{sizeof args, 0, &view, slots, counts};
  composition_.selector().evict(args, workspace_.as<>(), device_.stream());
  for (int row = 0; row < cache_.num_rows(); ++row) {
    if (counts[row] == SIKV_SELECT_ALL) continue;
    check_slots("keeps", view, row, slots + int64_t{row} * view.max_encoded_len, counts[row],
                view.max_encoded_len, true);
    cache_.evict(layer, row,
                 {slots + int64_t{row} * view.max_encoded_len, static_cast<size_t>(counts[row])});
  }
}

void Pipeline::attend(int layer, const void* q, float* out, float* lse) {
  check_finite("q", layer, q, shape_.num_query_heads);
  const sikv_cache_view view = cache_.view(layer);
  selected_layer_ = layer;
  times_.steps["select"].back() += seconds([&] {
    const sikv_select_args args{sizeof args, shape_.num_query_heads, &view, q, scale_, 0,
                                selection_};
    composition_.selector().run(args, workspace_.as<>(), device_.stream());
    device_.synchronize();
  });
  const bool ordered =
      (composition_.selector().variant().selector().flags & SIKV_SELECTOR_UNORDERED) == 0;
  for (int row = 0; row < cache_.num_rows(); ++row) {
    if (selection_.counts[row] == SIKV_SELECT_ALL) continue;
    check_slots("selects", view, row, selection_.slots + int64_t{row} * selection_.capacity,
                selection_.counts[row], selection_.capacity, ordered);
  }
  times_.steps["attend"].back() += seconds([&] {
    const sikv_attend_args args{
        sizeof args, shape_.num_query_heads, &view, q, scale_, 0, selection_, out, lse};
    composition_.kernel().run(args, workspace_.as<>(), device_.stream());
    device_.synchronize();
  });
}

void Pipeline::check_slots(const char* what, const sikv_cache_view& view, int row,
                           const int32_t* slots, int32_t count, int32_t capacity,
                           bool ordered) const {
  const auto fault = [&](const std::string& text) {
    throw InternalError(fmt::format(
        "{} {} {} in layer {}, sequence {}, KV head {}, which holds {} encoded tokens; please "
        "report this to its author",
        composition_.selector().variant().name(), what, text, view.layer, row / shape_.num_kv_heads,
        row % shape_.num_kv_heads, view.encoded_len[row]));
  };
  if (count < 0 || count > capacity) fault(fmt::format("{} slots", count));
  for (int32_t i = 0; i < count; ++i) {
    if (slots[i] < 0 || slots[i] >= view.encoded_len[row]) fault(fmt::format("slot {}", slots[i]));
    if (ordered && i > 0 && slots[i] <= slots[i - 1]) {
      fault(fmt::format("slot {} after slot {}", slots[i], slots[i - 1]));
    }
  }
}

std::vector<int32_t> Pipeline::selected(int row) const {
  const sikv_cache_view view = cache_.view(selected_layer_);
  const int32_t count = selection_.counts[row];
  std::vector<int32_t> slots;
  if (count != SIKV_SELECT_ALL) {
    slots.assign(selection_.slots + int64_t{row} * selection_.capacity,
                 selection_.slots + int64_t{row} * selection_.capacity + count);
    return slots;
  }
  const int32_t* pinned = view.pinned_slots + int64_t{row} * view.pinned_capacity;
  const int32_t* const pinned_end = pinned + view.pinned_len[row];
  for (int32_t slot = 0; slot < view.encoded_len[row]; ++slot) {
    if (pinned != pinned_end && *pinned == slot) {
      ++pinned;
    } else {
      slots.push_back(slot);
    }
  }
  return slots;
}

Ledger Pipeline::ledger() const {
  Ledger ledger = cache_.ledger();
  ledger.add("selection",
             slots_.bytes() + counts_.bytes() + keep_slots_.bytes() + keep_counts_.bytes());
  ledger.add("workspace", workspace_.bytes());
  ledger.add("selector_state", composition_.selector().state_bytes());
  return ledger;
}

void Pipeline::check_finite(const char* what, int layer, const void* data, int heads) const {
  const int64_t per_sequence = int64_t{heads} * shape_.head_dim;
  for (int64_t i = 0; i < per_sequence * shape_.max_sequences; ++i) {
    if (std::isfinite(sikv_load(data, shape_.dtype, i))) continue;
    throw Error(
        "{} of decode step {} holds a NaN or infinity: layer {}, sequence {}, head {}, channel {}; "
        "check the model or the trace that it comes from",
        what, step_, layer, i / per_sequence, i % per_sequence / shape_.head_dim,
        i % shape_.head_dim);
  }
}

}  // namespace sikv
