#include <algorithm>
#include <numeric>
#include <string>
#include <vector>

#include "kernels/common/exact_scores.h"
#include "kernels/common/frozen_prefix.h"
#include "kernels/common/sharing_counts.h"
#include "plugins/sdk/scan_cost.h"
#include "plugins/sdk/state.h"
#include "selectors/prhs/prhs.h"

namespace sikv::prhs {
namespace {

class Prhs : public WrappingSelector {
 public:
  explicit Prhs(const CreateArgs& args)
      : WrappingSelector(args),
        rule_(args.options),
        window_(DepthPrefix::psaw(args.options, args.shape.num_layers)),
        frozen_(DepthPrefix::etf(args.options, args.shape.num_layers)),
        shape_(args.shape),
        host_(args.host),
        anchors_(shape_),
        below_(static_cast<size_t>(shape_.max_sequences * shape_.num_kv_heads)),
        shared_(below_.size()),
        workers_(static_cast<size_t>(args.device.num_threads)) {
    if (base_.selects_all() && base_.evicts()) {
      throw Refused(
          "'" + std::string(args.options.base()) +
          "' evicts, and what is left is attended to as a whole: wrap one that chooses in "
          "every step, such as quest");
    }
    if (base_.selects_all()) {
      throw Refused(
          "prhs shares what its base chooses, and this base takes every token: choose one with a "
          "budget, such as quest");
    }
  }

  Plan plan() override {
    Plan plan = base_.plan();
    base_capacity_ = plan.capacity;
    plan.capacity =
        static_cast<int32_t>(std::min<int64_t>(rule_.most(plan.capacity), shape_.max_tokens));
    return plan;
  }
  void begin_sequence(int sequence) override {
    anchors_.reset(sequence);
    WrappingSelector::begin_sequence(sequence);
  }
  // The page's tokens have left the tail and are in no shared list; an eviction moves slots.
  void observe_page(const sikv_observe_page_args& args, const CacheView& view,
                    Launch launch) override {
    for (const NewTokens& tokens : newly_encoded(args, view)) {
      anchors_.at(view.layer(), tokens.row).step = -1;
    }
    WrappingSelector::observe_page(args, view, launch);
  }
  void begin_step(int64_t step) override {
    step_ = step;
    WrappingSelector::begin_step(step);
  }

  // The base searches for all rows of a layer or for none; rows that share keep their list.
  void run(const sikv_select_args& args, const CacheView& view, Launch launch) override {
    const QueryView queries(args.q, view, args.num_query_heads);
    const auto start = CountClock::now();
    bool search = false;
    for (int row = 0; row < view.num_rows(); ++row) {
      load(queries, row, workers_[0]);
      const bool shared =
          anchors_.at(view.layer(), row)
              .serves(rule_, step_, workers_[0].q.data(), queries.group(), view.head_dim());
      shared_[static_cast<size_t>(row)] = shared;
      search = search || !shared;
    }
    if (search) base_.run(args, launch);
    parallel_for(host_, view.num_rows(), [&](int64_t i, int at) {
      const int row = static_cast<int>(i);
      Worker& worker = workers_[static_cast<size_t>(at)];
      load(queries, row, worker);
      SelectionRow out(args.selection, row);
      const bool shared = shared_[static_cast<size_t>(row)];
      const ScoreRequest request{view,
                                 row,
                                 queries.group(),
                                 args.scale,
                                 worker.q.data(),
                                 {},
                                 view.tail_len(row / view.num_kv_heads())};
      if (shared) {
        take_over(request, worker, out);
      } else {
        compose(request, worker, out);
      }
      worker.counts.ran(shared, 0.0);
      if (out.all()) return;
      worker.counts.selected += static_cast<double>(out.slots().size());
      below_[static_cast<size_t>(row)].keep(view.layer(), step_, out.slots(),
                                            view.pinned_slots(row));
    });
    calls_ += 1;
    base_calls_ += search;
    (search ? workers_[0].counts.search_s : workers_[0].counts.reuse_s) += seconds_since(start);
  }

  uint64_t state_bytes() const override {
    uint64_t bytes = base_.state_bytes();
    for (const Anchor& anchor : anchors_) bytes += anchor.bytes();
    for (const LayerBelow& below : below_) bytes += below.bytes();
    return bytes;
  }
  // The base's own, but for what both count.
  void counters(const std::function<void(std::string_view, double)>& push) const override {
    SharingCounts sum;
    for (const Worker& worker : workers_) sum.add(worker.counts);
    base_.counters([&](std::string_view name, double value) {
      if (name == "scan_bytes") {
        sum.scan_bytes += value;
      } else if (name != "runs") {
        push(name, value);
      }
    });
    push("runs", sum.runs());
    push("scan_bytes", sum.scan_bytes);
    push("layer_calls", calls_);
    push("base_calls", base_calls_);
    sum.push(push, rule_.audit);
  }

