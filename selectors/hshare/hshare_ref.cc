#include <algorithm>
#include <cmath>
#include <numeric>
#include <vector>

#include "kernels/common/channels_option.h"
#include "kernels/common/sharing_counts.h"
#include "plugins/sdk/prompt_queries.h"
#include "plugins/sdk/select.h"
#include "plugins/sdk/state.h"
#include "selectors/hshare/hshare.h"
#include "selectors/hshare/hshare_map.h"

namespace sikv::hshare {
namespace {

// Of one (layer, sequence, KV head).
struct HeadState {
  std::vector<int32_t> channels;            // ascending
  ChannelPages labels;                      // these channels of every key, as they are
  std::vector<std::vector<int32_t>> marks;  // per prompt query: its best slots, ascending
  int64_t step = -1;                        // of the list; none
  std::vector<int32_t> list;                // selected, best first, then the root's pinned slots
  std::vector<int32_t> selected;            // of the list, without those pinned here, ascending

  uint64_t bytes() const {
    uint64_t marked = 0;
    for (const std::vector<int32_t>& slots : marks) marked += slots.capacity();
    return labels.bytes() +
           (channels.capacity() + list.capacity() + selected.capacity() + marked) * sizeof(int32_t);
  }
};

// Of one sequence, once its prompt was seen.
struct Sources {
  std::vector<int> layer;              // [layers]
  std::vector<std::vector<int>> head;  // [layers][H]
};

class HShare : public Selector {
 public:
  HShare(const CreateArgs& args, const RowMath& math)
      : budget_(args.options.budget("budget")),
        channels_(channels_of(args)),
        period_(args.options.integer("period")),
        share_layers_(args.options.number("share_layers")),
        share_heads_(args.options.number("share_heads")),
        prompt_queries_(static_cast<int>(args.options.integer("prompt_queries"))),
        shape_(args.shape),
        host_(args.host),
        math_(math),
        all_(static_cast<size_t>(channels_)),
        heads_(shape_),
        sources_(static_cast<size_t>(shape_.max_sequences)),
        workers_(static_cast<size_t>(args.device.num_threads)),
        counts_(workers_.size()) {
    std::iota(all_.begin(), all_.end(), 0);
  }

  Plan plan() override { return {selection_capacity(budget_, shape_), 0}; }
  void begin_sequence(int sequence) override {
    heads_.reset(sequence);
    sources_[static_cast<size_t>(sequence)] = {};
  }

  void observe(const sikv_observe_args& args, const CacheView& view, Launch) override {
    const RowsView keys(args.keys);
    parallel_for(host_, view.num_rows(), [&](int64_t i, int at) {
      const int row = static_cast<int>(i);
      Worker& worker = workers_[static_cast<size_t>(at)];
      HeadState& head = heads_.at(view.layer(), row);
      const std::vector<float> queries = last_queries(args, row);
      choose_channels(keys, view, row, queries, head);
      for (const NewTokens& tokens : newly_encoded(args, view)) {
        if (tokens.row == row) append(keys, tokens, head);
      }
      mark(queries, args.prompt_len[row / view.num_kv_heads()], view, row, worker, head);
    });
  }
  void observe_page(const sikv_observe_page_args& args, const CacheView& view, Launch) override {
    const RowsView keys(args.keys);
    for (const NewTokens& tokens : newly_encoded(args, view)) {
      HeadState& head = heads_.at(view.layer(), tokens.row);
      append(keys, tokens, head);
      head.step = -1;  // the page's tokens have left the tail and are in no list
    }
  }
  void begin_step(int64_t step) override { step_ = step; }

