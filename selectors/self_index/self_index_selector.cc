// When a row is scanned, what its candidates are, and the state between steps.
//
// A row is scanned at its first step, then whenever its period has passed or its query has turned
// away from the last scanned one. What a scan finds, `rerank` budgets of slots, is its candidate
// pool until the next scan; slots encoded since then always belong to it. More candidates than the
// budget are rescored by every step's own query.

#include <algorithm>
#include <chrono>
#include <cmath>
#include <memory>
#include <numeric>
#include <optional>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "plugins/sdk/finite.h"
#include "plugins/sdk/scan_cost.h"
#include "plugins/sdk/select.h"
#include "plugins/sdk/state.h"
#include "selectors/self_index/self_index_engine.h"
#include "selectors/self_index/self_index_schedule.h"

namespace sikv::self_index {

namespace {

using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

// What a worker counted, on a cache line of its own.
struct alignas(64) Counts {
  double rows = 0, scans = 0, table_s = 0, scan_s = 0, pack_s = 0, rerank_s = 0;
  int64_t read = 0;  // bytes, in the step that is being counted
};

struct alignas(64) CacheLine {
  std::byte bytes[64];
};

// Of one (layer, sequence, KV head); used where candidates outlive a step.
struct HeadState {
  int period = 0;  // steps, chosen by schedule auto; 0: scan_every
  bool scanned = false;
  int64_t next_scan = 0;           // step
  int32_t scanned_len = 0;         // slots there were at the last scan
  std::vector<int32_t> pool;       // what it found, ascending
  PackedKeys packed;               // the pool's keys, where they are ranked more than once
  std::vector<float> scan_query;   // [D] its group-mean query; both only with refresh_cosine
  std::vector<float> prompt_mean;  // [D] of the window's queries over positions and heads

  uint64_t bytes() const {
    return sizeof(HeadState) + pool.capacity() * sizeof(int32_t) + packed.bytes() +
           (scan_query.capacity() + prompt_mean.capacity()) * sizeof(float);
  }
};

// Scratch of one row's step.
struct StepScratch {
  StepScratch(Arena& arena, const Limits& limits, const Config& config)
      : heads(arena.take<float>(int64_t{limits.group} * limits.head_dim)),
        mean(arena.take<float>(limits.head_dim)),
        candidates(arena.take<int32_t>(limits.candidates)) {
    tables.sets = config.group == Group::kMean ? 1 : limits.group;
    tables.groups = limits.head_dim / 4;
    tables.six_bit = config.six_bit;
    const int64_t entries = int64_t{tables.sets} * tables.groups * 16;
    tables.exact = arena.take<float>(entries);
    tables.quantised = arena.take<uint8_t>(entries);
    tables.scales = arena.take<TableScale>(tables.sets);
  }

  float* heads;         // [G, D]
  float* mean;          // [D]
  int32_t* candidates;  // [limits.candidates]
  IndexTables tables;
};

// cos(query - mean, scanned - mean) < threshold. Without a direction there is no turn.
bool has_turned(const float* query, const HeadState& state, int head_dim, double threshold) {
  double dot = 0.0, query_norm = 0.0, scan_norm = 0.0;
  for (int d = 0; d < head_dim; ++d) {
    const double now = double{query[d]} - state.prompt_mean[d];
    const double then = double{state.scan_query[d]} - state.prompt_mean[d];
    dot += now * then;
    query_norm += now * now;
    scan_norm += then * then;
  }
  return dot < threshold * std::sqrt(query_norm * scan_norm);
}

class SelfIndex final : public Selector {
 public:
  SelfIndex(const CreateArgs& args, const Config& config, std::unique_ptr<Engine> engine)
      : config_(config),
        engine_(std::move(engine)),
        shape_(args.shape),
        host_(args.host),
        num_workers_(std::max(args.device.num_threads, 1)),
        capacity_(selection_capacity(config.budget, args.shape)),
        counts_(num_workers_) {
    limits_.head_dim = shape_.head_dim;
    limits_.group = args.group();
    limits_.tokens = shape_.max_tokens;
    limits_.scanned = std::min(limits_.tokens, config_.candidates(capacity_));
    limits_.candidates = config_.pooled() ? limits_.tokens : limits_.scanned;
    Arena counting(nullptr);
    StepScratch(counting, limits_, config_);
    step_bytes_ = counting.used();
    worker_bytes_ = step_bytes_ + engine_->scratch_bytes(limits_);
    if (config_.pooled()) states_.emplace(shape_);
  }

  void accepts(const LayoutView& layout) override { check_layout(layout, config_); }

  Plan plan() override { return {capacity_, num_workers_ * worker_bytes_}; }

  void begin_sequence(int sequence) override {
    if (states_) states_->reset(sequence);
  }