 private:
  struct alignas(64) Worker {
    ScalarScorer scorer;
    std::vector<float> q, scores;
    std::vector<int32_t> best;
    SharingCounts counts;
  };

  void load(const QueryView& queries, int row, Worker& worker) const {
    worker.q.resize(static_cast<size_t>(queries.group() * shape_.head_dim));
    queries.load_group(row, worker.q.data());
  }

  // Where the window begins. It moves on while a list is shared.
  int32_t first_slot(const CacheView& view, int row) const {
    return first_slot_from(view, row, window_.tokens(view.layer(), sequence_length(view, row)));
  }

  void take_over(const ScoreRequest& request, Worker& worker, SelectionRow& out) {
    const Anchor& anchor = anchors_.at(request.view.layer(), request.row);
    const int32_t first = first_slot(request.view, request.row);
    out.clear();
    for (const int32_t slot : anchor.slots) {
      if (slot >= first) out.push(slot);
    }
    // Of the list as it is shared; what the moving window cuts off is PSAW's.
    if (rule_.audit) {
      worker.counts.audit.add(audit_follower(worker.scorer, request, anchor, false));
    }
  }

  // Of what the base chose: nothing before the window, and of the frozen prefix only what the layer
  // below attended to. As many slots as the base took at most, the best by exact scores.
  void compose(const ScoreRequest& request, Worker& worker, SelectionRow& out) {
    const CacheView& view = request.view;
    const int row = request.row;
    const auto pinned = view.pinned_slots(row);
    const int32_t first = first_slot(view, row);
    const LayerBelow& below = below_[static_cast<size_t>(row)];
    int32_t live = 0;
    if (below.is_below(view.layer(), step_)) {
      live = first_slot_from(view, row, frozen_.tokens(view.layer(), sequence_length(view, row)));
    }
    if (out.all() && first == 0 && live == 0) return;

    const SlotDomain domain{first, view.encoded_len(row), pinned};
    std::vector<int32_t> chosen = out.all() ? SlotDomain{0, domain.end, pinned}.all()
                                            : std::vector(out.slots().begin(), out.slots().end());
    std::sort(chosen.begin(), chosen.end());
    const auto most = std::min<int64_t>(std::ssize(chosen), base_capacity_);
    std::vector<int32_t> slots = below.before(live, pinned);
    slots.insert(slots.end(), std::lower_bound(chosen.begin(), chosen.end(), live), chosen.end());
    slots.erase(slots.begin(), std::lower_bound(slots.begin(), slots.end(), first));

    Anchor& anchor = anchors_.at(view.layer(), row);
    const bool anchors = anchor.due(rule_, step_) || rule_.reanchor;
    const auto kept = std::min<int64_t>(std::ssize(slots), most);
    const bool centres = anchors && rule_.radius > 0 && rule_.centres(kept) > 0;
    worker.best.resize(slots.size());
    std::iota(worker.best.begin(), worker.best.end(), 0);
    if (centres || kept < std::ssize(slots)) {
      ScoreRequest scored = request;
      scored.slots = slots;
      worker.scorer.score(scored, worker.scores);
      worker.counts.scan_bytes += static_cast<double>(row_key_bytes(view, row, std::ssize(slots)));
      if (kept < std::ssize(slots)) worker.scorer.best(worker.scores, kept, worker.best);
    }
    out.clear();
    for (const int32_t i : worker.best) out.push(slots[static_cast<size_t>(i)]);
    if (!anchors) return;
    if (centres) rank(worker.scores, worker.best);
    for (int32_t& i : worker.best) i = slots[static_cast<size_t>(i)];
    anchor.set(rule_, step_, request.tail, worker.q, worker.best, domain);
  }

  SharingRule rule_;
  DepthPrefix window_, frozen_;
  sikv_shape shape_;
  const sikv_host& host_;
  RowState<Anchor> anchors_;
  std::vector<LayerBelow> below_;  // of each row
  std::vector<char> shared_;       // of each row, in this run
  std::vector<Worker> workers_;
  int32_t base_capacity_ = 0;
  int64_t step_ = 0;
  double calls_ = 0, base_calls_ = 0;
};

}  // namespace

std::unique_ptr<ScoringSelector> make_ref(const CreateArgs& args) {
  return std::make_unique<Prhs>(args);
}

}  // namespace sikv::prhs
