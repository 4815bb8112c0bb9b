#include <algorithm>
#include <limits>

#include "kernels/common/gaussian_directions.h"
#include "kernels/common/sign_codes.h"
#include "plugins/sdk/scan_cost.h"
#include "plugins/sdk/select.h"
#include "plugins/sdk/state.h"
#include "selectors/magicpig/magicpig.h"

namespace sikv::magicpig {
namespace {

struct Row {
  std::vector<float> center;  // [D] mean key of the prompt
  Tables tables;

  uint64_t bytes() const { return center.size() * sizeof(float) + tables.bytes(); }
};

// Several times what the published settings take.
constexpr int64_t kMostEmptyBytes = int64_t{16} << 20;

class MagicPig : public Selector {
 public:
  explicit MagicPig(const CreateArgs& args)
      : bits_(static_cast<int>(args.options.integer("bits"))),
        tables_(static_cast<int>(args.options.integer("tables"))),
        epsilon_(args.options.number("epsilon")),
        fit_tokens_(args.options.integer("fit_tokens")),
        shape_(args.shape),
        host_(args.host),
        planes_(gaussian_directions(static_cast<uint64_t>(args.options.integer("seed")),
                                    int64_t{shape_.head_dim} * bits_ * tables_)),
        rows_(shape_) {
    if (const int64_t bytes = Tables::empty_bytes(bits_, tables_); bytes > kMostEmptyBytes) {
      throw Refused("the empty tables of each layer and KV head would take " +
                    std::to_string(bytes >> 20) + " MiB with bits " + std::to_string(bits_) +
                    " and tables " + std::to_string(tables_) + ", and at most " +
                    std::to_string(kMostEmptyBytes >> 20) + " MiB are allowed: lower either");
    }
  }

  // A sample has no size that is known before.
  Plan plan() override { return {shape_.max_tokens, 0}; }
  void begin_sequence(int sequence) override { rows_.reset(sequence); }

  void observe(const sikv_observe_args& args, const CacheView& view, Launch) override {
    const RowsView keys(args.keys);
    const int dim = shape_.head_dim;
    for (int row = 0; row < view.num_rows(); ++row) {
      const int b = row / view.num_kv_heads(), h = row % view.num_kv_heads();
      int count = keys.count(b);
      if (count == 0) continue;
      if (fit_tokens_ > 0) count = static_cast<int>(std::min<int64_t>(count, fit_tokens_));
      std::vector<float> prompt(static_cast<size_t>(count * dim));
      for (int t = 0; t < count; ++t) keys.load(b, t, h, dim, prompt.data() + t * dim);
      rows_.at(view.layer(), row) = {mean_row(prompt.data(), count, dim), Tables(bits_, tables_)};
    }
    hash(view.layer(), keys, newly_encoded(args, view));
  }
  void observe_page(const sikv_observe_page_args& args, const CacheView& view, Launch) override {
    hash(view.layer(), RowsView(args.keys), newly_encoded(args, view));
  }

  void run(const sikv_select_args& args, const CacheView& view, Launch) override {
    const QueryView queries(args.q, view, args.num_query_heads);
    std::vector<Count> counts(static_cast<size_t>(view.num_rows()));
    parallel_for(host_, view.num_rows(), [&](int64_t row, int32_t) {
      counts[static_cast<size_t>(row)] = sample(args, view, queries, static_cast<int>(row));
    });
    for (const Count& count : counts) {
      scan_bytes_ += count.bytes;
      sampled_ += count.sampled;
    }
    runs_ += static_cast<double>(counts.size());
  }

  uint64_t state_bytes() const override {
    uint64_t bytes = 0;
    for (const Row& row : rows_) bytes += row.bytes();
    return bytes;
  }
  void counters(const std::function<void(std::string_view, double)>& push) const override {
    push("runs", runs_);
    push("scan_bytes", scan_bytes_);
    push("sampled", sampled_);
  }

 private:
  struct Count {
    double bytes = 0, sampled = 0;
  };

  // sides [L, K]: on which side of each hyperplane x lies, and how far.
  void project(const float* x, std::vector<float>& sides) const {
    sides.assign(static_cast<size_t>(bits_ * tables_), 0.0f);
    const float* plane = planes_.data();
    for (int d = 0; d < shape_.head_dim; ++d) {
      for (float& side : sides) side += x[d] * *plane++;
    }
  }

