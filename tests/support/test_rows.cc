#include "tests/support/test_rows.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <utility>

#include "framework/base/random.h"

namespace sikv::testing {
namespace {

constexpr int kPadding = 8;  // elements between tokens

float huge(int32_t dtype) { return dtype == SIKV_FP16 ? 32752.0f : 0x1p57f; }
float subnormal(int32_t dtype) { return dtype == SIKV_FP16 ? 0x1p-15f : 0x1p-127f; }

// Factors of token t of n: 2^-12 .. 2^12, which with normals fits into fp16 and its scales.
float hill(int t, int n) {
  const int middle = middle_token(n);
  return std::ldexp(1.0f, 12 - 24 * std::abs(t - middle) / std::max(middle, 1));
}
float peak(int t, int n) { return t == middle_token(n) ? 0x1p12f : 0x1p-12f; }

}  // namespace

std::string_view pattern_name(Pattern pattern) {
  constexpr std::string_view kNames[] = {"gaussian", "outliers",  "offset", "constant", "zeros",
                                         "huge",     "subnormal", "steps",  "hill",     "peak"};
  return kNames[static_cast<int>(pattern)];
}

TestRows::TestRows(std::vector<int> counts, int num_heads, int head_dim, int32_t dtype)
    : counts_(std::move(counts)),
      num_heads_(num_heads),
      head_dim_(head_dim),
      dtype_(dtype),
      token_stride_(int64_t{num_heads} * head_dim + kPadding) {
  int32_t next = 1;
  for (const int count : counts_) {
    first_.push_back(next);
    next += count + 1;
  }
  data_.assign(static_cast<size_t>(next * token_stride_ * sikv_dtype_bytes(dtype)), 0xff);
}

int64_t TestRows::index(int sequence, int token, int head, int channel) const {
  return (int64_t{first_[static_cast<size_t>(sequence)]} + token) * token_stride_ +
         int64_t{head} * head_dim_ + channel;
}

void TestRows::set(int sequence, int token, int head, int channel, float x) {
  sikv_store(data_.data(), dtype_, index(sequence, token, head, channel), x);
}

float TestRows::at(int sequence, int token, int head, int channel) const {
  return sikv_load(data_.data(), dtype_, index(sequence, token, head, channel));
}

std::vector<float> TestRows::row(int sequence, int token, int head) const {
  const int64_t first = index(sequence, token, head, 0);
  std::vector<float> x;
  for (int d = 0; d < head_dim_; ++d) x.push_back(sikv_load(data_.data(), dtype_, first + d));
  return x;
}

const void* TestRows::address(int sequence, int token, int head) const {
  return data_.data() + index(sequence, token, head, 0) * sikv_dtype_bytes(dtype_);
}

void TestRows::fill(Pattern pattern, uint64_t seed) {
  for (int b = 0; b < num_sequences(); ++b) {
    for (int h = 0; h < num_heads_; ++h) {
      const uint64_t head_seed =
          derive_seed(derive_seed(seed, static_cast<uint64_t>(b)), static_cast<uint64_t>(h));
      Random random(head_seed);
      Random offsets(derive_seed(head_seed, 1));
      std::vector<float> offset(static_cast<size_t>(head_dim_));
      for (float& x : offset) x = static_cast<float>(16.0 * offsets.uniform() - 8.0);
      for (int t = 0; t < count(b); ++t) {
        for (int d = 0; d < head_dim_; ++d) {
          const auto normal = [&] { return static_cast<float>(random.normal()); };
          const auto sign = [&] { return random.below(2) != 0 ? 1.0f : -1.0f; };
          float x = 0.0f;
          switch (pattern) {
            case Pattern::kGaussian:
              x = normal();
              break;
            case Pattern::kOutliers:
              x = normal() * (d % 17 == 0 ? 20.0f : 1.0f);
              break;
            case Pattern::kOffset:
              x = normal() + offset[static_cast<size_t>(d)];
              break;
            case Pattern::kConstant:
              x = 0.75f;
              break;
            case Pattern::kZeros:
              x = (t + d) % 2 == 0 ? 0.0f : -0.0f;
              break;
            case Pattern::kHuge:
              x = huge(dtype_) * sign();
              break;
            case Pattern::kSubnormal:
              x = subnormal(dtype_) * sign();
              break;
            case Pattern::kSteps:
              x = static_cast<float>((7 * t + 5 * d + 3 * h) % 33 - 16) / 8.0f;
              break;
            case Pattern::kHill:
              x = normal() * hill(t, count(b));
              break;
            case Pattern::kPeak:
              x = normal() * peak(t, count(b));
              break;
          }
          set(b, t, h, d, x);
        }
      }
    }
  }
}

RowsPart TestRows::all() const { return part(std::vector<int>(counts_.size(), 0), counts_); }

RowsPart TestRows::part(const std::vector<int>& from, const std::vector<int>& count) const {
  RowsPart part;
  for (size_t b = 0; b < counts_.size(); ++b) {
    part.first.push_back(first_[b] + from[b]);
    part.count.push_back(count[b]);
  }
  part.rows = {.data = data_.data(),
               .dtype = dtype_,
               .max_count = *std::max_element(count.begin(), count.end()),
               .first = part.first.data(),
               .count = part.count.data(),
               .token_stride = token_stride_,
               .head_stride = head_dim_};
  part.data_bytes = data_.size();
  return part;
}

}  // namespace sikv::testing
