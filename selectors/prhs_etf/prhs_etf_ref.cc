#include <algorithm>
#include <vector>

#include "kernels/common/exact_scores.h"
#include "kernels/common/frozen_prefix.h"
#include "kernels/common/index_sharing.h"
#include "plugins/sdk/scan_cost.h"
#include "plugins/sdk/select.h"
#include "selectors/prhs_etf/prhs_etf.h"

namespace sikv::prhs_etf {
namespace {

class Etf : public Selector {
 public:
  explicit Etf(const CreateArgs& args)
      : budget_(args.options.budget("budget")),
        frozen_(DepthPrefix::etf(args.options, args.shape.num_layers)),
        shape_(args.shape),
        host_(args.host),
        below_(static_cast<size_t>(shape_.max_sequences * shape_.num_kv_heads)),
        workers_(static_cast<size_t>(args.device.num_threads)) {}

  Plan plan() override { return {selection_capacity(budget_, shape_), 0}; }
  void begin_step(int64_t step) override { step_ = step; }

  void run(const sikv_select_args& args, const CacheView& view, Launch) override {
    const QueryView queries(args.q, view, args.num_query_heads);
    parallel_for(host_, view.num_rows(), [&](int64_t row, int worker) {
      select_row(args, view, queries, static_cast<int>(row), workers_[static_cast<size_t>(worker)]);
    });
  }

  uint64_t state_bytes() const override {
    uint64_t bytes = 0;
    for (const LayerBelow& below : below_) bytes += below.bytes();
    return bytes;
  }
  void counters(const std::function<void(std::string_view, double)>& push) const override {
    double runs = 0, scan_bytes = 0, frozen = 0, tokens = 0;
    for (const Worker& worker : workers_) {
      runs += worker.runs;
      scan_bytes += worker.scan_bytes;
      frozen += worker.frozen;
      tokens += worker.tokens;
    }
    push("runs", runs);
    push("scan_bytes", scan_bytes);
    push("frozen_tokens", frozen);
    push("tokens", tokens);
  }

 private:
  struct alignas(64) Worker {
    ScalarScorer scorer;
    std::vector<float> q, scores;
    std::vector<int32_t> best;
    double runs = 0, scan_bytes = 0;
    double frozen = 0, tokens = 0;  // encoded tokens that were frozen; all of them
  };

  // The best by exact scores of the live tokens and of what the layer below took of the frozen ones.
  void select_row(const sikv_select_args& args, const CacheView& view, const QueryView& queries,
                  int row, Worker& worker) {
    const int encoded = view.encoded_len(row), tail = view.tail_len(row / view.num_kv_heads());
    LayerBelow& below = below_[static_cast<size_t>(row)];
    int32_t live = 0;
    if (below.is_below(view.layer(), step_)) {
      const int64_t prefix = frozen_.tokens(view.layer(), sequence_length(view, row));
      live = first_slot_from(view, row, prefix);
    }
    std::vector<int32_t> slots = below.before(live, view.pinned_slots(row));
    const std::vector<int32_t> searched = SlotDomain{live, encoded, view.pinned_slots(row)}.all();
    slots.insert(slots.end(), searched.begin(), searched.end());

    worker.q.resize(static_cast<size_t>(queries.group() * view.head_dim()));
    queries.load_group(row, worker.q.data());
    worker.scorer.score({view, row, queries.group(), args.scale, worker.q.data(), slots, tail},
                        worker.scores);
    SelectionRow out(args.selection, row);
    out.clear();
    const int64_t wanted = budget_.tokens(view.length(row));
    if (wanted < std::ssize(slots)) {
      worker.scorer.best(worker.scores, wanted, worker.best);
      for (const int32_t i : worker.best) out.push(slots[static_cast<size_t>(i)]);
    } else {
      for (const int32_t slot : slots) out.push(slot);
    }
    below.keep(view.layer(), step_, out.slots(), view.pinned_slots(row));

    worker.runs += 1;
    worker.frozen += live;
    worker.tokens += encoded;
    worker.scan_bytes += static_cast<double>(row_key_bytes(view, row, std::ssize(slots)));
  }

  Budget budget_;
  DepthPrefix frozen_;
  sikv_shape shape_;
  const sikv_host& host_;
  std::vector<LayerBelow> below_;  // of each row
  std::vector<Worker> workers_;
  int64_t step_ = 0;
};

}  // namespace

std::unique_ptr<Selector> make_ref(const CreateArgs& args) { return std::make_unique<Etf>(args); }

}  // namespace sikv::prhs_etf
