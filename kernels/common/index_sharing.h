// Sharing a selection over decode steps (PrHS's CIS): an anchor step finds it, later steps whose
// queries point the same way take it over with the neighbours of its best tokens.
#ifndef SIKV_KERNELS_COMMON_INDEX_SHARING_H_
#define SIKV_KERNELS_COMMON_INDEX_SHARING_H_

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <numeric>
#include <span>
#include <vector>

#include "kernels/common/exact_scores.h"
#include "plugins/sdk/options.h"
#include "plugins/sdk/view.h"

namespace sikv {

inline constexpr std::array kSharingOptions = {
    float_option(
        "tau", "0.8", -2, 2,
        "share while the query of every head has a cosine above tau with its anchor's; above "
        "1 never, below -1 always"),
    int_option("block", "16", 1, 1 << 20, "steps from one anchor to the next at most"),
    int_option("radius", "1", 0, 64, "neighbours taken over on each side of a best token"),
    float_option("dilated", "0.3333333", 0, 1, "share of the tokens that bring their neighbours"),
    bool_option(
        "matched", "true",
        "whether neighbours take the place of the least tokens (the paper's CIS*) or come on "
        "top of the budget (CIS)"),
    bool_option("reanchor", "false",
                "whether a query that fails the gate becomes the anchor of the steps after it"),
    bool_option(
        "audit", "false",
        "score every key in shared steps, too, and count dropped mass and its bounds; slow"),
};

struct SharingRule {
  explicit SharingRule(const Options& options)
      : tau(options.number("tau")),
        block(options.integer("block")),
        radius(static_cast<int>(options.integer("radius"))),
        dilated(options.number("dilated")),
        matched(options.flag("matched")),
        reanchor(options.flag("reanchor")),
        audit(options.flag("audit")) {}

  // Tokens of a selection of k that bring their neighbours.
  int64_t centres(int64_t k) const {
    return static_cast<int64_t>(dilated * static_cast<double>(k));
  }
  // Slots that a selection of k may grow to.
  int64_t most(int64_t k) const { return matched ? k : k + 2 * radius * centres(k); }

  double tau;
  int64_t block;
  int radius;
  double dilated;
  bool matched, reanchor, audit;
};

// Slots that may be selected: [first, end) without `pinned` (ascending).
struct SlotDomain {
  int32_t first, end;
  std::span<const int32_t> pinned;

  bool holds(int32_t slot) const {
    return slot >= first && slot < end && !std::binary_search(pinned.begin(), pinned.end(), slot);
  }
  std::vector<int32_t> all() const {
    std::vector<int32_t> slots;
    slots.reserve(static_cast<size_t>(std::max(end - first, 0)));
    for_each_unpinned(end, pinned, [&](int32_t slot) {
      if (slot >= first) slots.push_back(slot);
    });
    return slots;
  }
};

// The best of `ranked` with their neighbours, then the rest of it, ascending; `rule.most` slots of
// the domain at most.
inline std::vector<int32_t> dilate(std::span<const int32_t> ranked, const SharingRule& rule,
                                   const SlotDomain& domain) {
  const auto most = static_cast<size_t>(rule.most(std::ssize(ranked)));
  std::vector<int32_t> order;
  const auto centres = static_cast<size_t>(rule.centres(std::ssize(ranked)));
  for (size_t i = 0; i < ranked.size(); ++i) {
    order.push_back(ranked[i]);
    if (i >= centres) continue;
    for (int j = 1; j <= rule.radius; ++j) {
      for (const int32_t slot : {ranked[i] - j, ranked[i] + j}) {
        if (domain.holds(slot)) order.push_back(slot);
      }
    }
  }
  std::vector<int32_t> slots;
  std::vector<bool> taken(static_cast<size_t>(std::max(domain.end, 0)));
  for (const int32_t slot : order) {
    if (slots.size() == most) break;
    if (taken[static_cast<size_t>(slot)]) continue;
    taken[static_cast<size_t>(slot)] = true;
    slots.push_back(slot);
  }
  std::sort(slots.begin(), slots.end());
  return slots;
}

// The least cosine over the heads of a and b [G, D]; a head of zeros has cosine 0.
inline double least_cosine(const float* a, const float* b, int group, int head_dim) {
  double least = 1.0;
  for (int g = 0; g < group; ++g, a += head_dim, b += head_dim) {
    double ab = 0.0, aa = 0.0, bb = 0.0;
    for (int d = 0; d < head_dim; ++d) {
      ab += double{a[d]} * b[d];
      aa += double{a[d]} * a[d];
      bb += double{b[d]} * b[d];
    }
    least = std::min(least, aa > 0.0 && bb > 0.0 ? ab / std::sqrt(aa * bb) : 0.0);
  }
  return least;
}

// What a row remembers of its anchor step.
struct Anchor {
  int64_t step = -1;            // none
  int32_t tail = 0;             // tail tokens there were
  std::vector<float> q;         // [G, D]
  std::vector<int32_t> slots;   // dilated, ascending
  std::vector<int32_t> chosen;  // before dilation; only for the audit

