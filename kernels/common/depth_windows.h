// A prefix of the sequence that grows with depth (PrHS): what PSAW stops to attend to and ETF
// freezes. Layers 0 .. N - 1, of which those before first_layer have none:
//
//   prefix(l, t) = floor((1 - base^(rate (l - first_layer) / (N - first_layer))) t)
#ifndef SIKV_KERNELS_COMMON_DEPTH_WINDOWS_H_
#define SIKV_KERNELS_COMMON_DEPTH_WINDOWS_H_

#include <array>
#include <cmath>
#include <cstdint>

#include "plugins/sdk/options.h"
#include "plugins/sdk/view.h"

namespace sikv {

inline constexpr sikv_option_spec kFirstLayerOption =
    float_option("first_layer", "0.5", 0, 0.999,
                 "the first layer that is treated, as a share of the cache's layers");

inline constexpr std::array kPsawOptions = {
    float_option("phi", "0.7", 1e-6, 1,
                 "share of the sequence that the deepest layers attend to, "
                 "for alpha 1"),
    float_option("alpha", "1", 0, 16, "exponent of phi over depth; 0: no window"),
};
inline constexpr std::array kEtfOptions = {
    float_option("psi", "0.7", 1e-6, 1,
                 "share of the sequence that the deepest layers leave live, "
                 "for gamma 1"),
    float_option("gamma", "1", 0, 16, "exponent of psi over depth; 0: nothing is frozen"),
};

class DepthPrefix {
 public:
  // `first` as a share of `num_layers`.
  DepthPrefix(double first, int num_layers, double base, double rate)
      : first_(static_cast<int>(std::floor(first * num_layers))),
        num_layers_(num_layers),
        base_(base),
        rate_(rate) {}

  static DepthPrefix psaw(const Options& options, int num_layers) {
    return {options.number("first_layer"), num_layers, options.number("phi"),
            options.number("alpha")};
  }
  static DepthPrefix etf(const Options& options, int num_layers) {
    return {options.number("first_layer"), num_layers, options.number("psi"),
            options.number("gamma")};
  }

  // 1 - prefix / t, before rounding.
  double kept(int layer) const {
    if (layer <= first_) return 1.0;
    return std::pow(base_, rate_ * (layer - first_) / (num_layers_ - first_));
  }
  int64_t tokens(int layer, int64_t length) const {
    return static_cast<int64_t>(std::floor((1.0 - kept(layer)) * static_cast<double>(length)));
  }

 private:
  int first_, num_layers_;
  double base_, rate_;
};

// Positions of a row's sequence up to now; evictions leave gaps.
inline int64_t sequence_length(const CacheView& view, int row) {
  const int encoded = view.encoded_len(row);
  return (encoded > 0 ? view.position(row, encoded - 1) + 1 : 0) +
         view.tail_len(row / view.num_kv_heads());
}

// The first encoded slot whose position is not below `position`.
inline int32_t first_slot_from(const CacheView& view, int row, int64_t position) {
  int32_t low = 0, high = view.encoded_len(row);
  while (low < high) {
    const int32_t middle = low + (high - low) / 2;
    if (view.position(row, middle) < position) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low;
}

}  // namespace sikv

#endif  // SIKV_KERNELS_COMMON_DEPTH_WINDOWS_H_