  void run(const sikv_select_args& args, const CacheView& view, Launch) override {
    const QueryView queries(args.q, view, args.num_query_heads);
    for (int b = 0; b < view.num_sequences(); ++b) find_sources(b);
    std::vector<int> from(static_cast<size_t>(view.num_rows()));
    for (int row = 0; row < view.num_rows(); ++row) {
      from[static_cast<size_t>(row)] = static_cast<int>(source(view, row));
    }
    parallel_for(host_, view.num_rows(), [&](int64_t row, int at) {
      if (from[static_cast<size_t>(row)] != kSelf) return;
      const auto start = CountClock::now();
      search(view, queries, static_cast<int>(row), workers_[static_cast<size_t>(at)],
             counts_[static_cast<size_t>(at)]);
      counts_[static_cast<size_t>(at)].ran(false, seconds_since(start));
    });
    for (int row = 0; row < view.num_rows(); ++row) {
      const auto start = CountClock::now();
      const auto who = static_cast<From>(from[static_cast<size_t>(row)]);
      HeadState& head = heads_.at(view.layer(), row);
      if (who == kLayer || who == kHead) take(view, row, root(view, row, who).list, head);
      SelectionRow out(args.selection, row);
      out.clear();
      for (const int32_t slot : head.selected) out.push(slot);
      counts_[0].selected += static_cast<double>(head.selected.size());
      ++from_[who];
      if (who != kSelf) counts_[0].ran(true, seconds_since(start));
    }
  }

  uint64_t state_bytes() const override {
    uint64_t bytes = 0;
    for (const HeadState& head : heads_) bytes += head.bytes();
    return bytes;
  }
  void counters(const std::function<void(std::string_view, double)>& push) const override {
    const SharingCounts sum = sum_of(counts_);
    push("runs", sum.runs());
    push("scan_bytes", sum.scan_bytes);
    sum.push(push, false);
    push("from_step", from_[kStep]);
    push("from_layer", from_[kLayer]);
    push("from_head", from_[kHead]);
  }

 private:
  // Where a row's list comes from, the outermost first.
  enum From { kStep, kLayer, kHead, kSelf };
  struct Worker {
    std::vector<float> q, mean, label, scores;
    std::vector<int32_t> best;
  };

  // ---- prompt

  // The group's mean of the prompt's last queries, [n, D].
  std::vector<float> last_queries(const sikv_observe_args& args, int row) const {
    const PromptQueries queries(args, shape_.num_query_heads);
    const int n = std::min(queries.count(), prompt_queries_), dim = shape_.head_dim;
    const int group = shape_.num_query_heads / shape_.num_kv_heads;
    std::vector<float> out(static_cast<size_t>(n * dim)), heads(static_cast<size_t>(group * dim));
    for (int i = 0; i < n; ++i) {
      queries.load_group(row, n - i, heads.data());
      group_mean(heads.data(), group, dim, out.data() + static_cast<ptrdiff_t>(i) * dim);
    }
    return out;
  }

  // Those where |q| and |k| are largest together, by the prompt.
  void choose_channels(const RowsView& keys, const CacheView& view, int row,
                       const std::vector<float>& queries, HeadState& head) const {
    const auto dim = static_cast<size_t>(shape_.head_dim);
    const int b = row / view.num_kv_heads(), h = row % view.num_kv_heads();
    std::vector<double> q(dim), k(dim);
    for (size_t i = 0; i < queries.size(); ++i) q[i % dim] += std::abs(queries[i]);
    std::vector<float> key(dim);
    for (int t = 0; t < keys.count(b); ++t) {
      keys.load(b, t, h, shape_.head_dim, key.data());
      for (size_t d = 0; d < dim; ++d) k[d] += std::abs(key[d]);
    }
    for (size_t d = 0; d < dim; ++d) k[d] *= q[d];
    head.channels = largest_channels(k, channels_);
  }

  void append(const RowsView& keys, const NewTokens& tokens, HeadState& head) const {
    std::vector<float> key(static_cast<size_t>(shape_.head_dim)), label(head.channels.size());
    for (int t = 0; t < tokens.count; ++t) {
      keys.load(tokens.sequence, t, tokens.head, shape_.head_dim, key.data());
      for (size_t c = 0; c < label.size(); ++c) {
        label[c] = key[static_cast<size_t>(head.channels[c])];
      }
      head.labels.put(shape_.dtype, channels_, tokens.first_position + t, label.data());
    }
  }

