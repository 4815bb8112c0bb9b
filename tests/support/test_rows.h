// Ragged K or V made for tests, in the form plugins get it.
#ifndef SIKV_TESTS_SUPPORT_TEST_ROWS_H_
#define SIKV_TESTS_SUPPORT_TEST_ROWS_H_

#include <cstdint>
#include <string_view>
#include <vector>

#include "plugins/abi/sikv_abi.h"

namespace sikv::testing {

enum class Pattern {
  kGaussian,   // unit normal
  kOutliers,   // unit normal; every 17th channel 20 times as wide
  kOffset,     // unit normal; channel means of up to 8
  kConstant,   // one number everywhere
  kZeros,      // zeros, every other one negative
  kHuge,       // half of what the type holds, at most 2^57; random signs
  kSubnormal,  // below the smallest normal number of the type
  kSteps,      // channel c of token t is a small multiple of 1/8: exact in every type
  kHill,       // unit normal times 2^-12 at a sequence's ends, rising to 2^12 in its middle
  kPeak,       // unit normal times 2^-12; times 2^12 the token in the middle
};
inline constexpr Pattern kAllPatterns[] = {
    Pattern::kGaussian, Pattern::kOutliers,  Pattern::kOffset, Pattern::kConstant, Pattern::kZeros,
    Pattern::kHuge,     Pattern::kSubnormal, Pattern::kSteps,  Pattern::kHill,     Pattern::kPeak};
std::string_view pattern_name(Pattern pattern);
// Of n tokens the one with kHill's and kPeak's largest factor.
inline constexpr int middle_token(int n) { return n / 2; }

// A part of TestRows; `rows` points into the other members.
struct RowsPart {
  std::vector<int32_t> first, count;
  sikv_rows rows;
  size_t data_bytes;  // behind rows.data
};

class TestRows {
 public:
  // counts [B] tokens. Tokens lie a few elements further apart than H * D and sequences a token;
  // what lies between is NaN.
  TestRows(std::vector<int> counts, int num_heads, int head_dim, int32_t dtype);

  void fill(Pattern pattern, uint64_t seed);
  void set(int sequence, int token, int head, int channel, float x);
  float at(int sequence, int token, int head, int channel) const;
  // [D]
  std::vector<float> row(int sequence, int token, int head) const;

  int num_sequences() const { return static_cast<int>(counts_.size()); }
  int num_heads() const { return num_heads_; }
  int head_dim() const { return head_dim_; }
  int32_t dtype() const { return dtype_; }
  int count(int sequence) const { return counts_[static_cast<size_t>(sequence)]; }
  const void* address(int sequence, int token, int head) const;

  // Everything; or tokens [from[b], from[b] + count[b]) of each sequence.
  RowsPart all() const;
  RowsPart part(const std::vector<int>& from, const std::vector<int>& count) const;

 private:
  int64_t index(int sequence, int token, int head, int channel) const;

  std::vector<int> counts_;
  std::vector<int32_t> first_;
  int num_heads_, head_dim_;
  int32_t dtype_;
  int64_t token_stride_;
  std::vector<uint8_t> data_;
};

}  // namespace sikv::testing

#endif  // SIKV_TESTS_SUPPORT_TEST_ROWS_H_
