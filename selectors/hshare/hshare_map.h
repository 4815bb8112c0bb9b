// Who takes whose selection: the greedy of HShare's prefill.
#ifndef SIKV_SELECTORS_HSHARE_HSHARE_MAP_H_
#define SIKV_SELECTORS_HSHARE_HSHARE_MAP_H_

#include <cstddef>
#include <vector>

namespace sikv::hshare {

// similarity [n][n], of which i > j is read. Takes the most alike pair (i, j) `shared` times, i from
// j; who takes from another is neither source nor consumer again. Returns the source of each, itself
// where nothing is taken: chains end at their root, so source[source[i]] == source[i]. Pairs that
// have nothing in common are not taken.
inline std::vector<int> greedy_sources(std::vector<std::vector<double>> similarity, int shared) {
  const int n = static_cast<int>(similarity.size());
  std::vector<int> source(static_cast<size_t>(n));
  for (int i = 0; i < n; ++i) source[static_cast<size_t>(i)] = i;
  for (int taken = 0; taken < shared; ++taken) {
    int best_i = 0, best_j = 0;
    double best = 0.0;
    for (int i = 1; i < n; ++i) {
      for (int j = 0; j < i; ++j) {
        const double x = similarity[static_cast<size_t>(i)][static_cast<size_t>(j)];
        if (x > best) best = x, best_i = i, best_j = j;
      }
    }
    if (best == 0.0) break;
    for (int x = 0; x < n; ++x) {
      similarity[static_cast<size_t>(best_i)][static_cast<size_t>(x)] = 0.0;
      similarity[static_cast<size_t>(x)][static_cast<size_t>(best_i)] = 0.0;
      if (source[static_cast<size_t>(x)] == best_i) source[static_cast<size_t>(x)] = best_j;
    }
  }
  return source;
}

}  // namespace sikv::hshare

#endif  // SIKV_SELECTORS_HSHARE_HSHARE_MAP_H_
