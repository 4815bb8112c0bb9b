// What a layer attended to, for the next layer: of a frozen prefix that one looks at nothing else.
#ifndef SIKV_KERNELS_COMMON_FROZEN_PREFIX_H_
#define SIKV_KERNELS_COMMON_FROZEN_PREFIX_H_

#include <algorithm>
#include <cstdint>
#include <iterator>
#include <span>
#include <vector>

namespace sikv {

// Of one (sequence, KV head).
class LayerBelow {
 public:
  // Slots that layer `layer` attended to at `step`: selected and pinned, both ascending.
  void keep(int layer, int64_t step, std::span<const int32_t> selected,
            std::span<const int32_t> pinned) {
    layer_ = layer;
    step_ = step;
    attended_.clear();
    std::merge(selected.begin(), selected.end(), pinned.begin(), pinned.end(),
               std::back_inserter(attended_));
  }
  // Whether it is the layer before `layer`, at the same step.
  bool is_below(int layer, int64_t step) const { return layer_ + 1 == layer && step_ == step; }
  // Its slots before `end` without `pinned`, ascending.
  std::vector<int32_t> before(int32_t end, std::span<const int32_t> pinned) const {
    std::vector<int32_t> slots;
    const auto last = std::lower_bound(attended_.begin(), attended_.end(), end);
    std::set_difference(attended_.begin(), last, pinned.begin(), pinned.end(),
                        std::back_inserter(slots));
    return slots;
  }
  uint64_t bytes() const { return attended_.capacity() * sizeof(int32_t); }

 private:
  int layer_ = -1;
  int64_t step_ = -1;
  std::vector<int32_t> attended_;
};

}  // namespace sikv

#endif  // SIKV_KERNELS_COMMON_FROZEN_PREFIX_H_
