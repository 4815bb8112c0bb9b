#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "plugins/sdk/scan_cost.h"
#include "plugins/sdk/select.h"
#include "plugins/sdk/state.h"
#include "selectors/oracle/oracle.h"

namespace sikv::oracle {
namespace {

double dot(const float* a, const float* b, int n) {
  double sum = 0.0;
  for (int i = 0; i < n; ++i) sum += static_cast<double>(a[i]) * b[i];
  return sum;
}

class Oracle : public Selector {
 public:
  explicit Oracle(const CreateArgs& args)
      : budget_(args.options.budget("budget")),
        shape_(args.shape),
        host_(args.host),
        key_bytes_(static_cast<size_t>(shape_.head_dim * sikv_dtype_bytes(shape_.dtype))),
        keys_(shape_) {}

  Plan plan() override { return {selection_capacity(budget_, shape_), 0}; }
  void begin_sequence(int sequence) override { keys_.reset(sequence); }
  void observe(const sikv_observe_args& args, const CacheView& view, Launch) override {
    keep(view.layer(), RowsView(args.keys), newly_encoded(args, view));
  }
  void observe_page(const sikv_observe_page_args& args, const CacheView& view, Launch) override {
    keep(view.layer(), RowsView(args.keys), newly_encoded(args, view));
  }

  // Everything in fp64: the ranking is the one the metrics are measured against.
  void run(const sikv_select_args& args, const CacheView& view, Launch) override {
    const QueryView queries(args.q, view, args.num_query_heads);
    parallel_for(host_, view.num_rows(), [&](int64_t i, int32_t) {
      const int row = static_cast<int>(i);
      const std::vector<double> mean = mean_probability(view, queries, row, args.scale);
      SelectionRow out(args.selection, row);
      select_top(mean, view.pinned_slots(row), budget_.tokens(view.length(row)), out);
      cost_.add(view.length(row) * static_cast<int64_t>(key_bytes_));
    });
  }

  uint64_t state_bytes() const override {
    uint64_t bytes = 0;
    for (const std::vector<uint8_t>& keys : keys_) bytes += keys.size();
    return bytes;
  }
  void counters(const std::function<void(std::string_view, double)>& push) const override {
    cost_.push(push);
  }

 private:
  // Copies by position, not by slot: slots move when tokens are evicted.
  void keep(int layer, const RowsView& exact, const std::vector<NewTokens>& encoded) {
    for (const NewTokens& rows : encoded) {
      std::vector<uint8_t>& keys = keys_.at(layer, rows.row);
      keys.resize(static_cast<size_t>(rows.first_position + rows.count) * key_bytes_);
      for (int t = 0; t < rows.count; ++t) {
        std::memcpy(keys.data() + static_cast<size_t>(rows.first_position + t) * key_bytes_,
                    exact.address(rows.sequence, t, rows.head), key_bytes_);
      }
    }
  }

  void load_key(const CacheView& view, int row, int slot, float* out) {
    const int position = view.position(row, slot);
    const std::vector<uint8_t>& keys = keys_.at(view.layer(), row);
    if (static_cast<size_t>(position + 1) * key_bytes_ > keys.size()) {
      throw PluginBug("no exact key of position " + std::to_string(position) + " was observed");
    }
    load_floats(keys.data(), shape_.dtype, int64_t{position} * shape_.head_dim, shape_.head_dim,
                out);
  }

  // [encoded_len]: mean over the group's heads of each head's exact softmax over all tokens.
  std::vector<double> mean_probability(const CacheView& view, const QueryView& queries, int row,
                                       double scale) {
    const int group = queries.group(), dim = view.head_dim();
    const int encoded = view.encoded_len(row), tail = view.tail_len(row / view.num_kv_heads());
    const auto tokens = static_cast<size_t>(encoded + tail);
    std::vector<float> q(static_cast<size_t>(group * dim)), key(static_cast<size_t>(dim));
    queries.load_group(row, q.data());

    std::vector<double> logits(static_cast<size_t>(group) * tokens);
    for (size_t t = 0; t < tokens; ++t) {
      if (const int slot = static_cast<int>(t); slot < encoded) {
        load_key(view, row, slot, key.data());
      } else {
        view.load_tail_k(row, slot - encoded, key.data());
      }
      for (int g = 0; g < group; ++g) {
        logits[static_cast<size_t>(g) * tokens + t] =
            scale * dot(q.data() + g * dim, key.data(), dim);
      }
    }

    std::vector<double> mean(static_cast<size_t>(encoded));
    for (int g = 0; g < group; ++g) {
      double* p = logits.data() + static_cast<size_t>(g) * tokens;
      double max = -std::numeric_limits<double>::infinity(), sum = 0.0;
      for (size_t t = 0; t < tokens; ++t) max = std::max(max, p[t]);
      for (size_t t = 0; t < tokens; ++t) sum += p[t] = std::exp(p[t] - max);
      for (size_t t = 0; t < mean.size(); ++t) mean[t] += p[t] / sum / group;
    }
    return mean;
  }

  Budget budget_;
  sikv_shape shape_;
  const sikv_host& host_;
  size_t key_bytes_;
  RowState<std::vector<uint8_t>> keys_;  // [positions, D] in the input type
  ScanCost cost_;
};

}  // namespace

std::unique_ptr<Selector> make_ref(const CreateArgs& args) {
  return std::make_unique<Oracle>(args);
}

}  // namespace sikv::oracle