  // What each of the prompt's last queries would select of the tokens before it.
  void mark(const std::vector<float>& queries, int prompt, const CacheView& view, int row,
            Worker& worker, HeadState& head) const {
    const int dim = shape_.head_dim, n = static_cast<int>(queries.size()) / dim;
    head.marks.assign(static_cast<size_t>(n), {});
    if (share_layers_ * shape_.num_layers < 1 && share_heads_ * shape_.num_kv_heads < 1) return;
    for (int i = 0; i < n; ++i) {
      const int end = std::min(view.encoded_len(row), prompt - n + i + 1);
      best_slots(view, row, queries.data() + static_cast<ptrdiff_t>(i) * dim, end, worker, head);
      head.marks[static_cast<size_t>(i)] = worker.best;
    }
  }

  // worker.best = the slots before `end` that q [D] selects, ascending, by worker.scores.
  void best_slots(const CacheView& view, int row, const float* q, int end, Worker& worker,
                  const HeadState& head) const {
    worker.best.clear();
    if (end <= 0) return;
    worker.label.resize(head.channels.size());
    for (size_t c = 0; c < head.channels.size(); ++c) worker.label[c] = q[head.channels[c]];
    const int64_t stride = score_room(end);
    worker.scores.resize(static_cast<size_t>(stride));
    math_.channel_logits({head.labels, all_, worker.label.data(), 1, end}, worker.scores.data(),
                         stride);
    const int64_t wanted = std::min<int64_t>(budget_.tokens(view.length(row)), end);
    worker.best.resize(static_cast<size_t>(wanted));
    int32_t count = 0;
    SelectionRow best({worker.best.data(), &count, static_cast<int32_t>(wanted), 0}, 0);
    math_.select({worker.scores.data(), static_cast<size_t>(end)}, view.pinned_slots(row), wanted,
                 best);
    worker.best.resize(static_cast<size_t>(count));
  }

  // The maps of a sequence, found at its first step and kept.
  void find_sources(int sequence) {
    Sources& sources = sources_[static_cast<size_t>(sequence)];
    if (!sources.layer.empty()) return;
    const int layers = shape_.num_layers, heads = shape_.num_kv_heads;
    const auto head_at = [&](int layer, int head) -> const HeadState& {
      return heads_.at(layer, sequence * heads + head);
    };
    const auto compare = [](int n, auto&& overlap_of) {
      std::vector<std::vector<double>> similarity(static_cast<size_t>(n));
      for (int i = 0; i < n; ++i) {
        for (int j = 0; j < n; ++j) {
          similarity[static_cast<size_t>(i)].push_back(j < i ? overlap_of(i, j) : 0.0);
        }
      }
      return similarity;
    };
    const auto by_layer = compare(share_layers_ > 0 ? layers : 0, [&](int i, int j) {
      double sum = 0.0;
      for (int h = 0; h < heads; ++h) sum += overlap(head_at(i, h), head_at(j, h));
      return sum;
    });
    sources.layer.resize(static_cast<size_t>(layers));
    std::iota(sources.layer.begin(), sources.layer.end(), 0);
    if (!by_layer.empty()) {
      sources.layer = greedy_sources(by_layer, static_cast<int>(share_layers_ * layers));
    }
    for (int l = 0; l < layers; ++l) {
      sources.head.push_back(greedy_sources(
          compare(heads, [&](int i, int j) { return overlap(head_at(l, i), head_at(l, j)); }),
          static_cast<int>(share_heads_ * heads)));
    }
    for (int l = 0; l < layers; ++l) {
      for (int h = 0; h < heads; ++h) heads_.at(l, sequence * heads + h).marks = {};
    }
  }

