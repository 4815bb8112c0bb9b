// The blocks that share one row of a launch: they merge histograms, wait for each other and write
// one list in order. A top-k over a row's keys therefore takes one launch, and the keys never leave
// the blocks that made them.
//
// Keys are unsigned, higher is better; key 0 marks what cannot be selected.
#ifndef SIKV_SELECTORS_SELF_INDEX_SELF_INDEX_TEAM_CUH_
#define SIKV_SELECTORS_SELF_INDEX_SELF_INDEX_TEAM_CUH_

#include <cstddef>
#include <cstdint>

namespace sikv::self_index {

inline constexpr int kMaxTeam = 512;     // blocks of a row
inline constexpr int kMaxGroup = 16;     // G
inline constexpr int kRadixBins = 4096;  // of the first digit of a key
inline constexpr int kAllRadixBins = kRadixBins + 2 * 1024;
inline constexpr int kCompactTokens = 256;  // keys that a warp compacts at a time

// What a row's blocks share, in device memory that outlives a launch: two sides that take turns. A
// launch clears the other side as it begins, beside its first loads; to find the last block that
// leaves and clear there took 1 us at the end of each scan of 8 rows.
struct alignas(64) TeamState {
  struct Side {
    uint32_t arrived;
    alignas(16) unsigned long long published[kMaxTeam];
    uint32_t histogram[kAllRadixBins];
  };
  uint32_t turn;  // the side of the next launch
  alignas(64) Side sides[2];
};

__device__ inline uint32_t load_acquire(const uint32_t* address) {
  uint32_t value;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(address) : "memory");
  return value;
}

__device__ inline unsigned long long load_relaxed(const unsigned long long* address) {
  unsigned long long value;
  asm volatile("ld.relaxed.gpu.global.u64 %0, [%1];" : "=l"(value) : "l"(address) : "memory");
  return value;
}

// Blocks of a row are neighbours in launch order and no more than the GPU holds at a time, so
// that those waited for are running or next in line.
class Team {
 public:
  // turn: the state's.
  __device__ Team(TeamState* state, uint32_t turn, int rank, int size)
      : state_(state), turn_(turn), side_(&state->sides[turn]), rank_(rank), size_(size) {}

  __device__ int rank() const { return rank_; }
  __device__ int size() const { return size_; }

  // All threads, of every block, before the first barrier: this block's part of the other side, of
  // whose histogram launches use `bins`.
  __device__ void clear_other_side(int bins) const {
    if (size_ == 1) return;
    auto* words = reinterpret_cast<uint4*>(&state_->sides[turn_ ^ 1u]);
    const int n = static_cast<int>((offsetof(TeamState::Side, histogram) + bins * 4) / 16);
    for (int i = rank_ * blockDim.x + threadIdx.x; i < n; i += size_ * blockDim.x) {
      words[i] = uint4{};
    }
  }

  // All threads. What any block of the row wrote before is visible to all after, through L2.
  __device__ void barrier() {
    __syncthreads();
    if (size_ == 1) return;
    ++stage_;
    if (threadIdx.x == 0) {
      // Releases what the whole block wrote: the barrier before orders it.
      asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(&side_->arrived) : "memory");
      while (load_acquire(&side_->arrived) < stage_ * static_cast<uint32_t>(size_)) {
      }
      // All blocks know whose turn it is.
      if (rank_ == 0 && stage_ == 1) state_->turn = turn_ ^ 1u;
    }
    __syncthreads();
  }

  // Adds up histograms [bins] of all blocks, in place in shared memory. `first` is where they meet
  // in the side's histogram. All threads.
  __device__ void merge(uint32_t* histogram, int bins, int first) {
    if (size_ == 1) {
      __syncthreads();
      return;
    }
    __syncthreads();
    for (int i = threadIdx.x; i < bins; i += blockDim.x) {
      if (histogram[i] != 0) atomicAdd(&side_->histogram[first + i], histogram[i]);
    }
    barrier();
    // In fours: half a microsecond less than one by one.
    const auto* merged = reinterpret_cast<const uint4*>(side_->histogram + first);
    for (int i = threadIdx.x; i < bins / 4; i += blockDim.x) {
      reinterpret_cast<uint4*>(histogram)[i] = __ldcg(merged + i);
    }
    __syncthreads();
  }

  // Tells the blocks behind this one two numbers below 2^31. One thread, once per launch.
  __device__ void publish(uint32_t a, uint32_t b) {
    const unsigned long long value = 1ull << 63 | static_cast<unsigned long long>(a) << 32 | b;
    asm volatile("st.relaxed.gpu.global.u64 [%0], %1;" ::"l"(&side_->published[rank_]), "l"(value)
                 : "memory");
  }
  // What block `rank` published, as soon as it has.
  __device__ uint2 published(int rank) const {
    unsigned long long value = 0;
    while (value == 0) value = load_relaxed(&side_->published[rank]);
    return {static_cast<uint32_t>(value >> 32) & 0x7fffffffu, static_cast<uint32_t>(value)};
  }

 private:
  TeamState* state_;
  uint32_t turn_;
  TeamState::Side* side_;
  int rank_, size_;
  uint32_t stage_ = 0;
};

