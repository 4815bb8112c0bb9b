// Sums over the tokens of a prompt that every variant can reproduce to the bit: in fp64, the tokens
// of each run of 256 added in order, then the runs added in order. A GPU sums runs in parallel.
#ifndef SIKV_PLUGINS_LAYOUTS_PAGED_SUM_H_
#define SIKV_PLUGINS_LAYOUTS_PAGED_SUM_H_

#include <cmath>
#include <cstdint>
#include <vector>

#include "plugins/layouts/nibble_tile.h"

namespace sikv {

class PagedSum {
 public:
  static constexpr int kRun = 256;

  explicit PagedSum(int n) : run_(n), total_(n) {}

  // Between begin_token calls, adds to any of the n sums.
  void begin_token() {
    if (tokens_ != 0 && tokens_ % kRun == 0) close_run();
    ++tokens_;
  }
  void add(int i, float x) { run_[i] += x; }

  int64_t tokens() const { return tokens_; }
  // Call once, after the last token.
  const std::vector<double>& finish() {
    close_run();
    return total_;
  }

 private:
  void close_run() {
    for (size_t i = 0; i < run_.size(); ++i) {
      total_[i] += run_[i];
      run_[i] = 0.0;
    }
  }

  std::vector<double> run_, total_;
  int64_t tokens_ = 0;
};

// The tokens of a prompt that a fit reads: all, or `size` evenly spaced ones, entry i being the
// token at position floor(i * count / size). Entries take the place of tokens in the runs of a
// PagedSum.
struct FitSample {
  int32_t count;  // tokens of the prompt
  int32_t size;   // of the sample

  // A fit on `fit_tokens` tokens, or on every one where that is 0.
  constexpr FitSample(int32_t tokens, int32_t fit_tokens)
      : count(tokens), size(fit_tokens == 0 || tokens < fit_tokens ? tokens : fit_tokens) {}
  constexpr bool all() const { return size == count; }
  constexpr int32_t position(int32_t i) const {
    return static_cast<int32_t>(int64_t{i} * count / size);
  }
};

// The tokens that a fit on `fit_tokens` of them reads, out of `tokens`: anything with head_dim(),
// count() and load(t, x [D]).
template <typename Tokens>
class SampledTokens {
 public:
  SampledTokens(const Tokens& tokens, int fit_tokens)
      : tokens_(&tokens), sample_(tokens.count(), fit_tokens) {}

  int head_dim() const { return tokens_->head_dim(); }
  int count() const { return sample_.size; }
  bool all() const { return sample_.all(); }

  // visit(entry, x [D]) in order.
  template <typename Visit>
  void for_each(Visit&& visit) const {
    std::vector<float> x(static_cast<size_t>(head_dim()));
    for (int i = 0; i < count(); ++i) {
      tokens_->load(sample_.position(i), x.data());
      visit(i, static_cast<const float*>(x.data()));
    }
  }

 private:
  const Tokens* tokens_;
  FitSample sample_;
};

// mean [D] over `tokens`: SampledTokens, or what answers like them.
template <typename Tokens>
void channel_means(const Tokens& tokens, float* mean) {
  const int head_dim = tokens.head_dim();
  PagedSum sum(head_dim);
  tokens.for_each([&](int, const float* x) {
    sum.begin_token();
    for (int d = 0; d < head_dim; ++d) sum.add(d, x[d]);
  });
  const std::vector<double>& total = sum.finish();
  for (int d = 0; d < head_dim; ++d) {
    mean[d] = static_cast<float>(total[d] / static_cast<double>(sum.tokens()));
  }
}

// The 4-channel codebook of the index plane: CODEBOOK [D/4, 16, 4] = mean of the centred (rot_lm:
// and rotated) sub-vectors with each sign pattern. A pattern nobody has gets its signs times each
// channel's mean |x|.
class SignCodebookFit {
 public:
  explicit SignCodebookFit(int head_dim)
      : head_dim_(head_dim),
        counts_(head_dim / 4 * 16),
        sums_(head_dim / 4 * 16 * 4),
        magnitudes_(head_dim) {}

  // x [D], centred.
  void add(const float* x) {
    sums_.begin_token();
    magnitudes_.begin_token();
    for (int group = 0; group < head_dim_ / 4; ++group) {
      const int entry = group * 16 + static_cast<int>(nibble_tile::nibble_of(x + 4 * group));
      ++counts_[entry];
      for (int i = 0; i < 4; ++i) sums_.add(entry * 4 + i, x[4 * group + i]);
    }
    for (int d = 0; d < head_dim_; ++d) magnitudes_.add(d, std::fabs(x[d]));
  }

  // Call once, after at least one token.
  void finish(float* codebook) {
    const double tokens = static_cast<double>(magnitudes_.tokens());
    const std::vector<double>& sums = sums_.finish();
    const std::vector<double>& magnitudes = magnitudes_.finish();
    for (int entry = 0; entry < head_dim_ / 4 * 16; ++entry) {
      for (int i = 0; i < 4; ++i) {
        const double magnitude = magnitudes[entry / 16 * 4 + i] / tokens;
        codebook[entry * 4 + i] = static_cast<float>(
            counts_[entry] != 0     ? sums[entry * 4 + i] / static_cast<double>(counts_[entry])
            : (entry >> i & 1) != 0 ? magnitude
                                    : -magnitude);
      }
    }
  }

 private:
  int head_dim_;
  std::vector<int64_t> counts_;
  PagedSum sums_, magnitudes_;
};

}  // namespace sikv

#endif  // SIKV_PLUGINS_LAYOUTS_PAGED_SUM_H_
