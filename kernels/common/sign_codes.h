// One bit per direction of every token of a row, with what a method scales and shifts its scores
// by; and the scan that ranks tokens from them.
//
// A query is bit-sliced (RaBitQ's way): in b bits, q_i ~ step * (2 c_i - (2^b - 1)), and plane j
// holds bit j of all c_i. With s_i = +-1 the signs of a token,
//
//   sum_i s_i (2 c_i - (2^b - 1)) = sum_j 2^j (n - 2 hamming(signs, plane_j)),
//
// exactly, in integers: one plane is plain sign hashing.
#ifndef SIKV_KERNELS_COMMON_SIGN_CODES_H_
#define SIKV_KERNELS_COMMON_SIGN_CODES_H_

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "kernels/common/channel_pages.h"

namespace sikv {

constexpr int sign_words(int bits) { return (bits + 63) / 64; }

// to [sign_words(bits)]: bit i is set where x_i >= 0.
inline void pack_signs(const float* x, int bits, uint64_t* to) {
  std::fill_n(to, sign_words(bits), uint64_t{0});
  for (int i = 0; i < bits; ++i) to[i / 64] |= uint64_t{x[i] >= 0.0f} << (i % 64);
}

// [pages, words, 256]: in a page, the same word of all tokens is one run of memory.
class SignCodes {
 public:
  void put(int64_t position, const float* x, int bits) {
    words_ = sign_words(bits);
    tokens_ = std::max(tokens_, position + 1);
    const int64_t page = position / SIKV_PAGE_TOKENS, t = position % SIKV_PAGE_TOKENS;
    const auto pages = static_cast<size_t>((tokens_ + SIKV_PAGE_TOKENS - 1) / SIKV_PAGE_TOKENS);
    const size_t page_words = static_cast<size_t>(words_) * SIKV_PAGE_TOKENS;
    if (data_.size() < pages * page_words) data_.resize(pages * page_words);
    uint64_t packed[8];
    pack_signs(x, bits, packed);
    for (int w = 0; w < words_; ++w) {
      data_[static_cast<size_t>((page * words_ + w) * SIKV_PAGE_TOKENS + t)] = packed[w];
    }
  }

  const uint64_t* data() const { return data_.data(); }
  int words() const { return words_; }
  int64_t tokens() const { return tokens_; }
  uint64_t bytes() const { return data_.size() * sizeof(uint64_t); }

 private:
  int words_ = 0;
  int64_t tokens_ = 0;
  std::vector<uint64_t> data_;
};

// G queries of n channels, bit-sliced.
struct SlicedQueries {
  int bits, planes, words;
  std::vector<uint64_t> data;  // [G, planes, words]
  std::vector<float> step;     // [G]
};

// One plane keeps the mean magnitude; more reach the largest.
inline SlicedQueries slice_queries(const float* q, int group, int bits, int planes) {
  SlicedQueries sliced{bits, planes, sign_words(bits), {}, {}};
  sliced.data.resize(static_cast<size_t>(group * planes * sliced.words));
  const int levels = (1 << planes) - 1;
  for (int g = 0; g < group; ++g, q += bits) {
    float sum = 0.0f, largest = 0.0f;
    for (int i = 0; i < bits; ++i) {
      sum += std::abs(q[i]);
      largest = std::max(largest, std::abs(q[i]));
    }
    const float step =
        planes == 1 ? sum / static_cast<float>(bits) : largest / static_cast<float>(levels);
    sliced.step.push_back(step);
    uint64_t* const to = sliced.data.data() + g * planes * sliced.words;
    for (int i = 0; i < bits; ++i) {
      // The odd multiples of step, -levels .. levels; zero is positive, as in codes.
      const float at = step > 0.0f ? (q[i] / step + static_cast<float>(levels)) / 2.0f : 0.0f;
      const int code = planes == 1 ? static_cast<int>(q[i] >= 0.0f)
                                   : std::clamp(static_cast<int>(std::lround(at)), 0, levels);
      for (int j = 0; j < planes; ++j) {
        to[j * sliced.words + i / 64] |= static_cast<uint64_t>(code >> j & 1) << (i % 64);
      }
    }
  }
  return sliced;
}

struct SignRequest {
  const SignCodes& codes;
  const SlicedQueries& queries;
  int group;
  int64_t tokens;
  float scale;
  // Per token in fp16, or empty: channel 0 is what a token's sum is multiplied with, channel 1 + g,
  // where there are so many, what is added to it for head g.
  const ChannelPages& terms;
};

// logits [G, stride] = scale * (step_g * factor_t * sum_i s_i (2 c_i - (2^b - 1)) + shift_gt).
using SignLogits = void (*)(const SignRequest& request, float* logits, int64_t stride);

// The definition, channel by channel.
inline void sign_logits_ref(const SignRequest& request, float* logits, int64_t stride) {
  const SlicedQueries& queries = request.queries;
  const int levels = (1 << queries.planes) - 1, terms = request.terms.channels();
  std::vector<int> value(static_cast<size_t>(queries.bits));
  for (int g = 0; g < request.group; ++g) {
    const uint64_t* planes = queries.data.data() + g * queries.planes * queries.words;
    const auto bit = [](const uint64_t* words, int i) {
      return static_cast<int>(words[i / 64] >> (i % 64) & 1);
    };
    for (int i = 0; i < queries.bits; ++i) {
      int code = 0;
      for (int j = 0; j < queries.planes; ++j) code |= bit(planes + j * queries.words, i) << j;
      value[static_cast<size_t>(i)] = 2 * code - levels;
    }
    const float step = queries.step[static_cast<size_t>(g)];
    for (int64_t position = 0; position < request.tokens; ++position) {
      const int64_t page = position / SIKV_PAGE_TOKENS, t = position % SIKV_PAGE_TOKENS;
      const auto term = [&](int channel) {
        return sikv_load(request.terms.data(), SIKV_FP16,
                         (page * terms + channel) * SIKV_PAGE_TOKENS + t);
      };
      const uint64_t* words = request.codes.data() + page * queries.words * SIKV_PAGE_TOKENS + t;
      int sum = 0;
      for (int i = 0; i < queries.bits; ++i) {
        const bool positive = words[i / 64 * SIKV_PAGE_TOKENS] >> (i % 64) & 1;
        sum += positive ? value[static_cast<size_t>(i)] : -value[static_cast<size_t>(i)];
      }
      float logit = step * static_cast<float>(sum);
      if (terms > 0) logit *= term(0);
      if (terms > 1) logit += term(1 + g);
      logits[g * stride + position] = request.scale * logit;
    }
  }
}

// In SIMD (sign_codes_simd.cc).
void sign_logits_simd(const SignRequest& request, float* logits, int64_t stride);

// [D] mean of rows [count, D].
inline std::vector<float> mean_row(const float* rows, int count, int head_dim) {
  std::vector<double> sum(static_cast<size_t>(head_dim));
  for (int t = 0; t < count; ++t) {
    for (int d = 0; d < head_dim; ++d) sum[static_cast<size_t>(d)] += rows[t * head_dim + d];
  }
  std::vector<float> mean;
  for (const double x : sum) mean.push_back(static_cast<float>(x / std::max(count, 1)));
  return mean;
}

}  // namespace sikv

#endif  // SIKV_KERNELS_COMMON_SIGN_CODES_H_