  // Slots that both marked for the same query.
  static double overlap(const HeadState& a, const HeadState& b) {
    double common = 0;
    for (size_t i = 0; i < std::min(a.marks.size(), b.marks.size()); ++i) {
      auto x = a.marks[i].begin(), y = b.marks[i].begin();
      while (x != a.marks[i].end() && y != b.marks[i].end()) {
        if (*x == *y)
          ++common, ++x, ++y;
        else if (*x < *y)
          ++x;
        else
          ++y;
      }
    }
    return common;
  }

  // ---- decode

  From source(const CacheView& view, int row) {
    const HeadState& own = heads_.at(view.layer(), row);
    if (own.step >= 0 && step_ > own.step && step_ - own.step < period_) return kStep;
    if (root(view, row, kLayer).step == step_ && &root(view, row, kLayer) != &own) return kLayer;
    return &root(view, row, kHead) != &own ? kHead : kSelf;
  }
  const HeadState& root(const CacheView& view, int row, From from) {
    const int heads = view.num_kv_heads(), b = row / heads, layer = view.layer();
    const Sources& sources = sources_[static_cast<size_t>(b)];
    if (from == kLayer) return heads_.at(sources.layer[static_cast<size_t>(layer)], row);
    return heads_.at(
        layer,
        b * heads + sources.head[static_cast<size_t>(layer)][static_cast<size_t>(row % heads)]);
  }

  void search(const CacheView& view, const QueryView& queries, int row, Worker& worker,
              SharingCounts& counts) {
    HeadState& head = heads_.at(view.layer(), row);
    const int dim = shape_.head_dim, encoded = view.encoded_len(row);
    worker.q.resize(static_cast<size_t>(queries.group() * dim));
    worker.mean.resize(static_cast<size_t>(dim));
    queries.load_group(row, worker.q.data());
    group_mean(worker.q.data(), queries.group(), dim, worker.mean.data());
    best_slots(view, row, worker.mean.data(), encoded, worker, head);
    head.selected = worker.best;
    rank(worker.scores, worker.best);
    head.list = worker.best;
    const auto pinned = view.pinned_slots(row);
    head.list.insert(head.list.end(), pinned.begin(), pinned.end());
    head.step = step_;
    counts.scan_bytes += static_cast<double>(encoded) * channels_ * sikv_dtype_bytes(shape_.dtype);
  }

  // Selects the first `budget` of another's list that are not pinned here.
  void take(const CacheView& view, int row, const std::vector<int32_t>& list,
            HeadState& head) const {
    const SlotDomain domain{0, view.encoded_len(row), view.pinned_slots(row)};
    const auto wanted = static_cast<size_t>(budget_.tokens(view.length(row)));
    head.list = list;
    head.step = step_;
    head.selected.clear();
    for (const int32_t slot : list) {
      if (head.selected.size() == wanted) break;
      if (domain.holds(slot)) head.selected.push_back(slot);
    }
    std::sort(head.selected.begin(), head.selected.end());
  }

  Budget budget_;
  int channels_;
  int64_t period_;
  double share_layers_, share_heads_;
  int prompt_queries_;
  sikv_shape shape_;
  const sikv_host& host_;
  const RowMath& math_;
  std::vector<int32_t> all_;  // 0 .. channels - 1
  RowState<HeadState> heads_;
  std::vector<Sources> sources_;  // of each sequence
  std::vector<Worker> workers_;
  std::vector<SharingCounts> counts_;  // of each worker
  double from_[4] = {};                // runs by From
  int64_t step_ = 0;
};

}  // namespace

std::unique_ptr<Selector> make(const CreateArgs& args, const RowMath& math) {
  return std::make_unique<HShare>(args, math);
}

std::unique_ptr<Selector> make_ref(const CreateArgs& args) { return make(args, kRefRowMath); }

}  // namespace sikv::hshare