  void observe(const sikv_observe_args& args, const CacheView& view, Launch) override {
    if (!config_.auto_schedule && !config_.refreshes()) return;
    const RowsView keys(args.keys);
    // Not run's workspace: a replay also keeps the candidates of every period.
    Arena counting(nullptr);
    ReplayScratch(counting, limits_);
    const size_t replay_bytes = counting.used();
    std::vector<std::vector<CacheLine>> lines(num_workers_);
    parallel_for(host_, view.num_rows(), [&](int64_t i, int worker) {
      const int row = static_cast<int>(i);
      if (keys.count(row / view.num_kv_heads()) == 0) return;
      HeadState& state = states_->at(view.layer(), row);
      const PromptQueries queries(args, view, shape_.num_query_heads, row, config_.window);
      if (config_.refreshes()) learn_mean(queries, state);
      if (!config_.auto_schedule) return;
      lines[worker].resize((worker_bytes_ + replay_bytes) / sizeof(CacheLine));
      std::byte* scratch = lines[worker].front().bytes;
      Arena step_arena(scratch), replay_arena(scratch + worker_bytes_);
      StepScratch step(step_arena, limits_, config_);
      const ReplayScratch replay_scratch(replay_arena, limits_);
      state.period = longest_period(replay(*engine_, config_, queries, keys, view, row, step.tables,
                                           replay_scratch, scratch + step_bytes_),
                                    config_.tolerance);
    });
  }

  void begin_step(int64_t step) override { step_ = step; }

  void run(const sikv_select_args& args, const CacheView& view, Launch launch) override {
    const QueryView queries(args.q, view, args.num_query_heads);
    // Rows whose scan is due cost several times the others: begun last, one would be waited for.
    order_.resize(static_cast<size_t>(view.num_rows()));
    std::iota(order_.begin(), order_.end(), 0);
    std::stable_partition(order_.begin(), order_.end(), [&](int row) {
      return !states_ || step_ >= states_->at(view.layer(), row).next_scan;
    });
    parallel_for(host_, view.num_rows(), [&](int64_t i, int worker) {
      std::byte* scratch = static_cast<std::byte*>(launch.workspace) + worker * worker_bytes_;
      counts_[worker].read = 0;
      select_row(args, view, queries, order_[static_cast<size_t>(i)], scratch, counts_[worker]);
      cost_.add(counts_[worker].read);
    });
  }

  uint64_t state_bytes() const override {
    uint64_t bytes = 0;
    if (states_) {
      for (const HeadState& state : *states_) bytes += state.bytes();
    }
    return bytes;
  }

  void counters(const std::function<void(std::string_view, double)>& push) const override {
    Counts sum;
    for (const Counts& counts : counts_) {
      sum.rows += counts.rows;
      sum.scans += counts.scans;
      sum.table_s += counts.table_s;
      sum.scan_s += counts.scan_s;
      sum.pack_s += counts.pack_s;
      sum.rerank_s += counts.rerank_s;
    }
    push("rows", sum.rows);
    push("scans", sum.scans);
    push("table_s", sum.table_s);
    push("scan_s", sum.scan_s);
    push("pack_s", sum.pack_s);
    push("rerank_s", sum.rerank_s);
    cost_.push(push);
  }

 private:
  void learn_mean(const PromptQueries& queries, HeadState& state) const {
    std::vector<double> sum(shape_.head_dim);
    std::vector<float> heads(static_cast<size_t>(queries.group()) * shape_.head_dim);
    for (int i = 0; i < queries.count(); ++i) {
      queries.load(i, heads.data());
      for (size_t j = 0; j < heads.size(); ++j) sum[j % sum.size()] += heads[j];
    }
    state.prompt_mean.clear();
    const int64_t n = int64_t{std::max(queries.count(), 1)} * queries.group();
    for (double x : sum)
      state.prompt_mean.push_back(static_cast<float>(x / static_cast<double>(n)));
  }

  bool is_due(const HeadState& state, const float* mean) const {
    return !state.scanned || step_ >= state.next_scan ||
           (config_.refreshes() &&
            has_turned(mean, state, shape_.head_dim, config_.refresh_cosine));
  }

  int64_t period(const HeadState& state) const {
    return state.period > 0 ? state.period : config_.scan_every;
  }

  // Staggered, the first period is cut short so that head j of the model's KV heads, counted layer
  // by layer, scans where (step + j) mod period = 0; later ones keep the phase.
  int64_t next_scan(const HeadState& state, int layer, int row) const {
    const int64_t period = this->period(state);
    if (!config_.stagger || state.scanned) return step_ + period;
    const int64_t j = int64_t{layer} * shape_.num_kv_heads + row % shape_.num_kv_heads;
    return step_ + period - (step_ + j) % period;
  }

  void load_queries(const CacheView& view, const QueryView& queries, int row, float* heads) const {
    const int head_dim = shape_.head_dim, sequence = row / view.num_kv_heads();
    queries.load_group(row, heads);
    for (int g = 0; g < queries.group(); ++g) {
      const float* head = heads + int64_t{g} * head_dim;
      if (std::all_of(head, head + head_dim, is_storable)) continue;
      const int number = row % view.num_kv_heads() * queries.group() + g;
      refuse_row(head, head_dim, "Q",
                 {view.layer(), sequence, view.num_sequences(), number, view.length(row) - 1});
    }
  }

