// What a selection and a compressed cache cost in attention, against exact attention in fp64.
//
// One call judges one (sequence, KV head) at one decode step. n tokens, G query heads, D head_dim.
// Positions are positions in the sequence.
#ifndef SIKV_FRAMEWORK_METRICS_ATTENTION_METRICS_H_
#define SIKV_FRAMEWORK_METRICS_ATTENTION_METRICS_H_

#include <cstdint>
#include <optional>
#include <span>
#include <vector>

namespace sikv {

// Softmax attention of G heads over all n tokens, in fp64.
struct ExactAttention {
  int group = 0, head_dim = 0;
  int64_t num_tokens = 0;
  std::vector<double> p;    // [G, n]
  std::vector<double> out;  // [G, D]
};

// q [G, D], keys and values [n, D]; logits = scale * q.k.
ExactAttention exact_attention(const float* q, const float* keys, const float* values, int group,
                               int head_dim, int64_t num_tokens, double scale);

// ||a - b||_F / ||b||_F; 0 when both are 0.
double relative_error(std::span<const double> a, std::span<const double> b);
double relative_error(std::span<const float> a, std::span<const double> b);

// The attended positions of a step: selected, pinned, tail; which of them had to compete.
struct AttendedSet {
  std::span<const int32_t> selected;  // any order
  std::span<const int32_t> pinned;
  int64_t encoded = 0;  // positions [0, encoded) are or were in pages; the rest is tail
};

struct SelectionQuality {
  double dropped_mass;           // mean over heads of 1 - sum of p over the attended set
  std::optional<double> recall;  // |selected and top-k| / k; nothing where k is 0 or no budget
  double selection_error;        // ||o_S - o|| / ||o|| with o_S over the set from exact K, V
};

// `budget`: k of the recall, cut to the unpinned encoded tokens there are. Top-k: by the group mean of p, ties to the lower position.
SelectionQuality judge_selection(const ExactAttention& exact, const float* values,
                                 const AttendedSet& attended, std::optional<int64_t> budget);

}  // namespace sikv

#endif  // SIKV_FRAMEWORK_METRICS_ATTENTION_METRICS_H_
