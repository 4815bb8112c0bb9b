// The magicpig selector, private to this folder: its options, its tables and its variant.
#ifndef SIKV_SELECTORS_MAGICPIG_MAGICPIG_H_
#define SIKV_SELECTORS_MAGICPIG_MAGICPIG_H_

#include <cmath>
#include <cstdint>
#include <memory>
#include <numbers>
#include <vector>

#include "plugins/sdk/plugin.h"

namespace sikv::magicpig {

inline constexpr sikv_option_spec kOptions[] = {
    int_option("bits", "10", 1, 16, "K: hyperplanes of a table"),
    int_option("tables", "150", 2, 1024,
               "L: a token is sampled if it shares a bucket with the "
               "query in two of them"),
    float_option("epsilon", "1e-4", 0, 1, "added to the probability that weights divide by"),
    int_option("seed", "0", 0, 1 << 30, "of the hyperplanes"),
    kFitTokensOption,
};

// That two vectors at this angle share a bucket in two tables or more, of `tables` with `bits`
// random hyperplanes each.
inline double sampling_probability(double angle, int bits, int tables) {
  const double p = std::pow(1.0 - angle / std::numbers::pi, bits), rest = tables - 1.0;
  if (p >= 1.0) return 1.0;
  // 1 - (1 - p)^L - L p (1 - p)^(L - 1), which cancels where p is small.
  return -std::expm1(rest * std::log1p(-p) + std::log1p(rest * p));
}

// Which tokens lie in which bucket of L tables, as chains: the newest of a bucket, and from each
// token to the one before.
class Tables {
 public:
  Tables() = default;
  Tables(int bits, int tables)
      : bits_(bits), tables_(tables), first_(static_cast<size_t>(tables) << bits, -1) {}

  // Of the buckets alone, before there is a token.
  static constexpr int64_t empty_bytes(int bits, int tables) {
    return (int64_t{tables} << bits) * int64_t{sizeof(int32_t)};
  }

  bool empty() const { return first_.empty(); }
  int64_t tokens() const { return tables_ == 0 ? 0 : std::ssize(next_) / tables_; }
  uint64_t bytes() const { return (first_.size() + next_.size()) * sizeof(int32_t); }

  // sides [L, K] of the next token.
  void push(const float* sides) {
    const auto token = static_cast<int32_t>(tokens());
    for (int l = 0; l < tables_; ++l) {
      int32_t& first = first_[bucket(sides, l)];
      next_.push_back(first);
      first = token;
    }
  }

  // visit(token) for every token of the query's bucket in each table.
  template <typename Visit>
  void for_each_collision(const float* sides, Visit&& visit) const {
    for (int l = 0; l < tables_; ++l) {
      for (int32_t token = first_[bucket(sides, l)]; token >= 0;
           token = next_[static_cast<size_t>(token) * static_cast<size_t>(tables_) +
                         static_cast<size_t>(l)]) {
        visit(token);
      }
    }
  }

 private:
  size_t bucket(const float* sides, int table) const {
    size_t code = static_cast<size_t>(table);
    for (int i = 0; i < bits_; ++i) code = code << 1 | size_t{sides[table * bits_ + i] >= 0.0f};
    return code;
  }

  int bits_ = 0, tables_ = 0;
  std::vector<int32_t> first_;  // [L, 2^K]
  std::vector<int32_t> next_;   // [tokens, L]
};

std::unique_ptr<Selector> make_ref(const CreateArgs& args);

}  // namespace sikv::magicpig

#endif  // SIKV_SELECTORS_MAGICPIG_MAGICPIG_H_
