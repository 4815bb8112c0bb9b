// A row's unpinned slots by rank, and budgets on the device: what one thread needs to know of a
// selection without listing it.
#ifndef SIKV_KERNELS_COMMON_THREAD_SELECT_CUH_
#define SIKV_KERNELS_COMMON_THREAD_SELECT_CUH_

#include "plugins/abi/sikv_abi.h"
#include "plugins/sdk/options.h"

namespace sikv::cuda {

// sikv::Budget for kernels.
struct DeviceBudget {
  int64_t count;
  double fraction;

  explicit DeviceBudget(const Budget& budget) : count(budget.count), fraction(budget.fraction) {}
  __device__ int64_t tokens(int64_t length) const {
    return count >= 0 ? count
                      : static_cast<int64_t>(__dmul_rn(fraction, static_cast<double>(length)));
  }
};

// Tokens of a row, encoded and tail.
__device__ inline int row_length(const sikv_cache_view& view, int row) {
  return view.encoded_len[row] + view.tail_len[row / view.num_kv_heads];
}

// The slots of a row less its pinned ones, numbered by rank 0, 1, ... in ascending order.
class Unpinned {
 public:
  __device__ Unpinned(const sikv_cache_view& view, int row)
      : pinned_(view.pinned_slots + int64_t{row} * view.pinned_capacity),
        num_pinned_(view.pinned_capacity > 0 ? view.pinned_len[row] : 0) {}

  // Pinned slots below `slot`.
  __device__ int pinned_below(int slot) const {
    return search([&](int i) { return pinned_[i] < slot; });
  }
  // Unpinned slots below `slot`: the rank of the first one at or after it.
  __device__ int rank(int slot) const { return slot - pinned_below(slot); }
  // The slot of rank u: as many pinned slots lie below it as have at most u unpinned ones below.
  __device__ int slot(int u) const {
    return u + search([&](int i) { return pinned_[i] - i <= u; });
  }

 private:
  // First i that `before` denies.
  template <typename Before>
  __device__ int search(Before&& before) const {
    int low = 0, high = num_pinned_;
    while (low < high) {
      const int middle = (low + high) / 2;
      if (before(middle)) {
        low = middle + 1;
      } else {
        high = middle;
      }
    }
    return low;
  }

  const int32_t* pinned_;
  int num_pinned_;
};

}  // namespace sikv::cuda

#endif  // SIKV_KERNELS_COMMON_THREAD_SELECT_CUH_
