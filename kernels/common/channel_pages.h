// Some numbers of every token of a row, channel by channel: pages of 256 tokens, in which a channel
// is one run of memory. So a scan can leave channels out and pays for those that it reads.
#ifndef SIKV_KERNELS_COMMON_CHANNEL_PAGES_H_
#define SIKV_KERNELS_COMMON_CHANNEL_PAGES_H_

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <vector>

#include "plugins/abi/sikv_abi.h"
#include "plugins/abi/sikv_dtype.h"

namespace sikv {

class ChannelPages {
 public:
  // The numbers x [channels] of the token at `position`, in `dtype`; the same for every token.
  // What fp16 cannot hold becomes the largest number that it can.
  void put(int32_t dtype, int channels, int64_t position, const float* x) {
    constexpr float kLargestHalf = 65504.0f;
    dtype_ = dtype;
    channels_ = channels;
    tokens_ = std::max(tokens_, position + 1);
    const int64_t page = position / SIKV_PAGE_TOKENS, t = position % SIKV_PAGE_TOKENS;
    const auto pages = static_cast<size_t>((tokens_ + SIKV_PAGE_TOKENS - 1) / SIKV_PAGE_TOKENS);
    const size_t page_bytes =
        static_cast<size_t>(channels * SIKV_PAGE_TOKENS * sikv_dtype_bytes(dtype));
    if (data_.size() < pages * page_bytes) data_.resize(pages * page_bytes);
    for (int c = 0; c < channels; ++c) {
      const float value = dtype == SIKV_FP16 ? std::clamp(x[c], -kLargestHalf, kLargestHalf) : x[c];
      sikv_store(data_.data(), dtype, (page * channels + c) * SIKV_PAGE_TOKENS + t, value);
    }
  }

  // [pages, channels, 256]
  const uint8_t* data() const { return data_.data(); }
  int32_t dtype() const { return dtype_; }
  int channels() const { return channels_; }
  int64_t tokens() const { return tokens_; }
  uint64_t bytes() const { return data_.size(); }

 private:
  int32_t dtype_ = SIKV_FP32;
  int channels_ = 0;
  int64_t tokens_ = 0;
  std::vector<uint8_t> data_;
};

// The `count` channels of largest weight, ascending; ties to the lower.
inline std::vector<int32_t> largest_channels(const std::vector<double>& weights, int count) {
  std::vector<int32_t> order(weights.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int32_t a, int32_t b) {
    return weights[static_cast<size_t>(a)] > weights[static_cast<size_t>(b)];
  });
  order.resize(static_cast<size_t>(count));
  std::sort(order.begin(), order.end());
  return order;
}

}  // namespace sikv

#endif  // SIKV_KERNELS_COMMON_CHANNEL_PAGES_H_