// Selected are the keys above `key` and the first `ties` that equal it.
struct Cut {
  uint32_t key;
  uint32_t ties;
};

template <int kThreads>
struct SelectScratch {
  Cut cut;
  uint32_t bin_count;  // keys of the bin that was found
  uint32_t warp_above[kThreads / 32], warp_ties[kThreads / 32];
  uint32_t before_above, before_ties;
};

// The bin of histogram [bins] that holds the k-th highest key, 1 <= k <= their number; `ties` is
// then how many of that bin are needed. bins is a multiple of kThreads / 32 * 32. All threads; the
// histogram is complete.
template <int kThreads>
__device__ Cut find_cut(const uint32_t* histogram, int bins, uint32_t k,
                        SelectScratch<kThreads>& scratch) {
  constexpr int kWarps = kThreads / 32;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, segment = bins / kWarps;
  uint32_t sum = 0;
  for (int i = lane; i < segment; i += 32) sum += histogram[warp * segment + i];
  sum = __reduce_add_sync(~0u, sum);
  if (lane == 0) scratch.warp_above[warp] = sum;
  __syncthreads();
  if (warp == 0) {
    // The segment that holds it, from the top; then the lane of the segment.
    const auto through = [&](uint32_t x) {
      for (int distance = 1; distance < 32; distance *= 2) {
        const uint32_t higher = __shfl_up_sync(~0u, x, distance);
        if (lane >= distance) x += higher;
      }
      return x;
    };
    const uint32_t own = lane < kWarps ? scratch.warp_above[kWarps - 1 - lane] : 0;
    const uint32_t sums = through(own);
    const int from_top = __ffs(__ballot_sync(~0u, sums >= k)) - 1;
    uint32_t above = __shfl_sync(~0u, sums - own, max(from_top, 0));
    const int per = segment / 32;
    const int end = (kWarps - max(from_top, 0)) * segment - lane * per;
    sum = 0;
    for (int i = 1; i <= per; ++i) sum += histogram[end - i];
    above += through(sum) - sum;
    if (above < k && k <= above + sum) {
      int bin = end - 1;
      while (above + histogram[bin] < k) above += histogram[bin--];
      scratch.cut = {static_cast<uint32_t>(bin), k - above};
      scratch.bin_count = histogram[bin];
    }
  }
  __syncthreads();
  return scratch.cut;
}

// The cut of the k highest of the team's keys, 1 <= k <= their number: digits of 12, 10 and 10
// bits, highest first, until what shares the digits found so far is needed as a whole. key_at(i), i
// in [0, n), are this block's; histogram [kRadixBins] is scratch.
template <int kThreads, typename KeyAt>
__device__ Cut find_radix_cut(Team& team, KeyAt&& key_at, int n, uint32_t k, uint32_t* histogram,
                              SelectScratch<kThreads>& scratch) {
  uint32_t prefix = 0;
  for (int digit = 0; digit < 3; ++digit) {
    const int shift = digit == 0 ? 20 : digit == 1 ? 10 : 0, bits = digit == 0 ? 12 : 10;
    const uint32_t mask = (1u << bits) - 1u;
    for (int i = threadIdx.x; i < 1 << bits; i += kThreads) histogram[i] = 0;
    __syncthreads();
    for (int i = threadIdx.x; i < n; i += kThreads) {
      const uint32_t key = key_at(i);
      const bool counts = key != 0 && (digit == 0 || key >> (shift + bits) == prefix);
      if (counts) atomicAdd(&histogram[key >> shift & mask], 1u);
    }
    team.merge(histogram, 1 << bits, digit == 0 ? 0 : kRadixBins + (digit - 1) * 1024);
    const Cut cut = find_cut<kThreads>(histogram, 1 << bits, k, scratch);
    prefix = prefix << bits | cut.key;
    k = cut.ties;
    // Key 0 is not counted, so what is needed as a whole begins above 0.
    if (scratch.bin_count == k) return {max(prefix << shift, 1u) - 1u, 0};
  }
  return {prefix, k};
}

