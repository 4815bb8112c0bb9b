#include "framework/pipeline/pin.h"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "framework/base/error.h"

namespace sikv {
namespace {

constexpr int kSnapWindow = 32, kSnapPool = 7;

std::vector<float> load_key(const PinInput& in, int position) {
  std::vector<float> key(static_cast<size_t>(in.head_dim));
  const int64_t at = (in.keys.first[in.sequence] + int64_t{position}) * in.keys.token_stride +
                     in.head * in.keys.head_stride;
  for (int d = 0; d < in.head_dim; ++d) {
    key[static_cast<size_t>(d)] = sikv_load(in.keys.data, in.keys.dtype, at + d);
  }
  return key;
}

// Query head g of the group at the w-th of the W given positions.
std::vector<float> load_query(const PinInput& in, int w, int g) {
  const int group = in.num_query_heads / in.num_kv_heads;
  std::vector<float> query(static_cast<size_t>(in.head_dim));
  const int64_t at = (int64_t{w} * in.num_query_heads + in.head * group + g) * in.head_dim;
  for (int d = 0; d < in.head_dim; ++d) {
    query[static_cast<size_t>(d)] = sikv_load(in.queries, in.keys.dtype, at + d);
  }
  return query;
}

double dot(const std::vector<float>& a, const std::vector<float>& b) {
  return std::inner_product(a.begin(), a.end(), b.begin(), 0.0);
}

std::vector<double> last_query_scores(const PinInput& in) {
  const int group = in.num_query_heads / in.num_kv_heads;
  std::vector<float> mean(static_cast<size_t>(in.head_dim), 0.0f);
  for (int g = 0; g < group; ++g) {
    const auto query = load_query(in, in.num_queries - 1, g);
    for (size_t d = 0; d < mean.size(); ++d) mean[d] += query[d] / static_cast<float>(group);
  }
  std::vector<double> scores(static_cast<size_t>(in.encoded));
  for (int t = 0; t < in.encoded; ++t) scores[static_cast<size_t>(t)] = dot(load_key(in, t), mean);
  return scores;
}

std::vector<double> snapkv_scores(const PinInput& in) {
  const int group = in.num_query_heads / in.num_kv_heads;
  const int prompt = in.keys.count[in.sequence];
  const int window = std::min({kSnapWindow, in.num_queries, prompt});
  const int candidates = std::min(in.encoded, prompt - window);
  std::vector<double> sum(static_cast<size_t>(std::max(candidates, 0)), 0.0);
  std::vector<std::vector<float>> keys;
  for (int t = 0; t < prompt; ++t) keys.push_back(load_key(in, t));
  for (int w = 0; w < window; ++w) {
    const int seen = prompt - window + w + 1;  // a query attends up to its own position
    for (int g = 0; g < group; ++g) {
      const auto query = load_query(in, in.num_queries - window + w, g);
      std::vector<double> p(static_cast<size_t>(seen));
      for (size_t t = 0; t < p.size(); ++t) p[t] = dot(keys[t], query) * in.scale;
      const double top = *std::max_element(p.begin(), p.end());
      double total = 0;
      for (double& x : p) total += x = std::exp(x - top);
      for (size_t t = 0; t < sum.size(); ++t) sum[t] += p[t] / total;
    }
  }
  std::vector<double> pooled(sum.size());
  const int size = static_cast<int>(sum.size());
  for (int t = 0; t < size; ++t) {
    const int from = std::max(0, t - kSnapPool / 2), to = std::min(size, t + kSnapPool / 2 + 1);
    pooled[static_cast<size_t>(t)] = *std::max_element(sum.begin() + from, sum.begin() + to);
  }
  return pooled;
}

}  // namespace

void check_pin_queries(PinRule rule, int num_queries) {
  if (rule == PinRule::kFirst || num_queries > 0) return;
  throw Error(
      "the pin rule needs queries of the prompt and the source has none: set pin: first or "
      "pinned: 0");
}

std::vector<int32_t> choose_pinned(PinRule rule, int pinned, const PinInput& in) {
  std::vector<int32_t> order;
  if (rule == PinRule::kFirst) {
    order.resize(static_cast<size_t>(std::min(pinned, in.encoded)));
    std::iota(order.begin(), order.end(), 0);
    return order;
  }
  check_pin_queries(rule, in.num_queries);
  const auto scores = rule == PinRule::kSnapKv ? snapkv_scores(in) : last_query_scores(in);
  order.resize(scores.size());
  std::iota(order.begin(), order.end(), 0);
  const size_t keep = std::min(order.size(), static_cast<size_t>(pinned));
  std::partial_sort(order.begin(), order.begin() + static_cast<int64_t>(keep), order.end(),
                    [&](int32_t a, int32_t b) {
                      const double x = scores[static_cast<size_t>(a)];
                      const double y = scores[static_cast<size_t>(b)];
                      return x > y || (x == y && a < b);
                    });
  order.resize(keep);
  std::sort(order.begin(), order.end());
  return order;
}

}  // namespace sikv