  void hash(int layer, const RowsView& keys, const std::vector<NewTokens>& encoded) {
    const auto dim = static_cast<size_t>(shape_.head_dim);
    parallel_for(host_, std::ssize(encoded), [&](int64_t i, int32_t) {
      const NewTokens& rows = encoded[static_cast<size_t>(i)];
      Row& row = rows_.at(layer, rows.row);
      if (row.tables.tokens() != rows.first_position) {
        throw PluginBug("position " + std::to_string(rows.first_position) + " follows " +
                        std::to_string(row.tables.tokens()) + " observed tokens");
      }
      std::vector<float> key(dim), sides;
      for (int t = 0; t < rows.count; ++t) {
        keys.load(rows.sequence, t, rows.head, shape_.head_dim, key.data());
        for (size_t d = 0; d < dim; ++d) key[d] -= row.center[d];
        project(key.data(), sides);
        row.tables.push(sides.data());
      }
    });
  }

  // Lists what any head of the group has sampled, with each head's own weights.
  Count sample(const sikv_select_args& args, const CacheView& view, const QueryView& queries,
               int row) {
    SelectionRow out(args.selection, row);
    out.clear();
    const Row& state = rows_.at(view.layer(), row);
    if (state.tables.empty()) return {};
    const int group = queries.group(), dim = view.head_dim();
    std::vector<float> heads(static_cast<size_t>(group * dim)), sides;
    queries.load_group(row, heads.data());

    Count count;
    const auto tokens = static_cast<size_t>(state.tables.tokens());
    std::vector<uint8_t> collisions(static_cast<size_t>(group) * tokens);  // 2 stands for more
    for (int g = 0; g < group; ++g) {
      project(heads.data() + g * dim, sides);
      uint8_t* const head = collisions.data() + static_cast<size_t>(g) * tokens;
      state.tables.for_each_collision(sides.data(), [&](int32_t token) {
        head[token] = static_cast<uint8_t>(std::min(head[token] + 1, 2));
        count.bytes += sizeof(int32_t);
      });
      count.bytes += tables_ * sizeof(int32_t);
    }
    const auto sampled = [&](int g, int slot) {
      return collisions[static_cast<size_t>(g) * tokens +
                        static_cast<size_t>(view.position(row, slot))] == 2;
    };
    for_each_unpinned(view.encoded_len(row), view.pinned_slots(row), [&](int32_t slot) {
      for (int g = 0; g < group; ++g) {
        if (sampled(g, slot)) return out.push(slot);
      }
    });

    const auto slots = out.slots();
    std::vector<float> keys(slots.size() * static_cast<size_t>(dim));
    view.key().decode(row, slots, keys.data());
    for (size_t i = 0; i < slots.size(); ++i) {
      float* const key = keys.data() + i * static_cast<size_t>(dim);
      for (int d = 0; d < dim; ++d) key[d] -= state.center[static_cast<size_t>(d)];
      for (int g = 0; g < group; ++g) {
        const int64_t head = queries.first_head(row) + g;
        float& weight = args.log_weights[head * args.selection.capacity + static_cast<int64_t>(i)];
        weight = -std::numeric_limits<float>::infinity();
        if (!sampled(g, slots[i])) continue;
        const double u =
            sampling_probability(angle(heads.data() + g * dim, key, dim), bits_, tables_);
        weight = static_cast<float>(-std::log(u + epsilon_));
      }
    }
    count.bytes += static_cast<double>(stored_bytes(view.key().layout().raw(), std::ssize(slots)));
    count.sampled = static_cast<double>(slots.size());
    return count;
  }

  // Where a vector is zero, all its sides are positive, as those of nothing else: none is right.
  static double angle(const float* a, const float* b, int dim) {
    double ab = 0.0, aa = 0.0, bb = 0.0;
    for (int d = 0; d < dim; ++d) {
      ab += double{a[d]} * b[d];
      aa += double{a[d]} * a[d];
      bb += double{b[d]} * b[d];
    }
    const double norms = std::sqrt(aa) * std::sqrt(bb);
    return norms > 0.0 ? std::acos(std::clamp(ab / norms, -1.0, 1.0)) : std::numbers::pi / 2;
  }

  const int bits_, tables_;
  const double epsilon_;
  const int64_t fit_tokens_;
  const sikv_shape shape_;
  const sikv_host& host_;
  const std::vector<float> planes_;  // [D, L, K]
  RowState<Row> rows_;
  double runs_ = 0, scan_bytes_ = 0, sampled_ = 0;
};

}  // namespace

std::unique_ptr<Selector> make_ref(const CreateArgs& args) {
  return std::make_unique<MagicPig>(args);
}

}  // namespace sikv::magicpig
