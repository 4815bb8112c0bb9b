#include <algorithm>
#include <vector>

#include "kernels/common/sharing_counts.h"
#include "plugins/sdk/scan_cost.h"
#include "plugins/sdk/select.h"
#include "plugins/sdk/state.h"
#include "selectors/prhs_cis/prhs_cis.h"

namespace sikv::prhs_cis {
namespace {

class Cis : public Selector {
 public:
  Cis(const CreateArgs& args, std::unique_ptr<RowScorer> (*make_scorer)())
      : budget_(args.options.budget("budget")),
        rule_(args.options),
        shape_(args.shape),
        host_(args.host),
        anchors_(shape_),
        counts_(static_cast<size_t>(args.device.num_threads)) {
    for (int i = 0; i < args.device.num_threads; ++i)
      workers_.push_back({make_scorer(), {}, {}, {}});
  }

  Plan plan() override {
    const int64_t most = rule_.most(selection_capacity(budget_, shape_));
    return {static_cast<int32_t>(std::min<int64_t>(most, shape_.max_tokens)), 0};
  }
  void begin_sequence(int sequence) override { anchors_.reset(sequence); }
  // The page's tokens have left the tail and are in no shared list; an eviction moves slots.
  void observe_page(const sikv_observe_page_args& args, const CacheView& view, Launch) override {
    for (const NewTokens& tokens : newly_encoded(args, view)) {
      anchors_.at(view.layer(), tokens.row).step = -1;
    }
  }
  void begin_step(int64_t step) override { step_ = step; }

  void run(const sikv_select_args& args, const CacheView& view, Launch) override {
    const QueryView queries(args.q, view, args.num_query_heads);
    parallel_for(host_, view.num_rows(), [&](int64_t row, int worker) {
      const auto start = CountClock::now();
      SharingCounts& counts = counts_[static_cast<size_t>(worker)];
      const bool shared = select_row(args, view, queries, static_cast<int>(row),
                                     workers_[static_cast<size_t>(worker)], counts);
      counts.ran(shared, seconds_since(start));
    });
  }

  uint64_t state_bytes() const override {
    uint64_t bytes = 0;
    for (const Anchor& anchor : anchors_) bytes += anchor.bytes();
    return bytes;
  }
  void counters(const std::function<void(std::string_view, double)>& push) const override {
    const SharingCounts sum = sum_of(counts_);
    push("runs", sum.runs());
    push("scan_bytes", sum.scan_bytes);
    sum.push(push, rule_.audit);
  }

 private:
  struct Worker {
    std::unique_ptr<RowScorer> scorer;
    std::vector<float> q, scores;
    std::vector<int32_t> best;
  };

  // Whether the anchor's list served.
  bool select_row(const sikv_select_args& args, const CacheView& view, const QueryView& queries,
                  int row, Worker& worker, SharingCounts& counts) {
    const int group = queries.group(), dim = view.head_dim();
    const int tail = view.tail_len(row / view.num_kv_heads());
    worker.q.resize(static_cast<size_t>(group * dim));
    queries.load_group(row, worker.q.data());
    Anchor& anchor = anchors_.at(view.layer(), row);
    const bool due = anchor.due(rule_, step_);
    SelectionRow out(args.selection, row);
    out.clear();
    ScoreRequest request{view, row, group, args.scale, worker.q.data(), {}, tail};
    if (anchor.serves(rule_, step_, worker.q.data(), group, dim)) {
      for (const int32_t slot : anchor.slots) out.push(slot);
      if (rule_.audit) counts.audit.add(audit_follower(*worker.scorer, request, anchor, true));
      counts.selected += static_cast<double>(anchor.slots.size());
      return true;
    }

    const SlotDomain domain{0, view.encoded_len(row), view.pinned_slots(row)};
    const std::vector<int32_t> slots = domain.all();
    request.slots = slots;
    worker.scorer->score(request, worker.scores);
    counts.scan_bytes += static_cast<double>(row_key_bytes(view, row, std::ssize(slots)));
    const int64_t wanted = budget_.tokens(view.length(row));
    if (wanted < std::ssize(slots)) {
      worker.scorer->best(worker.scores, wanted, worker.best);
    } else {
      worker.best.resize(slots.size());
      std::iota(worker.best.begin(), worker.best.end(), 0);
    }
    for (const int32_t i : worker.best) out.push(slots[static_cast<size_t>(i)]);
    counts.selected += static_cast<double>(worker.best.size());
    if (due || rule_.reanchor) {
      rank(worker.scores, worker.best);
      for (int32_t& i : worker.best) i = slots[static_cast<size_t>(i)];
      anchor.set(rule_, step_, tail, worker.q, worker.best, domain);
    }
    return false;
  }

  Budget budget_;
  SharingRule rule_;
  sikv_shape shape_;
  const sikv_host& host_;
  RowState<Anchor> anchors_;
  std::vector<SharingCounts> counts_;  // of each worker
  std::vector<Worker> workers_;
  int64_t step_ = 0;
};

}  // namespace

std::unique_ptr<Selector> make_selector(const CreateArgs& args,
                                        std::unique_ptr<RowScorer> (*make_scorer)()) {
  return std::make_unique<Cis>(args, make_scorer);
}

}  // namespace sikv::prhs_cis
