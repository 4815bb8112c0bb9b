#include "selectors/self_index/self_index_schedule.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <span>

#include "plugins/sdk/select.h"

namespace sikv::self_index {

PromptQueries::PromptQueries(const sikv_observe_args& args, const CacheView& view,
                             int num_query_heads, int row, int window)
    : queries_(args.queries),
      dtype_(view.dtype()),
      prompt_len_(args.prompt_len[row / view.num_kv_heads()]),
      head_dim_(view.head_dim()),
      group_(num_query_heads / view.num_kv_heads()),
      count_(std::min(window, args.num_queries)) {
  const int64_t sequence = row / view.num_kv_heads(), head = row % view.num_kv_heads();
  stride_ = int64_t{num_query_heads} * head_dim_;
  first_ = ((sequence + 1) * args.num_queries - count_) * stride_ + head * group_ * head_dim_;
}

void PromptQueries::load(int i, float* out) const {
  load_floats(queries_, dtype_, first_ + i * stride_, group_ * head_dim_, out);
}

ReplayScratch::ReplayScratch(Arena& arena, const Limits& limits)
    : heads(arena.take<float>(int64_t{limits.group} * limits.head_dim)),
      mean(arena.take<float>(limits.head_dim)),
      probability(arena.take<float>(limits.tokens)),
      order(arena.take<int32_t>(limits.candidates)) {
  for (int32_t*& list : candidates) list = arena.take<int32_t>(limits.candidates);
}

namespace {

// Probability that the kept tokens hold, of a query at `position`.
double kept_mass(const CacheView& view, int row, std::span<const int32_t> scanned, int64_t budget,
                 int64_t always_from, int64_t position, const float* probability, int32_t* order) {
  const auto seen = std::upper_bound(scanned.begin(), scanned.end(), position);
  int32_t* end = std::copy(scanned.begin(), seen, order);
  if (end - order > budget) {
    std::nth_element(order, order + budget, end, [&](int32_t a, int32_t b) {
      return probability[a] > probability[b] || (probability[a] == probability[b] && a < b);
    });
    end = order + budget;
  }
  double mass = 0.0;
  const auto add = [&](int64_t slot) {
    if (slot < always_from && slot <= position) mass += probability[slot];
  };
  std::for_each(order, end, add);
  for (int32_t slot : view.pinned_slots(row)) add(slot);
  for (int64_t slot = always_from; slot <= position; ++slot) mass += probability[slot];
  return mass;
}

}  // namespace

std::array<double, kPeriods.size()> replay(const Engine& engine, const Config& config,
                                           const PromptQueries& queries, const RowsView& keys,
                                           const CacheView& view, int row, IndexTables& tables,
                                           const ReplayScratch& scratch,
                                           std::byte* engine_scratch) {
  const int head_dim = view.head_dim();
  const int64_t budget = config.budget.tokens(queries.prompt_len());
  const int64_t always_from = std::min<int64_t>(view.encoded_len(row), queries.position(0));
  std::array<double, kPeriods.size()> dropped{};
  std::array<int64_t, kPeriods.size()> found{};
  for (int i = 0; i < queries.count(); ++i) {
    queries.load(i, scratch.heads);
    group_mean(scratch.heads, queries.group(), head_dim, scratch.mean);
    const int64_t position = queries.position(i);
    const PromptQuery query{
        keys,         row / view.num_kv_heads(), row % view.num_kv_heads(),
        head_dim,     queries.group(),           1.0f / std::sqrt(static_cast<float>(head_dim)),
        scratch.heads};
    engine.attend_prompt(query, position + 1, engine_scratch, scratch.probability);

    build_tables(view, row, scratch.heads, scratch.mean, tables);
    found[0] = engine.scan(view, row, tables, config.candidates(budget), engine_scratch,
                           scratch.candidates[0]);
    for (size_t j = 0; j < kPeriods.size(); ++j) {
      if (j > 0 && i % kPeriods[j] == 0) {
        std::copy_n(scratch.candidates[0], found[0], scratch.candidates[j]);
        found[j] = found[0];
      }
      dropped[j] +=
          1.0 - kept_mass(view, row, {scratch.candidates[j], static_cast<size_t>(found[j])}, budget,
                          always_from, position, scratch.probability, scratch.order);
    }
  }
  for (double& mass : dropped) mass /= std::max(queries.count(), 1);
  return dropped;
}

int longest_period(const std::array<double, kPeriods.size()>& mean_dropped, double tolerance) {
  size_t best = 0;
  for (size_t j = 1; j < kPeriods.size(); ++j) {
    if (mean_dropped[j] <= mean_dropped[0] + tolerance) best = j;
  }
  return kPeriods[best];
}

}  // namespace sikv::self_index
