#include "framework/experiment/measure.h"

#include <algorithm>
#include <cmath>

#include "framework/base/error.h"
#include "framework/base/progress.h"
#include "framework/config/pipeline_text.h"
#include "framework/device/parallel.h"
#include "framework/pipeline/bytes_read.h"

namespace sikv {
namespace {

// Rows of [B, T, heads, D] as fp32 [T, D] for one (sequence, head).
std::vector<float> head_rows(const std::vector<std::byte>& data, int32_t dtype, int sequence,
                             int head, int heads, int64_t tokens, int head_dim) {
  std::vector<float> rows(static_cast<size_t>(tokens * head_dim));
  for (int64_t t = 0; t < tokens; ++t) {
    const int64_t at = ((sequence * tokens + t) * heads + head) * head_dim;
    for (int d = 0; d < head_dim; ++d) {
      rows[static_cast<size_t>(t * head_dim + d)] = sikv_load(data.data(), dtype, at + d);
    }
  }
  return rows;
}

// Encoded rows of one (layer, row) as the codecs give them back; refreshed as pages are added.
struct StoredRows {
  int encoded = 0;
  std::vector<float> k, v;  // [encoded, D]
};

class Judge {
 public:
  Judge(const Pipeline& pipeline, const Source& source, ExactReference& exact, Device& device,
        const MeasureSpec& measure)
      : pipeline_(pipeline),
        source_(source),
        exact_(exact),
        device_(device),
        wants_kv_error_(wanted(measure, "kv_error")),
        stored_(source.layers.size() * static_cast<size_t>(rows())) {
    for (const char* metric :
         {"dropped_mass", "recall", "selection_error", "output_error", "kv_error"}) {
      if (wanted(measure, metric)) samples_[metric];
    }
  }

  // out [B, Hq, D] is what the kernel gave for this layer and step.
  void judge(int layer, int64_t step, const void* q, const float* out) {
    if (samples_.empty()) return;
    const auto& judged = source_.judged;
    if (std::find(judged.begin(), judged.end(), layer) == judged.end()) return;
    const auto& exact = exact_.at(layer, step);
    const sikv_cache_view view = pipeline_.cache().host_view(layer);
    // What lies on the device is fetched first, row by row.
    std::vector<std::vector<int32_t>> selections;
    for (int row = 0; row < rows(); ++row) {
      selections.push_back(pipeline_.selected(row));
      if (wants_kv_error_) refresh(layer, row, view);
    }
    const int64_t length = source_.prompt + step + 1;
    const auto budget = pipeline_.composition().budget(length);
    struct RowResult {
      SelectionQuality quality;
      double output_error, kv_error;
      double selected, exact;  // tokens attended to
    };
    std::vector<RowResult> results(static_cast<size_t>(rows()));
    parallel_for(device_, rows(), [&](int64_t i, int32_t) {
      const int row = static_cast<int>(i), b = row / source_.num_kv_heads;
      const ExactAttention& e = exact[static_cast<size_t>(row)];
      const auto selected = to_positions(view, row, selections[static_cast<size_t>(row)]);
      const int32_t* pinned = view.pinned_slots + int64_t{row} * view.pinned_capacity;
      const auto pins = to_positions(view, row, {pinned, pinned + view.pinned_len[row]});
      RowResult& result = results[static_cast<size_t>(row)];
      result.selected = static_cast<double>(selected.size());
      result.exact = static_cast<double>(pins.size()) + view.tail_len[b];
      result.quality = judge_selection(e, exact_.values(layer, row),
                                       {selected, pins, length - view.tail_len[b]}, budget);
      const size_t size = e.out.size();
      const int group = source_.num_query_heads / source_.num_kv_heads;
      const int64_t first =
          (int64_t{b} * source_.num_query_heads + int64_t{row % source_.num_kv_heads} * group) *
          source_.head_dim;
      result.output_error = relative_error(std::span<const float>(out + first, size), e.out);
      if (wants_kv_error_) result.kv_error = kv_error(layer, row, view, pins, q, first, e, length);
    });
    for (const RowResult& r : results) {
      push("dropped_mass", r.quality.dropped_mass);
      if (r.quality.recall) push("recall", *r.quality.recall);
      push("selection_error", r.quality.selection_error);
      push("output_error", r.output_error);
      push("kv_error", r.kv_error);
      attended_.add(r.selected, r.exact);
    }
  }

