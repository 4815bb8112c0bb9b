// PrHS's guarantee, from its definition and in fp64, on every query of the shipped trace.

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <numeric>
#include <vector>

#include "framework/trace/trace.h"

namespace sikv {
namespace {

using Matrix = std::vector<std::vector<double>>;

// Keys there were before the first query, and the queries of one query head.
struct Head {
  Matrix k, v, q;
};

Head load(const TraceMeta& meta, const TraceLayer& layer, int query_head) {
  const auto dim = static_cast<size_t>(meta.head_dim);
  const int kv_head = query_head * meta.num_kv_heads / meta.num_query_heads;
  const auto rows = [&](const std::vector<std::byte>& data, int64_t count, int heads, int head) {
    Matrix out(static_cast<size_t>(count), std::vector<double>(dim));
    for (int64_t t = 0; t < count; ++t) {
      for (size_t d = 0; d < dim; ++d) {
        const int64_t at = (t * heads + head) * meta.head_dim + static_cast<int64_t>(d);
        out[static_cast<size_t>(t)][d] = double{sikv_load(data.data(), layer.dtype, at)};
      }
    }
    return out;
  };
  return {rows(layer.k, layer.first_query_position, meta.num_kv_heads, kv_head),
          rows(layer.v, layer.first_query_position, meta.num_kv_heads, kv_head),
          rows(layer.q, layer.num_queries, meta.num_query_heads, query_head)};
}

double dot(const std::vector<double>& a, const std::vector<double>& b) {
  return std::inner_product(a.begin(), a.end(), b.begin(), 0.0);
}
double norm(const std::vector<double>& a) { return std::sqrt(dot(a, a)); }
double distance(const std::vector<double>& a, const std::vector<double>& b) {
  double sum = 0.0;
  for (size_t d = 0; d < a.size(); ++d) sum += (a[d] - b[d]) * (a[d] - b[d]);
  return std::sqrt(sum);
}

std::vector<double> attention(const Matrix& k, const std::vector<double>& q) {
  std::vector<double> p(k.size());
  for (size_t t = 0; t < k.size(); ++t) p[t] = dot(q, k[t]) / std::sqrt(q.size());
  const double highest = *std::max_element(p.begin(), p.end());
  double sum = 0.0;
  for (double& x : p) sum += x = std::exp(x - highest);
  for (double& x : p) x /= sum;
  return p;
}

std::vector<int> top(const std::vector<double>& p, size_t k) {
  std::vector<int> order(p.size());
  std::iota(order.begin(), order.end(), 0);
  std::partial_sort(
      order.begin(), order.begin() + static_cast<ptrdiff_t>(k), order.end(),
      [&](int a, int b) { return p[static_cast<size_t>(a)] > p[static_cast<size_t>(b)]; });
  order.resize(k);
  return order;
}
double mass(const std::vector<double>& p, const std::vector<int>& at) {
  double sum = 0.0;
  for (int i : at) sum += p[static_cast<size_t>(i)];
  return sum;
}

constexpr size_t kBudget = 192;

struct Tally {
  double pairs = 0, loss = 0, moved = 0, bound = 0, empty = 0, tightest = 0;
};

// Every pair (q, q') of the head's queries `lag` steps apart. `lipschitz` is what the bound
// multiplies |q' - q| with.
void compare(const Matrix& queries, const Matrix& p, double lipschitz, size_t lag, Tally& tally) {
  for (size_t i = 0; i + lag < queries.size(); ++i) {
    const std::vector<double>&before = p[i], &after = p[i + lag];
    double l1 = 0.0;
    for (size_t t = 0; t < before.size(); ++t) l1 += std::abs(after[t] - before[t]);
    const double bound = lipschitz * distance(queries[i + lag], queries[i]);
    const std::vector<int> shared = top(before, kBudget);
    const double loss = mass(after, top(after, kBudget)) - mass(after, shared);
    ASSERT_LE(l1, bound * (1 + 1e-12)) << "query " << i << ", lag " << lag;
    ASSERT_LE(loss, l1 + 1e-12) << "query " << i << ", lag " << lag;
    // What the plugin's audit predicts of the dropped mass.
    ASSERT_LE(1 - mass(after, shared), 1 - mass(before, shared) + bound / 2 + 1e-12);
    tally.pairs += 1;
    tally.loss += loss;
    tally.moved += l1;
    tally.bound += bound;
    tally.empty += bound >= 1;
    if (bound > 0) tally.tightest = std::max(tally.tightest, l1 / bound);
  }
}

void print(const char* what, const Tally& t) {
  std::printf(
      "%s: %.0f pairs, mean loss %.4f, |A' - A|_1 %.4f, bound %.3f; bound >= 1 in %.1f %%; "
      "largest |A' - A|_1 / bound %.3f\n",
      what, t.pairs, t.loss / t.pairs, t.moved / t.pairs, t.bound / t.pairs,
      100 * t.empty / t.pairs, t.tightest);
}

TEST(PrhsBoundTest, HoldsOnEveryQueryOfTheTrace) {
  const TraceReader reader(SIKV_SOURCE_DIR "/datasets/smollm2-135m-4k.h5");
  const TraceMeta& meta = reader.meta();
  Tally as_they_are, unit;
  for (const int l : reader.layers()) {
    const TraceLayer layer = reader.read_layer(l);
    for (int head = 0; head < meta.num_query_heads; ++head) {
      SCOPED_TRACE("layer " + std::to_string(l) + ", head " + std::to_string(head));
      Head h = load(meta, layer, head);
      double key_max = 0.0;
      for (const std::vector<double>& k : h.k) key_max = std::max(key_max, norm(k));
      const double lipschitz = key_max / std::sqrt(meta.head_dim);
      Matrix p;
      for (const std::vector<double>& q : h.q) p.push_back(attention(h.k, q));
      for (const size_t lag : {1, 15}) compare(h.q, p, lipschitz, lag, as_they_are);
      if (HasFatalFailure()) return;

      // The printed form, sqrt(2 - 2 cos) for |q' - q|, is about queries of norm 1 only.
      p.clear();
      for (std::vector<double>& q : h.q) {
        const double length = norm(q);
        for (double& x : q) x /= length;
        p.push_back(attention(h.k, q));
      }
      for (size_t i = 0; i + 1 < h.q.size(); ++i) {
        ASSERT_NEAR(distance(h.q[i + 1], h.q[i]),
                    std::sqrt(std::max(0.0, 2 - 2 * dot(h.q[i + 1], h.q[i]))), 1e-7);
      }
      compare(h.q, p, lipschitz, 1, unit);
      if (HasFatalFailure()) return;
    }
  }
  print("queries as they are", as_they_are);
  print("queries of norm 1", unit);
  EXPECT_EQ(as_they_are.pairs, 6 * 9 * (159 + 145));
}

// o - o_S, S renormalised, is delta (mean of dropped v - mean of kept v).
TEST(PrhsBoundTest, OutputErrorIsAtMostTwiceTheDroppedMassTimesTheLargestValue) {
  const TraceReader reader(SIKV_SOURCE_DIR "/datasets/smollm2-135m-4k.h5");
  for (const int l : reader.layers()) {
    const TraceLayer layer = reader.read_layer(l);
    const Head h = load(reader.meta(), layer, 0);
    double value_max = 0.0;
    for (const std::vector<double>& v : h.v) value_max = std::max(value_max, norm(v));
    std::vector<int> shared = top(attention(h.k, h.q[0]), kBudget);
    for (size_t i = 1; i < h.q.size(); ++i) {
      const std::vector<double> p = attention(h.k, h.q[i]);
      const double kept = mass(p, shared);
      std::vector<double> error(h.q[i].size());
      for (size_t d = 0; d < error.size(); ++d) {
        for (size_t t = 0; t < p.size(); ++t) error[d] += p[t] * h.v[t][d];
        for (int t : shared) {
          error[d] -= p[static_cast<size_t>(t)] / kept * h.v[static_cast<size_t>(t)][d];
        }
      }
      ASSERT_LE(norm(error), 2 * (1 - kept) * value_max + 1e-12)
          << "layer " << l << ", query " << i;
    }
  }
}

}  // namespace
}  // namespace sikv