// 8 neighbouring keys, 16-byte aligned.
__device__ inline void load_keys(const uint16_t* keys, uint32_t (&out)[8]) {
  const uint4 packed = *reinterpret_cast<const uint4*>(keys);
  const uint32_t words[4] = {packed.x, packed.y, packed.z, packed.w};
#pragma unroll
  for (int i = 0; i < 8; ++i) out[i] = i % 2 == 0 ? words[i / 2] & 0xffffu : words[i / 2] >> 16;
}
__device__ inline void load_keys(const uint32_t* keys, uint32_t (&out)[8]) {
  const uint4 low = reinterpret_cast<const uint4*>(keys)[0];
  const uint4 high = reinterpret_cast<const uint4*>(keys)[1];
  const uint32_t words[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
  for (int i = 0; i < 8; ++i) out[i] = words[i];
}

// Writes slot_of(i) of every selected key i of this block to its place in the row's list `out`, in
// the order of ranks and keys. keys [n], zero from n to the next multiple of kCompactTokens.
template <int kThreads, typename Key, typename SlotOf>
__device__ void compact(Team& team, const Key* keys, int n, Cut cut, int32_t* out, SlotOf&& slot_of,
                        SelectScratch<kThreads>& scratch) {
  constexpr int kWarps = kThreads / 32;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int steps = (n + kCompactTokens - 1) / kCompactTokens;
  const int per_warp = (steps + kWarps - 1) / kWarps;
  const int first = min(warp * per_warp, steps), last = min(first + per_warp, steps);

  uint32_t above = 0, ties = 0;
  for (int step = first; step < last; ++step) {
    uint32_t key[8];
    load_keys(keys + step * kCompactTokens + lane * 8, key);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      above += key[i] > cut.key ? 1u : 0u;
      ties += key[i] == cut.key ? 1u : 0u;
    }
  }
  above = __reduce_add_sync(~0u, above);
  ties = __reduce_add_sync(~0u, ties);
  if (lane == 0) scratch.warp_above[warp] = above, scratch.warp_ties[warp] = ties;
  if (threadIdx.x == 0) scratch.before_above = scratch.before_ties = 0;
  __syncthreads();
  if (team.size() > 1) {
    if (warp == 0) {
      const uint32_t all_above =
          __reduce_add_sync(~0u, lane < kWarps ? scratch.warp_above[lane] : 0u);
      const uint32_t all_ties =
          __reduce_add_sync(~0u, lane < kWarps ? scratch.warp_ties[lane] : 0u);
      if (lane == 0) team.publish(all_above, all_ties);
    }
    for (int rank = threadIdx.x; rank < team.rank(); rank += kThreads) {
      const uint2 counts = team.published(rank);
      atomicAdd(&scratch.before_above, counts.x);
      atomicAdd(&scratch.before_ties, counts.y);
    }
    __syncthreads();
  }
  above =
      scratch.before_above + __reduce_add_sync(~0u, lane < warp ? scratch.warp_above[lane] : 0u);
  ties = scratch.before_ties + __reduce_add_sync(~0u, lane < warp ? scratch.warp_ties[lane] : 0u);

  for (int step = first; step < last; ++step) {
    uint32_t key[8], counts = 0;  // above, and ties in the upper half
    load_keys(keys + step * kCompactTokens + lane * 8, key);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      counts += (key[i] > cut.key ? 1u : 0u) + (key[i] == cut.key ? 0x10000u : 0u);
    }
    if (!__any_sync(~0u, counts != 0)) continue;
    uint32_t through = counts;
#pragma unroll
    for (int distance = 1; distance < 32; distance *= 2) {
      const uint32_t lower = __shfl_up_sync(~0u, through, distance);
      if (lane >= distance) through += lower;
    }
    const uint32_t before = through - counts, total = __shfl_sync(~0u, through, 31);
    uint32_t my_above = above + (before & 0xffffu), my_ties = ties + (before >> 16);
    if (counts != 0) {
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const bool is_above = key[i] > cut.key, is_tie = key[i] == cut.key;
        if (is_above || (is_tie && my_ties < cut.ties)) {
          out[my_above + min(my_ties, cut.ties)] = slot_of(step * kCompactTokens + lane * 8 + i);
        }
        my_above += is_above ? 1u : 0u;
        my_ties += is_tie ? 1u : 0u;
      }
    }
    above += total & 0xffffu;
    ties += total >> 16;
  }
}

}  // namespace sikv::self_index

#endif  // SIKV_SELECTORS_SELF_INDEX_SELF_INDEX_TEAM_CUH_