  const AttendedTokens& attended() const { return attended_; }

  std::map<std::string, Summary> summaries() const {
    std::map<std::string, Summary> all;
    for (const auto& [name, samples] : samples_) {
      if (samples.empty()) continue;
      all[name] = summarize(samples, name == "recall" ? BadSide::kLow : BadSide::kHigh);
    }
    return all;
  }

 private:
  static bool wanted(const MeasureSpec& measure, std::string_view metric) {
    return std::find(measure.metrics.begin(), measure.metrics.end(), metric) !=
           measure.metrics.end();
  }

  int rows() const { return source_.num_sequences * source_.num_kv_heads; }

  void push(const char* metric, double value) {
    const auto found = samples_.find(metric);
    if (found != samples_.end()) found->second.push_back(value);
  }

  static std::vector<int32_t> to_positions(const sikv_cache_view& view, int row,
                                           std::vector<int32_t> slots) {
    if (view.positions == nullptr) return slots;
    const int32_t* const positions =
        view.positions + int64_t{row} * view.max_pages * SIKV_PAGE_TOKENS;
    for (int32_t& slot : slots) slot = positions[slot];
    return slots;
  }

  // Output error with every encoded token as stored, pinned and tail exact. After evictions only
  // what is still there counts.
  double kv_error(int layer, int row, const sikv_cache_view& view, const std::vector<int32_t>& pins,
                  const void* q, int64_t first_query_element, const ExactAttention& exact,
                  int64_t length) {
    const size_t D = static_cast<size_t>(source_.head_dim);
    const StoredRows& stored = stored_[static_cast<size_t>(layer * rows() + row)];
    std::vector<float> k, v;
    for (int32_t slot = 0; slot < stored.encoded; ++slot) {
      const auto position = to_positions(view, row, {slot})[0];
      const bool is_pinned = std::binary_search(pins.begin(), pins.end(), position);
      const float* const from_k = is_pinned ? exact_.keys(layer, row) + size_t(position) * D
                                            : stored.k.data() + size_t(slot) * D;
      const float* const from_v = is_pinned ? exact_.values(layer, row) + size_t(position) * D
                                            : stored.v.data() + size_t(slot) * D;
      k.insert(k.end(), from_k, from_k + D);
      v.insert(v.end(), from_v, from_v + D);
    }
    const int64_t tail_from = length - view.tail_len[row / source_.num_kv_heads];
    for (int64_t t = tail_from; t < length; ++t) {
      const float* const tail_k = exact_.keys(layer, row) + size_t(t) * D;
      const float* const tail_v = exact_.values(layer, row) + size_t(t) * D;
      k.insert(k.end(), tail_k, tail_k + D);
      v.insert(v.end(), tail_v, tail_v + D);
    }
    std::vector<float> query(static_cast<size_t>(exact.group) * D);
    for (size_t i = 0; i < query.size(); ++i) {
      query[i] = sikv_load(q, source_.dtype, first_query_element + static_cast<int64_t>(i));
    }
    const auto all = exact_attention(query.data(), k.data(), v.data(), exact.group,
                                     source_.head_dim, static_cast<int64_t>(k.size() / D),
                                     1.0 / std::sqrt(static_cast<double>(D)));
    return relative_error(std::span<const double>(all.out), exact.out);
  }

  void refresh(int layer, int row, const sikv_cache_view& view) {
    StoredRows& stored = stored_[static_cast<size_t>(layer * rows() + row)];
    if (stored.encoded == view.encoded_len[row]) return;
    stored.encoded = view.encoded_len[row];
    stored.k = pipeline_.decoded(layer, row, pipeline_.composition().keys());
    stored.v = pipeline_.decoded(layer, row, pipeline_.composition().values());
  }