  bool serves(const SharingRule& rule, int64_t now, const float* query, int group,
              int head_dim) const {
    return due(rule, now) ? false : least_cosine(q.data(), query, group, head_dim) > rule.tau;
  }
  // Whether a block begins, whatever the query.
  bool due(const SharingRule& rule, int64_t now) const {
    return step < 0 || now < step || now - step >= rule.block;
  }
  void set(const SharingRule& rule, int64_t now, int tail_len, std::span<const float> query,
           std::span<const int32_t> ranked, const SlotDomain& domain) {
    step = now;
    tail = tail_len;
    q.assign(query.begin(), query.end());
    slots = dilate(ranked, rule, domain);
    if (rule.audit) chosen.assign(ranked.begin(), ranked.end());
  }
  uint64_t bytes() const {
    return q.capacity() * sizeof(float) + (slots.capacity() + chosen.capacity()) * sizeof(int32_t);
  }
};

// Measured against predicted, over the keys there were at the anchor's step, pinned and tail
// included. A is the mean over the heads of their attention to those keys, q the anchor's query, q'
// a follower's, and L = scale * K_max * mean_g |q'_g - q_g|, which |A(q') - A(q)|_1 cannot exceed.
struct SharingAudit {
  double rows = 0;
  double dropped = 0, dropped_bound = 0;  // mass that the shared set misses; at q, plus L / 2
  double loss = 0, loss_bound = 0;        // what q's own choice as it was holds less than q''s; L
  double violations = 0;

  void add(const SharingAudit& other) {
    rows += other.rows;
    dropped += other.dropped;
    dropped_bound += other.dropped_bound;
    loss += other.loss;
    loss_bound += other.loss_bound;
    violations += other.violations;
  }
};

// `exact`: the anchor chose the best of the domain, which is what the bound of the loss is about.
inline SharingAudit audit_follower(RowScorer& scorer, const ScoreRequest& now, const Anchor& anchor,
                                   bool exact) {
  const CacheView& view = now.view;
  const int dim = view.head_dim(), group = now.group;
  const SlotDomain domain{0, view.encoded_len(now.row), view.pinned_slots(now.row)};
  const std::vector<int32_t> all = domain.all();
  std::vector<float> before, after;
  ScoreRequest request{view, now.row, group, now.scale, anchor.q.data(), all, anchor.tail};
  scorer.score(request, before);
  request.q = now.q;
  scorer.score(request, after);

  double key_max = 0.0, moved = 0.0;
  std::vector<float> keys(static_cast<size_t>(dim));
  const auto norm = [&](const float* x) {
    double sum = 0.0;
    for (int d = 0; d < dim; ++d) sum += double{x[d]} * x[d];
    return std::sqrt(sum);
  };
  for (const int32_t& slot : all) {
    view.key().decode(now.row, {&slot, 1}, keys.data());
    key_max = std::max(key_max, norm(keys.data()));
  }
  for (size_t i = 0; i < view.pinned_slots(now.row).size(); ++i) {
    view.load_pinned_k(now.row, static_cast<int>(i), keys.data());
    key_max = std::max(key_max, norm(keys.data()));
  }
  for (int i = 0; i < anchor.tail; ++i) {
    view.load_tail_k(now.row, i, keys.data());
    key_max = std::max(key_max, norm(keys.data()));
  }
  for (int g = 0; g < group; ++g) {
    for (int d = 0; d < dim; ++d) {
      keys[static_cast<size_t>(d)] =
          now.q[g * dim + d] - anchor.q[static_cast<size_t>(g * dim + d)];
    }
    moved += norm(keys.data()) / group;
  }

  const auto mass = [&](const std::vector<float>& p, std::span<const int32_t> slots) {
    double sum = 0.0;
    for (const int32_t slot : slots) {
      const auto at = std::lower_bound(all.begin(), all.end(), slot) - all.begin();
      sum += p[static_cast<size_t>(at)];
    }
    return sum;
  };
  const double total_before = std::accumulate(before.begin(), before.end(), 0.0);
  const double total_after = std::accumulate(after.begin(), after.end(), 0.0);
  const double lipschitz = now.scale * key_max * moved;
  SharingAudit audit{.rows = 1};
  audit.dropped = total_after - mass(after, anchor.slots);
  audit.dropped_bound = total_before - mass(before, anchor.slots) + lipschitz / 2;
  if (exact) {
    std::vector<float> sorted = after;
    const auto k = anchor.chosen.size();
    std::partial_sort(sorted.begin(), sorted.begin() + static_cast<ptrdiff_t>(k), sorted.end(),
                      std::greater<>());
    audit.loss = std::accumulate(sorted.begin(), sorted.begin() + static_cast<ptrdiff_t>(k), 0.0) -
                 mass(after, anchor.chosen);
    audit.loss_bound = lipschitz;
  }
  constexpr double kRounding = 1e-5;  // of sums of fp32 probabilities
  audit.violations = audit.dropped > audit.dropped_bound + kRounding ||
                     (exact && audit.loss > audit.loss_bound + kRounding);
  return audit;
}

}  // namespace sikv

#endif  // SIKV_KERNELS_COMMON_INDEX_SHARING_H_
