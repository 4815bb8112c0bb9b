// Scalar engine: the specification of what a row's step computes.

#include <algorithm>
#include <cmath>
#include <limits>
#include <span>
#include <vector>

#include "plugins/layouts/nibble_tile.h"
#include "plugins/layouts/rlm4_v1.h"
#include "plugins/sdk/select.h"
#include "selectors/self_index/self_index_engine.h"

namespace sikv::self_index {
namespace {

// Keys decoded at a time.
constexpr int64_t kChunk = 64;

double dot(const float* q, const float* k, int n) {
  double sum = 0.0;
  for (int d = 0; d < n; ++d) sum += double{q[d]} * k[d];
  return sum;
}

// select_top on an array of its own: `out` [n].
template <typename Score>
int64_t top(std::span<const Score> scores, std::span<const int32_t> pinned, int64_t count,
            int32_t* out) {
  int32_t written = 0;
  SelectionRow row({out, &written, static_cast<int32_t>(scores.size()), 0}, 0);
  select_top(scores, pinned, count, row);
  return written;
}

// The mean [n] of the heads' softmax over logits [G, n]; `others` [G, m] are logits that only take
// part in the normalisation.
std::vector<double> mean_softmax(std::span<const double> logits, std::span<const double> others,
                                 int group) {
  const size_t n = logits.size() / group, m = others.size() / group;
  std::vector<double> mean(n);
  for (int g = 0; g < group; ++g) {
    const auto row = logits.subspan(g * n, n), rest = others.subspan(g * m, m);
    double highest = -std::numeric_limits<double>::infinity(), total = 0.0;
    for (double x : row) highest = std::max(highest, x);
    for (double x : rest) highest = std::max(highest, x);
    for (double x : row) total += std::exp(x - highest);
    for (double x : rest) total += std::exp(x - highest);
    for (size_t i = 0; i < n; ++i) mean[i] += std::exp(row[i] - highest) / total / group;
  }
  return mean;
}

class RefEngine final : public Engine {
 public:
  explicit RefEngine(const Config& config) : config_(config) {}

  size_t scratch_bytes(const Limits&) const override { return 0; }

  int64_t scan(const CacheView& view, int row, const IndexTables& tables, int64_t count, std::byte*,
               int32_t* slots) const override {
    std::vector<float> scores(view.encoded_len(row));
    for (size_t slot = 0; slot < scores.size(); ++slot) {
      scores[slot] = index_score(view, row, tables, static_cast<int>(slot));
    }
    return top<float>(scores, view.pinned_slots(row), count, slots);
  }

  void rerank(const RowQuery& query, const Candidates& all, int64_t budget, std::byte*,
              int32_t* kept) const override {
    const std::span<const int32_t> candidates = all.slots;
    const CacheView& view = query.view;
    const int head_dim = view.head_dim();
    const int64_t n = candidates.size();
    const int64_t pinned = view.pinned_slots(query.row).size();
    const int64_t tail = view.tail_len(query.row / view.num_kv_heads());
    std::vector<float> keys(kChunk * head_dim);
    std::vector<double> logits(query.group * n), exact(query.group * (pinned + tail));
    const auto score = [&](const float* key, double* out, int64_t stride) {
      for (int g = 0; g < query.group; ++g) {
        out[g * stride] = query.scale * dot(query.heads + g * head_dim, key, head_dim);
      }
    };
    for (int64_t first = 0; first < n; first += kChunk) {
      const auto chunk = candidates.subspan(first, std::min(kChunk, n - first));
      view.key().decode(query.row, chunk, keys.data());
      for (size_t i = 0; i < chunk.size(); ++i) {
        score(keys.data() + i * head_dim, logits.data() + first + i, n);
      }
    }
    for (int64_t i = 0; i < pinned + tail; ++i) {
      if (i < pinned) {
        view.load_pinned_k(query.row, static_cast<int>(i), keys.data());
      } else {
        view.load_tail_k(query.row, static_cast<int>(i - pinned), keys.data());
      }
      score(keys.data(), exact.data() + i, pinned + tail);
    }
    const std::vector<double> probability = mean_softmax(logits, exact, query.group);
    std::vector<int32_t> best(n);
    const int64_t count = top<double>(probability, {}, budget, best.data());
    for (int64_t i = 0; i < count; ++i) kept[i] = candidates[best[i]];
  }

  void attend_prompt(const PromptQuery& query, int64_t count, std::byte*,
                     float* probability) const override {
    std::vector<float> key(query.head_dim);
    std::vector<double> logits(query.group * count);
    for (int64_t t = 0; t < count; ++t) {
      query.keys.load(query.sequence, static_cast<int>(t), query.head, query.head_dim, key.data());
      for (int g = 0; g < query.group; ++g) {
        logits[g * count + t] =
            query.scale * dot(query.heads + g * query.head_dim, key.data(), query.head_dim);
      }
    }
    std::ranges::copy(mean_softmax(logits, {}, query.group), probability);
  }

 private:
  float index_score(const CacheView& view, int row, const IndexTables& tables, int slot) const {
    const uint8_t* page = view.key().page(SIKV_INDEX_CODE, row, slot / kPageTokens);
    const int token = slot % kPageTokens;
    float best = 0.0f;
    for (int set = 0; set < tables.sets; ++set) {
      int integer = 0;
      float exact = 0.0f;
      for (int g = 0; g < tables.groups; ++g) {
        const int entry = (set * tables.groups + g) * 16 +
                          static_cast<int>(nibble_tile::get(page, view.head_dim(), token, g));
        if (tables.six_bit) {
          integer += tables.quantised[entry];
        } else {
          exact += tables.exact[entry];
        }
      }
      if (config_.integer_scores()) return static_cast<float>(integer);
      const float score = tables.six_bit ? tables.score(set, integer) : exact;
      best = set == 0 ? score : std::max(best, score);
    }
    if (!config_.norm_weighting) return best;
    return best * rlm4::token_scale(view.key().page(SIKV_SCALE, row, slot / kPageTokens), token);
  }

  Config config_;
};

}  // namespace

std::unique_ptr<Selector> make_ref(const CreateArgs& args) {
  const Config config(args.options);
  return make_selector(args, config, std::make_unique<RefEngine>(config));
}

}  // namespace sikv::self_index