  const Pipeline& pipeline_;
  const Source& source_;
  ExactReference& exact_;
  Device& device_;
  bool wants_kv_error_;
  std::vector<StoredRows> stored_;
  std::map<std::string, std::vector<double>> samples_;
  AttendedTokens attended_;
};

// Of Measured::memory_per_token.
bool grows_with_context(std::string_view role) {
  constexpr std::string_view kOthers[] = {"tail", "pinned", "page_tables", "selection",
                                          "workspace"};
  return std::find(std::begin(kOthers), std::end(kOthers), role) == std::end(kOthers);
}

// Prompts of every sequence as the rows a prefill takes.
class PromptRows {
 public:
  explicit PromptRows(const Source& source) : source_(source) {
    for (int b = 0; b < source.num_sequences; ++b) {
      first_.push_back(static_cast<int32_t>(b * source.num_tokens));
      count_.push_back(static_cast<int32_t>(source.prompt));
    }
  }
  sikv_rows of(const std::vector<std::byte>& data) const {
    return {data.data(),     source_.dtype, static_cast<int32_t>(source_.prompt),
            first_.data(),   count_.data(), int64_t{source_.num_kv_heads} * source_.head_dim,
            source_.head_dim};
  }

 private:
  const Source& source_;
  std::vector<int32_t> first_, count_;
};

// One position of every sequence out of [B, positions, heads, D].
std::vector<std::byte> gather_position(const Source& source, const std::vector<std::byte>& data,
                                       int64_t positions, int64_t position, int heads) {
  const size_t bytes = static_cast<size_t>(heads) * static_cast<size_t>(source.head_dim) *
                       static_cast<size_t>(sikv_dtype_bytes(source.dtype));
  std::vector<std::byte> token(bytes * static_cast<size_t>(source.num_sequences));
  for (int b = 0; b < source.num_sequences; ++b) {
    const size_t from = static_cast<size_t>(b * positions + position) * bytes;
    std::copy_n(data.begin() + static_cast<int64_t>(from), bytes,
                token.begin() + static_cast<int64_t>(static_cast<size_t>(b) * bytes));
  }
  return token;
}

// The last `count` prompt queries of every sequence, [B, count, Hq, D].
std::vector<std::byte> prompt_queries(const Source& source, const SourceLayer& layer,
                                      int64_t count) {
  const size_t bytes = static_cast<size_t>(source.num_query_heads) *
                       static_cast<size_t>(source.head_dim) *
                       static_cast<size_t>(sikv_dtype_bytes(source.dtype));
  std::vector<std::byte> queries;
  for (int b = 0; b < source.num_sequences; ++b) {
    const auto from = layer.q.begin() + (b * source.num_queries + source.prompt_queries() - count) *
                                            static_cast<int64_t>(bytes);
    queries.insert(queries.end(), from, from + count * static_cast<int64_t>(bytes));
  }
  return queries;
}

}  // namespace

// ---- ExactReference -----------------------------------------------------------------------------

struct ExactReference::Impl {
  const Source& source;
  Device& device;
  uint64_t room;  // bytes that may still be cached
  struct Row {
    std::vector<float> k, v;
  };
  std::vector<std::vector<Row>> rows;  // by layer
  std::map<std::pair<int, int64_t>, std::vector<ExactAttention>> cached;
  std::vector<ExactAttention> last;  // when the cache is full
};

ExactReference::ExactReference(const Source& source, Device& device, uint64_t cache_bytes)
    : impl_(new Impl{source, device, cache_bytes, {}, {}, {}}) {
  const int H = source.num_kv_heads;
  for (const SourceLayer& layer : source.layers) {
    auto& rows = impl_->rows.emplace_back(static_cast<size_t>(source.num_sequences * H));
    parallel_for(device, static_cast<int64_t>(rows.size()), [&](int64_t row, int32_t) {
      const int b = static_cast<int>(row) / H, h = static_cast<int>(row) % H;
      auto& to = rows[static_cast<size_t>(row)];
      to.k = head_rows(layer.k, source.dtype, b, h, H, source.num_tokens, source.head_dim);
      to.v = head_rows(layer.v, source.dtype, b, h, H, source.num_tokens, source.head_dim);
    });
  }
}

ExactReference::~ExactReference() = default;

const float* ExactReference::keys(int layer, int row) const {
  return impl_->rows[static_cast<size_t>(layer)][static_cast<size_t>(row)].k.data();
}

const float* ExactReference::values(int layer, int row) const {
  return impl_->rows[static_cast<size_t>(layer)][static_cast<size_t>(row)].v.data();
}

const std::vector<ExactAttention>& ExactReference::at(int layer, int64_t step) {
  const auto found = impl_->cached.find({layer, step});
  if (found != impl_->cached.end()) return found->second;

  const Source& source = impl_->source;
  const auto q =
      gather_position(source, source.layers[static_cast<size_t>(layer)].q, source.num_queries,
                      source.prompt + step - source.first_query, source.num_query_heads);
  const int group = source.num_query_heads / source.num_kv_heads;
  std::vector<ExactAttention> rows(static_cast<size_t>(source.num_sequences * source.num_kv_heads));
  parallel_for(impl_->device, static_cast<int64_t>(rows.size()), [&](int64_t i, int32_t) {
    const int row = static_cast<int>(i), b = row / source.num_kv_heads;
    const int64_t at =
        (int64_t{b} * source.num_query_heads + int64_t{row % source.num_kv_heads} * group) *
        source.head_dim;
    std::vector<float> query(static_cast<size_t>(group * source.head_dim));
    for (size_t j = 0; j < query.size(); ++j) {
      query[j] = sikv_load(q.data(), source.dtype, at + static_cast<int64_t>(j));
    }
    rows[static_cast<size_t>(i)] =
        exact_attention(query.data(), keys(layer, row), values(layer, row), group, source.head_dim,
                        source.prompt + step + 1, 1.0 / std::sqrt(double(source.head_dim)));
  });
  const uint64_t bytes = rows.size() * rows[0].p.size() * sizeof(double);
  if (bytes > impl_->room) return impl_->last = std::move(rows);
  impl_->room -= bytes;
  return impl_->cached[{layer, step}] = std::move(rows);
}

// ---- measure_pipeline ---------------------------------------------------------------------------

Measured measure_pipeline(const PipelineSpec& spec, const Registry& registry, Device& device,
                          const Source& source, ExactReference& exact, const MeasureSpec& measure) {
  const int64_t steps = measure.steps == 0 ? source.steps - measure.warmup : measure.steps;
  if (steps < 1 || measure.warmup + steps > source.steps) {
    throw Error(
        "measure asks for {} warm-up and {} measured steps, but the source has {}: lower "
        "measure.warmup or measure.steps, or raise source.steps",
        measure.warmup, steps, source.steps);
  }
  Measured measured;
  measured.pipeline = pipeline_text(spec, registry);
  const int num_layers = static_cast<int>(source.layers.size());
  Pipeline pipeline(spec, registry, device, source.shape(), static_cast<int>(source.steps),
                    source.layer_numbers());
  const SelectorInstance& selector = pipeline.composition().selector();
  check_needs(selector, source.offer);
  const bool all_queries = (selector.table().flags & SIKV_SELECTOR_NEEDS_ALL_QUERIES) != 0;
  const int64_t num_queries = all_queries
                                  ? source.prompt_queries()
                                  : std::min<int64_t>(source.prompt_queries(), kPromptQueries);
  Judge judge(pipeline, source, exact, device, measure);
  Progress progress(measured.pipeline, num_layers + measure.warmup + steps);

  const PromptRows prompt(source);
  for (int l = 0; l < num_layers; ++l) {
    const SourceLayer& layer = source.layers[static_cast<size_t>(l)];
    const auto queries = prompt_queries(source, layer, num_queries);
    OutputProjection projection;
    if (!layer.w_o.empty()) {
      const auto rows = static_cast<size_t>(source.num_query_heads * source.head_dim);
      projection = {layer.w_o.data(), static_cast<int>(layer.w_o.size() / rows)};
    }
    pipeline.prefill(l, prompt.of(layer.k), prompt.of(layer.v), queries.data(),
                     static_cast<int>(num_queries), projection);
    progress.add();
  }
  Counters counters_before;
  const size_t outputs =
      static_cast<size_t>(source.num_sequences) * static_cast<size_t>(source.num_query_heads);
  std::vector<float> out(outputs * static_cast<size_t>(source.head_dim)), lse(outputs);
  for (int64_t step = 0; step < measure.warmup + steps; ++step) {
    if (step == measure.warmup) {
      pipeline.reset_steps();
      counters_before = counters_by_name(pipeline);
    }
    pipeline.begin_step();
    const int64_t position = source.prompt + step;
    for (int l = 0; l < num_layers; ++l) {
      const SourceLayer& layer = source.layers[static_cast<size_t>(l)];
      const auto k =
          gather_position(source, layer.k, source.num_tokens, position, source.num_kv_heads);
      const auto v =
          gather_position(source, layer.v, source.num_tokens, position, source.num_kv_heads);
      const auto q = gather_position(source, layer.q, source.num_queries,
                                     position - source.first_query, source.num_query_heads);
      pipeline.append(l, k.data(), v.data());
      pipeline.attend(l, q.data(), out.data(), lse.data());
      if (step >= measure.warmup) judge.judge(l, step, q.data(), out.data());
    }
    progress.add();
  }

  measured.budget = pipeline.composition().budget(source.prompt + measure.warmup + 1);
  for (const ChosenPart& part : pipeline.composition().parts()) {
    measured.variants.push_back({part.role, part.variant->id, part.variant->variant});
  }
  measured.metrics = judge.summaries();
  measured.bytes_per_token = pipeline.cache().bytes_per_token();
  const double dense_row = dense_row_bytes(source.head_dim);
  const double stored = pipeline.cache().bytes_per_stored_token();
  if (stored > 0) measured.compression = dense_row / stored;
  measured.ledger = pipeline.ledger();
  const double tokens = static_cast<double>(num_layers) * source.num_sequences *
                        source.num_kv_heads *
                        static_cast<double>(source.prompt + measure.warmup + steps);
  measured.compression_total = dense_row * tokens / static_cast<double>(measured.ledger.total());
  // By length and not by what is left, so that evicting shows.
  const int64_t length = source.prompt + measure.warmup + steps;
  const double heads = static_cast<double>(num_layers) * source.num_sequences * source.num_kv_heads;
  const int64_t encoded = length - pipeline.cache().tail_len(0, 0);
  double growing = 0;
  for (const LedgerLine& line : measured.ledger.lines()) {
    if (grows_with_context(line.role)) growing += static_cast<double>(line.bytes);
  }
  if (encoded > 0) measured.memory_per_token = growing / heads / static_cast<double>(encoded);
  // Of all layers, as the selector's bytes are.
  const AttendedTokens& attended = device.is_cuda() ? judge.attended() : pipeline.attended();
  measured.attended_bytes = attended_bytes(pipeline, attended);
  const AttendedTokens& judged = judge.attended().rows > 0 ? judge.attended() : attended;
  if (judged.rows > 0) measured.tokens_selected = judged.encoded / judged.rows;
  const StageTimes& times = pipeline.times();
  measured.prefill_s = {{"fit", times.fit}, {"encode", times.encode}, {"observe", times.observe}};
  for (const auto& [stage, samples] : times.steps) {
    measured.step_s[stage] = summarize(samples, BadSide::kHigh);
  }
  for (const auto& [name, value] : counters_by_name(pipeline)) {
    measured.counters[name] = value - counters_before[name];
  }
  measured.scan_bytes = scan_bytes(measured.counters);
  return measured;
}

}  // namespace sikv