  // The pool and the slots encoded since it was made, ascending.
  int64_t candidates_since(const HeadState& state, const CacheView& view, int row,
                           int32_t* candidates) const {
    int32_t* end = std::copy(state.pool.begin(), state.pool.end(), candidates);
    const auto pinned = view.pinned_slots(row);
    auto next = std::lower_bound(pinned.begin(), pinned.end(), state.scanned_len);
    for (int32_t slot = state.scanned_len; slot < view.encoded_len(row); ++slot) {
      if (next != pinned.end() && *next == slot) {
        ++next;
      } else {
        *end++ = slot;
      }
    }
    return end - candidates;
  }

  // What a scan reads of a row.
  int64_t index_bytes(const CacheView& view, int row) const {
    const LayoutView& layout = view.key().layout();
    const auto bytes = [&](sikv_role role) {
      return plane_bytes(layout.raw().planes[layout.plane(role)], view.encoded_len(row));
    };
    return bytes(SIKV_INDEX_CODE) + (config_.norm_weighting ? bytes(SIKV_SCALE) : 0);
  }

  // What ranking `count` candidates reads: copies where there are some, else the stored keys, and
  // the exact ones of pinned tokens and tail.
  int64_t rerank_bytes(const CacheView& view, int row, int64_t count,
                       const PackedKeys& packed) const {
    const int64_t exact =
        std::ssize(view.pinned_slots(row)) + view.tail_len(row / view.num_kv_heads());
    const int64_t copies =
        packed.count == 0
            ? 0
            : static_cast<int64_t>((packed.words.size() + packed.scales.size()) * sizeof(float));
    return copies + stored_bytes(view.key().layout().raw(), count - packed.count) +
           exact * shape_.head_dim * sikv_dtype_bytes(shape_.dtype);
  }

  void select_row(const sikv_select_args& args, const CacheView& view, const QueryView& queries,
                  int row, std::byte* scratch, Counts& counts) {
    Arena arena(scratch);
    StepScratch step(arena, limits_, config_);
    std::byte* engine_scratch = scratch + step_bytes_;
    load_queries(view, queries, row, step.heads);
    group_mean(step.heads, queries.group(), shape_.head_dim, step.mean);
    const int64_t budget = config_.budget.tokens(view.length(row));

    HeadState* state = states_ ? &states_->at(view.layer(), row) : nullptr;
    int64_t found = 0;
    if (state == nullptr || is_due(*state, step.mean)) {
      Clock::time_point start = Clock::now();
      build_tables(view, row, step.heads, step.mean, step.tables);
      counts.table_s += seconds_since(start);
      start = Clock::now();
      found = engine_->scan(view, row, step.tables, config_.candidates(budget), engine_scratch,
                            step.candidates);
      counts.scan_s += seconds_since(start);
      counts.scans += 1;
      counts.read += index_bytes(view, row);
      if (state != nullptr) {
        state->pool.assign(step.candidates, step.candidates + found);
        start = Clock::now();
        if (found > budget && period(*state) > 1) {
          engine_->pack(view, row, state->pool, state->packed);
          counts.read += stored_bytes(view.key().layout().raw(), state->packed.count);
        } else {
          state->packed.count = 0;
        }
        counts.pack_s += seconds_since(start);
        state->scanned_len = view.encoded_len(row);
        state->next_scan = next_scan(*state, view.layer(), row);
        state->scanned = true;
        if (config_.refreshes()) {
          state->scan_query.assign(step.mean, step.mean + shape_.head_dim);
          state->prompt_mean.resize(shape_.head_dim);  // zeros if no prompt was observed
        }
      }
    } else {
      found = candidates_since(*state, view, row, step.candidates);
    }
    counts.rows += 1;

    SelectionRow selection(args.selection, row);
    if (found <= budget) {
      std::copy_n(step.candidates, found, selection.storage().data());
      selection.set_count(static_cast<int32_t>(found));
      return;
    }
    const Clock::time_point start = Clock::now();
    const RowQuery query{view, row, queries.group(), args.scale, step.heads, step.mean};
    const PackedKeys none;
    const PackedKeys& packed = state != nullptr ? state->packed : none;
    engine_->rerank(query,
                    {.slots = {step.candidates, static_cast<size_t>(found)}, .packed = packed},
                    budget, engine_scratch, selection.storage().data());
    selection.set_count(static_cast<int32_t>(budget));
    counts.read += rerank_bytes(view, row, found, packed);
    counts.rerank_s += seconds_since(start);
  }

  Config config_;
  std::unique_ptr<Engine> engine_;
  sikv_shape shape_;
  const sikv_host& host_;
  int num_workers_;
  int32_t capacity_;
  Limits limits_{};
  size_t step_bytes_ = 0, worker_bytes_ = 0;
  int64_t step_ = 0;
  std::optional<RowState<HeadState>> states_;  // where pooled
  std::vector<Counts> counts_;
  ScanCost cost_;
  std::vector<int> order_;  // rows of one run
};

}  // namespace

std::unique_ptr<Selector> make_selector(const CreateArgs& args, const Config& config,
                                        std::unique_ptr<Engine> engine) {
  return std::make_unique<SelfIndex>(args, config, std::move(engine));
}

}  // namespace sikv::self_index
