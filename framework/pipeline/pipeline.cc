#include "framework/pipeline/pipeline.h"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "framework/base/error.h"
#include "framework/base/text.h"
#include "framework/pipeline/pin.h"
#include "plugins/abi/sikv_limits.h"

namespace sikv {
namespace {

constexpr int kK = 0, kV = 1, kQ = 2, kW = 3;  // inputs of Staging

// The options of a cache that fits into the device's free memory.
CacheOptions checked_options(const Composition& composition, const Device& device,
                             const sikv_shape& shape, int max_new_tokens) {
  const CacheOptions options = composition.cache_options(max_new_tokens);
  const uint64_t needed = composition.planned(shape.max_tokens, options).total();
  const uint64_t free = device.free_bytes();
  if (needed <= free) return options;
  const auto batch = static_cast<uint64_t>(shape.max_sequences);
  std::string fits = fmt::format(
      "the largest batch that fits is {}; lower the batch, the context or the number of layers",
      free / (needed / batch));
  if (needed / batch > free) {
    // What is not in pages is counted as for the context that was asked for; a shorter one needs no
    // more.
    const uint64_t rest = composition.planned(0, options).total() / batch;
    const uint64_t page = composition.planned(SIKV_PAGE_TOKENS, options).total() / batch - rest;
    const uint64_t pages = free > rest ? (free - rest) / page : 0;
    fits = longest_context_text(static_cast<int64_t>(pages) * SIKV_PAGE_TOKENS);
  }
  throw Error("the cache needs {} for batch {} at {} tokens, but {} are free: {}",
              bytes_text(needed), shape.max_sequences, shape.max_tokens, bytes_text(free), fits);
}

KvCache::Store store_of(const CodecInstance& codec) {
  return {codec.describe(), &codec.variant().codec(), codec.self()};
}

}  // namespace

std::string longest_context_text(int64_t tokens) {
  if (tokens > 0) {
    return fmt::format("not one sequence of that length fits; the longest context that does is {}",
                       tokens);
  }
  return fmt::format(
      "not one sequence fits, not even of a single page ({} tokens): give it more memory or fewer "
      "layers",
      SIKV_PAGE_TOKENS);
}

Pipeline::Pipeline(const PipelineSpec& spec, const Registry& registry, Device& device,
                   const sikv_shape& shape, int max_new_tokens, std::span<const int> layers)
    : composition_(spec, registry, device, shape, layers),
      device_(device),
      shape_(shape),
      scale_(1.0f / std::sqrt(static_cast<float>(shape.head_dim))),
      cache_(device, shape, store_of(composition_.keys()), store_of(composition_.values()),
             checked_options(composition_, device, shape, max_new_tokens)),
      prompt_(device),
      token_(device) {
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
  if (composition_.selector().weighs()) {
    log_weights_ = DeviceBuffer(device, static_cast<size_t>(composition_.log_weights_bytes()));
  }
  if (composition_.selector().evicts()) {
    keep_slots_ =
        DeviceBuffer(device, rows * static_cast<size_t>(shape.max_tokens) * sizeof(int32_t));
    keep_counts_ = DeviceBuffer(device, rows * sizeof(int32_t));
  }
  for (int b = 0; b < shape.max_sequences; ++b) composition_.selector().begin_sequence(b);
  device_.synchronize();
}

void Pipeline::prefill(int layer, const sikv_rows& host_keys, const sikv_rows& host_values,
                       const void* queries, int num_queries, const OutputProjection& projection) {
  check_prompt(layer, host_keys, host_values, num_queries, projection);
  const int B = shape_.max_sequences, H = shape_.num_kv_heads, D = shape_.head_dim;
  const size_t n = static_cast<size_t>(B);
  MirroredArray encoded(device_, n, 0), first_slot(device_, n * static_cast<size_t>(H), 0);
  for (int b = 0; b < B; ++b) {
    const int32_t count = host_keys.count[b];
    const int32_t whole = count / SIKV_PAGE_TOKENS * SIKV_PAGE_TOKENS;
    encoded.edit(static_cast<size_t>(b)) = whole;
    for (int h = 0; h < H; ++h) {
      first_slot.edit(static_cast<size_t>(b * H + h)) = cache_.extend(layer, b * H + h, whole);
    }
  }
  const sikv_rows keys = prompt_.bring_rows(kK, host_keys, B, H, D);
  const sikv_rows values = prompt_.bring_rows(kV, host_values, B, H, D);
  queries = prompt_.bring(
      kQ, queries, static_cast<size_t>(B * num_queries) * token_bytes(shape_.num_query_heads));
  const sikv_cache_view view = cache_.view(layer);
  void* const workspace = workspace_.as<>();
  void* const stream = device_.stream();
  sikv_rows full_keys = keys, full_values = values;
  full_keys.count = full_values.count = encoded.device();
  device_.mark(0);
  composition_.keys().fit(keys, view, workspace, stream);
  composition_.values().fit(values, view, workspace, stream);
  device_.mark(1);
  composition_.keys().encode(full_keys, first_slot.device(), view, workspace, stream);
  composition_.values().encode(full_values, first_slot.device(), view, workspace, stream);
  device_.mark(2);
  cache_.fill_tails(layer, keys, values, host_keys.count);
  if (composition_.spec().pinned > 0) {
    choose_pins(layer, keys, queries, num_queries);
    cache_.copy_pins(layer, keys, values);
  }
  device_.mark(3);
  const sikv_cache_view filled = cache_.view(layer);
  const void* const w_o =
      prompt_.bring(kW, projection.w_o,
                    static_cast<size_t>(projection.hidden) *
                        static_cast<size_t>(shape_.num_query_heads * D) * sizeof(float));
  const sikv_observe_args args{sizeof args,
                               num_queries,
                               &filled,
                               keys,
                               values,
                               queries,
                               keys.count,
                               static_cast<const float*>(w_o),
                               projection.hidden,
                               0};
  composition_.selector().observe(args, workspace, stream);
  evict_after(layer);
  device_.mark(4);
  synchronize();
  times_.fit += device_.seconds(0, 1);
  times_.encode += device_.seconds(1, 2);
  times_.observe += device_.seconds(3, 4);
}

void Pipeline::choose_pins(int layer, const sikv_rows& keys, const void* queries, int num_queries) {
  const PipelineSpec& spec = composition_.spec();
  const int H = shape_.num_kv_heads;
  if (device_.is_cuda()) {
    const KvCache::PinArrays pins = cache_.pin_arrays(layer);
    choose_pinned_on_gpu(spec.pin, spec.pinned,
                         {keys, queries, num_queries, shape_.num_query_heads, H, shape_.head_dim,
                          shape_.max_sequences, scale_, pins.slots, pins.len},
                         device_);
    cache_.pins_chosen(layer);
    return;
  }
  for (int b = 0; b < shape_.max_sequences; ++b) {
    const int whole = keys.count[b] / SIKV_PAGE_TOKENS * SIKV_PAGE_TOKENS;
    const void* const own =
        static_cast<const char*>(queries) +
        static_cast<size_t>(b * num_queries) * token_bytes(shape_.num_query_heads);
    for (int h = 0; h < H; ++h) {
      const PinInput input{
          keys, b, h, whole, own, num_queries, shape_.num_query_heads, H, shape_.head_dim, scale_};
      cache_.pin(layer, b * H + h, choose_pinned(spec.pin, spec.pinned, input));
    }
  }
}

void Pipeline::begin_step() {
  if (++step_ == 0) prompt_.clear();
  for (const char* stage : {"append", "select", "attend"}) times_.steps[stage].push_back(0.0);
  composition_.selector().begin_step(step_);
}

void Pipeline::append(int layer, const void* k, const void* v) {
  if (!device_.is_cuda()) {
    check_storable("K", layer, k, shape_.num_kv_heads);
    check_storable("V", layer, v, shape_.num_kv_heads);
  }
  const size_t bytes = static_cast<size_t>(shape_.max_sequences) * token_bytes(shape_.num_kv_heads);
  k = token_.bring(kK, k, bytes);
  v = token_.bring(kV, v, bytes);
  device_.mark(0);
  if (flush_due(layer)) {
    cache_.reserve_flush(layer);
    flush_full_tails(layer);
  }
  check_room(layer);
  cache_.append(layer, k, v);
  device_.mark(1);
  synchronize();
  times_.steps["append"].back() += device_.seconds(0, 1);
}

void Pipeline::check_room(int layer) const {
  for (int b = 0; b < shape_.max_sequences; ++b) {
    const int tail = cache_.tail_len(layer, b);
    const int length = cache_.encoded_len(layer, b * shape_.num_kv_heads) + tail;
    if (length >= shape_.max_tokens) {
      throw Error("sequence {} of the batch grows past the {} tokens it was planned for", b,
                  shape_.max_tokens);
    }
    if (tail == cache_.tail_capacity() && !flush_due(layer)) {
      throw Error(
          "sequence {} of the batch generates more tokens than its tail was planned for ({})", b,
          cache_.tail_capacity());
    }
  }
}

bool Pipeline::flush_due(int layer) const {
  return !composition_.spec().keep_generated && cache_.flush_due(layer);
}

void Pipeline::flush_full_tails(int layer) {
  const KvCache::Flush flush = cache_.begin_flush(layer);
  const sikv_cache_view view = cache_.view(layer);
  composition_.keys().encode(flush.k, flush.first_slot, view, workspace_.as<>(), device_.stream());
  composition_.values().encode(flush.v, flush.first_slot, view, workspace_.as<>(),
                               device_.stream());
  const sikv_observe_page_args args{sizeof args, 0, &view, flush.k, flush.v, flush.first_slot};
  composition_.selector().observe_page(args, workspace_.as<>(), device_.stream());
  cache_.end_flush(layer);
  evict_after(layer);
}

void Pipeline::check_prompt(int layer, const sikv_rows& keys, const sikv_rows& values,
                            int num_queries, const OutputProjection& projection) const {
  const SelectorInstance& selector = composition_.selector();
  for (int b = 0; b < shape_.max_sequences; ++b) {
    if (keys.count[b] != values.count[b]) {
      throw Error("sequence {} brings {} tokens of K and {} of V: give as many of both", b,
                  keys.count[b], values.count[b]);
    }
    if (const int most = std::min(keys.max_count, values.max_count); keys.count[b] > most) {
      throw Error("sequence {} brings {} tokens, but its rows promise at most {}: raise max_count",
                  b, keys.count[b], most);
    }
    bool filled = cache_.tail_len(layer, b) > 0;
    for (int h = 0; h < shape_.num_kv_heads; ++h) {
      filled = filled || cache_.encoded_len(layer, b * shape_.num_kv_heads + h) > 0;
    }
    if (filled) {
      throw Error(
          "sequence {} brings a prompt of {} tokens, but layer {} already holds one: give every "
          "layer its prompt once",
          b, keys.count[b], layer);
    }
  }
  const auto [shortest, longest] =
      std::minmax_element(keys.count, keys.count + shape_.max_sequences);
  if (*shortest < 1) {
    throw Error("sequence {} has an empty prompt: give at least 1 token", shortest - keys.count);
  }
  check_needs(selector, {"the prompt of this run", shape_.num_layers, shape_.num_layers,
                         *longest - num_queries, projection.w_o != nullptr});
  // Whoever gets all queries knows that shorter prompts have none of the first positions.
  if (num_queries > *shortest && (selector.table().flags & SIKV_SELECTOR_NEEDS_ALL_QUERIES) == 0) {
    throw Error(
        "the last {} queries of every prompt are given, but sequence {} has a prompt of {}: give "
        "at most as many as the shortest prompt has",
        num_queries, shortest - keys.count, *shortest);
  }
}

void Pipeline::evict_after(int layer) {
  if (!composition_.selector().evicts()) return;
  if ((composition_.selector().table().flags & SIKV_SELECTOR_EVICTS_TOGETHER) == 0) {
    apply_evictions(layer);
  } else if (layer == shape_.num_layers - 1) {
    for (int l = 0; l < shape_.num_layers; ++l) apply_evictions(l);
  }
  // Not after every layer: the next one takes the pages that this one gave back.
  if (layer == shape_.num_layers - 1) cache_.trim();
}

void Pipeline::apply_evictions(int layer) {
  const sikv_cache_view view = cache_.view(layer);
  const int rows = cache_.num_rows();
  std::vector<int32_t> counts(static_cast<size_t>(rows), SIKV_SELECT_ALL), slots;
  device_.copy_in(keep_counts_.as<>(), counts.data(), keep_counts_.bytes());
  const sikv_evict_args args{sizeof args, 0, &view, keep_slots_.as<int32_t>(),
                             keep_counts_.as<int32_t>()};
  composition_.selector().evict(args, workspace_.as<>(), device_.stream());
  device_.copy_out(counts.data(), keep_counts_.as<>(), keep_counts_.bytes());
  const sikv_cache_view host = cache_.host_view(layer);
  for (int row = 0; row < rows; ++row) {
    const int32_t count = counts[static_cast<size_t>(row)];
    if (count == SIKV_SELECT_ALL) continue;
    if (count >= 0 && count <= view.max_encoded_len) slots.resize(static_cast<size_t>(count));
    device_.copy_out(slots.data(), args.keep_slots + int64_t{row} * view.max_encoded_len,
                     slots.size() * sizeof(int32_t));
    check_slots("keeps", host, row, slots.data(), count, view.max_encoded_len, true);
    cache_.evict(layer, row, slots);
  }
}

void Pipeline::enqueue_select(int layer, const void* q) {
  const sikv_cache_view view = cache_.view(layer);
  const sikv_select_args args{sizeof args, shape_.num_query_heads,  &view, q, scale_, 0,
                              selection_,  log_weights_.as<float>()};
  composition_.selector().run(args, workspace_.as<>(), device_.stream());
  if (attended_sums_.bytes() > 0) {
    cache_.count_attended(layer, selection_.counts, attended_sums_.as<uint64_t>());
  }
}

void Pipeline::count_attended() {
  if (!device_.is_cuda()) return;
  constexpr uint64_t kNone[3] = {};
  if (attended_sums_.bytes() == 0) {
    attended_sums_ = DeviceBuffer(device_, sizeof kNone);
    for (Recorded& recorded : recorded_) recorded = {};
  }
  device_.copy_in(attended_sums_.as<>(), kNone, sizeof kNone);
}

AttendedTokens Pipeline::attended() const {
  if (attended_sums_.bytes() == 0) return attended_;
  uint64_t sums[3];
  device_.copy_out(sums, attended_sums_.as<>(), sizeof sums);
  return {static_cast<double>(sums[0]), static_cast<double>(sums[1]), static_cast<double>(sums[2])};
}

void Pipeline::enqueue_attend(int layer, const void* q, float* out, float* lse) {
  const sikv_cache_view view = cache_.view(layer);
  const sikv_attend_args args{
      sizeof args, shape_.num_query_heads,  &view, q, scale_, 0, selection_, out,
      lse,         log_weights_.as<float>()};
  composition_.kernel().run(args, workspace_.as<>(), device_.stream());
}

void Pipeline::attend(int layer, const void* q, float* out, float* lse) {
  if (!device_.is_cuda()) check_storable("q", layer, q, shape_.num_query_heads);
  const size_t heads =
      static_cast<size_t>(shape_.max_sequences) * static_cast<size_t>(shape_.num_query_heads);
  const size_t out_bytes = heads * static_cast<size_t>(shape_.head_dim) * sizeof(float);
  q = token_.bring(kQ, q,
                   static_cast<size_t>(shape_.max_sequences) * token_bytes(shape_.num_query_heads));
  const bool out_there = device_.holds(out) && device_.holds(lse);
  if (!out_there && out_.bytes() == 0) {
    out_ = DeviceBuffer(device_, out_bytes);
    lse_ = DeviceBuffer(device_, heads * sizeof(float));
  }
  selected_layer_ = layer;
  device_.mark(0);
  enqueue_select(layer, q);
  device_.mark(1);
  if (!device_.is_cuda()) {
    const sikv_cache_view view = cache_.view(layer);
    const bool ordered = (composition_.selector().table().flags & SIKV_SELECTOR_UNORDERED) == 0;
    for (int row = 0; row < cache_.num_rows(); ++row) {
      const int32_t count = selection_.counts[row], pinned = view.pinned_len[row];
      const bool all = count == SIKV_SELECT_ALL;
      attended_.add(all ? view.encoded_len[row] - pinned : count,
                    pinned + view.tail_len[row / shape_.num_kv_heads]);
      if (all) continue;
      check_slots("selects", view, row, selection_.slots + int64_t{row} * selection_.capacity,
                  selection_.counts[row], selection_.capacity, ordered);
    }
  }
  device_.mark(2);
  enqueue_attend(layer, q, out_there ? out : out_.as<float>(), out_there ? lse : lse_.as<float>());
  device_.mark(3);
  synchronize();
  if (!out_there) {
    device_.copy_out(out, out_.as<>(), out_.bytes());
    device_.copy_out(lse, lse_.as<>(), lse_.bytes());
  }
  times_.steps["select"].back() += device_.seconds(0, 1);
  times_.steps["attend"].back() += device_.seconds(2, 3);
}

void Pipeline::step(std::span<const LayerStep> layers, StepMode mode, const Around& around) {
  SIKV_ASSERT(static_cast<int>(layers.size()) == shape_.num_layers);
  const bool evicts_now = composition_.selector().evicts() && flush_due(0);
  if (mode == StepMode::kEager || !device_.is_cuda() || evicts_now) {
    begin_step();
    for (int l = 0; l < shape_.num_layers; ++l) {
      const LayerStep& layer = layers[static_cast<size_t>(l)];
      if (around.before) around.before(l);
      append(l, layer.k, layer.v);
      attend(l, layer.q, layer.out, layer.lse);
      if (around.after) around.after(l);
    }
    return;
  }
  if (++step_ == 0) prompt_.clear();
  composition_.selector().begin_step(step_);
  replay(layers, around);
}

void Pipeline::replay(std::span<const LayerStep> layers, const Around& around) {
  check_room(0);
  const bool flush = flush_due(0);
  std::vector<int> bounds;
  for (int l = 0; l < shape_.num_layers; ++l) {
    if (flush) cache_.reserve_flush(l);
    bounds.push_back(cache_.encoded_bound(l, flush));
  }
  cache_.upload();
  Recorded& recorded = recorded_[flush];
  if (recorded.steps == nullptr || recorded.bounds != bounds ||
      !std::equal(layers.begin(), layers.end(), recorded.layers.begin(), recorded.layers.end())) {
    recorded = {};
    cache_.begin_recording(bounds);
    try {
      recorded.steps = device_.record([&] {
        for (int l = 0; l < shape_.num_layers; ++l) {
          const LayerStep& layer = layers[static_cast<size_t>(l)];
          if (flush) flush_full_tails(l);
          if (around.before) around.before(l);
          cache_.append(l, layer.k, layer.v);
          enqueue_select(l, layer.q);
          enqueue_attend(l, layer.q, layer.out, layer.lse);
          if (around.after) around.after(l);
        }
      });
    } catch (...) {
      cache_.end_recording();
      throw;
    }
    cache_.end_recording();
    recorded.layers.assign(layers.begin(), layers.end());
    recorded.bounds = bounds;
  }
  recorded.steps->replay();
  for (int l = 0; l < shape_.num_layers; ++l) cache_.replayed(l, flush);
  selected_layer_ = shape_.num_layers - 1;
}

void Pipeline::synchronize() {
  device_.synchronize();
  const sikv_fault fault = cache_.fault();
  if (fault.what == 0) return;
  throw Error(
      "{} is {} at layer {}, sequence {}, {} head {}, position {}, channel {}: a cache takes "
      "finite "
      "numbers up to 2^58; check the model or the trace that it comes from",
      fault.what == SIKV_FAULT_K   ? "K"
      : fault.what == SIKV_FAULT_V ? "V"
                                   : "q",
      fault.value, fault.layer, fault.sequence, fault.what == SIKV_FAULT_Q ? "query" : "KV",
      fault.head, fault.position, fault.channel);
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
  const sikv_cache_view view = cache_.host_view(selected_layer_);
  int32_t count = 0;
  device_.copy_out(&count, selection_.counts + row, sizeof count);
  std::vector<int32_t> slots;
  if (count != SIKV_SELECT_ALL) {
    slots.resize(static_cast<size_t>(count));
    device_.copy_out(slots.data(), selection_.slots + int64_t{row} * selection_.capacity,
                     slots.size() * sizeof(int32_t));
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

std::vector<float> Pipeline::decoded(int layer, int row, const CodecInstance& codec) const {
  const sikv_cache_view view = cache_.view(layer);
  const int32_t count = cache_.encoded_len(layer, row);
  if (count == 0) return {};
  std::vector<int32_t> all(static_cast<size_t>(count));
  std::iota(all.begin(), all.end(), 0);
  std::vector<float> rows(all.size() * static_cast<size_t>(shape_.head_dim));
  if (!device_.is_cuda()) {
    codec.decode({&view, row, 1, count, 0, all.data(), &count, rows.data()}, nullptr);
    return rows;
  }
  const DeviceBuffer slots(device_, all.size() * sizeof(int32_t));
  const DeviceBuffer length(device_, sizeof count), out(device_, rows.size() * sizeof(float));
  device_.copy_in(slots.as<>(), all.data(), slots.bytes());
  device_.copy_in(length.as<>(), &count, sizeof count);
  codec.decode(
      {&view, row, 1, count, 0, slots.as<int32_t>(), length.as<int32_t>(), out.as<float>()},
      device_.stream());
  device_.copy_out(rows.data(), out.as<>(), out.bytes());
  return rows;
}

Ledger Pipeline::ledger() const {
  Ledger ledger = cache_.ledger();
  ledger.add("selection", slots_.bytes() + counts_.bytes() + log_weights_.bytes() +
                              keep_slots_.bytes() + keep_counts_.bytes());
  ledger.add("workspace", workspace_.bytes());
  ledger.add("selector_state", composition_.selector().state_bytes());
  return ledger;
}

void Pipeline::check_storable(const char* what, int layer, const void* data, int heads) const {
  const int64_t per_sequence = int64_t{heads} * shape_.head_dim;
  for (int64_t i = 0; i < per_sequence * shape_.max_sequences; ++i) {
    const float x = sikv_load(data, shape_.dtype, i);
    if (std::abs(x) <= SIKV_LARGEST_ELEMENT) continue;
    throw Error(
        "{} of decode step {} holds {}: layer {}, sequence {}, head {}, channel {}; check the "
        "model or the trace that it comes from",
        what, step_,
        std::isfinite(x) ? fmt::format("{}, and a cache takes numbers up to 2^58", x)
                         : "a NaN or infinity",
        layer, i / per_sequence, i % per_sequence / shape_.head_dim, i % shape_.head_dim);
  }
}

size_t Pipeline::token_bytes(int heads) const {
  return static_cast<size_t>(heads) * static_cast<size_t>(shape_.head_dim) *
         static_cast<size_t>(sikv_dtype_bytes(shape_.dtype));
}

}  // namespace sikv
