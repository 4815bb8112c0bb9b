// Keeps the budget's best of a row's scored candidates, in one launch of a cluster of blocks a row:
//
//   logits, sums -> probabilities + histogram of 64 bins an octave -> the bin of the cut
//                -> the few keys of that bin, ranked against each other -> cut -> slots in order
//
// A warp has neighbouring candidates and a thread returns to its own keys only, so that nothing but
// counts goes from warp to warp. The blocks of a cluster read each other's through shared memory: 3
// waits of a row, where a barrier over global memory would take 4 us each.
#ifndef SIKV_SELECTORS_SELF_INDEX_SELF_INDEX_KEEP_CUH_
#define SIKV_SELECTORS_SELF_INDEX_SELF_INDEX_KEEP_CUH_

#include <cooperative_groups.h>

#include "selectors/self_index/self_index_rerank.cuh"

namespace sikv::self_index {

inline constexpr int kKeepThreads = 1024, kKeepWarps = kKeepThreads / 32;
inline constexpr unsigned kMaxKeepBlocks = 8;  // of a cluster that every GPU takes
// Keys of a block: 128 KB of shared memory. Where it has more, they take the place of logits.
inline constexpr int kKeepTokens = 32768;
inline constexpr int kKeepBins = 2 * kKeepThreads;
// Keys of a bin that are ranked against each other. Of 8192 probabilities it has about 20.
inline constexpr int kKeepListed = 512;

// Candidates of a warp.
__host__ __device__ constexpr int keep_share(int64_t candidates, int blocks) {
  const int64_t lanes = int64_t{blocks} * kKeepThreads;
  return static_cast<int>((candidates + lanes - 1) / lanes) * 32;
}

// The blocks of a row.
class KeepCluster {
 public:
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  __device__ int rank() const { return static_cast<int>(group().block_rank()); }
  __device__ int size() const { return static_cast<int>(group().num_blocks()); }
  __device__ void sync() const { group().sync(); }
  template <typename T>
  __device__ T* of(T* shared, int rank) const {
    return group().map_shared_rank(shared, rank);
  }

 private:
  __device__ static cooperative_groups::cluster_group group() {
    return cooperative_groups::this_cluster();
  }
#else
  __device__ int rank() const { return 0; }
  __device__ int size() const { return 1; }
  __device__ void sync() const { __syncthreads(); }
  template <typename T>
  __device__ T* of(T* shared, int) const {
    return shared;
  }
#endif
};

struct KeepShared {
  float highest[kMaxGroup], weight[kMaxGroup];
  uint32_t histogram[2][kKeepBins];
  uint32_t listed[kKeepListed], num_listed;  // of this block
  uint32_t all_listed[kKeepListed];          // of the row
  uint32_t warp_sums[kKeepWarps];
  uint32_t bin, rest, bin_count;
  Cut cut;
  uint2 warp_counts[kKeepWarps];       // above the cut, ties
  uint2 block_counts[kMaxKeepBlocks];  // written by each of them
};

// A warp's keys, in shared memory or in the places of the logits they were made of.
struct WarpKeys {
  uint32_t* first;
  int stride, size;

  __device__ uint32_t& operator[](int i) const { return first[int64_t{i} * stride]; }
  // body(i, key) of a lane's keys
  template <typename Body>
  __device__ void each(Body&& body) const {
#pragma unroll 1
    for (int i = threadIdx.x % 32; i < size; i += 32) body(i, (*this)[i]);
  }
};

// Keys of positive floats up to 1, from 2^-32 on in steps of 2^-6 of an octave: rows of a real
// model's probabilities spread over some 10 octaves. What lies outside goes to the ends.
inline constexpr int kFirstBinShift = 17, kFirstBinBase = (127 - 32) << 6;
__device__ inline uint32_t first_bin(uint32_t key) {
  const int bin = static_cast<int>(key >> kFirstBinShift) - kFirstBinBase;
  return static_cast<uint32_t>(min(max(bin, 0), kKeepBins - 1));
}

// shared.bin, .rest and .bin_count: the bin that holds the k-th highest key of the row, how many of
// its keys are needed, how many it has. The cluster's histograms are complete. All threads.
__device__ inline void find_bin(const KeepCluster& cluster, uint32_t* histogram, uint32_t k,
                                KeepShared& shared) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  // Two bins a thread, from the top.
  const int bin = kKeepBins - 2 - 2 * static_cast<int>(threadIdx.x);
  uint2 counts = {0, 0};
#pragma unroll
  for (int rank = 0; rank < static_cast<int>(kMaxKeepBlocks); ++rank) {
    if (rank >= cluster.size()) break;
    const uint2 two = *reinterpret_cast<const uint2*>(cluster.of(histogram, rank) + bin);
    counts.x += two.x, counts.y += two.y;
  }
  const uint32_t own = counts.x + counts.y;
  uint32_t through = own;
#pragma unroll
  for (int distance = 1; distance < 32; distance *= 2) {
    const uint32_t higher = __shfl_up_sync(~0u, through, distance);
    if (lane >= distance) through += higher;
  }
  if (lane == 31) shared.warp_sums[warp] = through;
  __syncthreads();
  const uint32_t above =
      through - own + __reduce_add_sync(~0u, lane < warp ? shared.warp_sums[lane] : 0u);
  if (above < k && k <= above + own) {
    const bool upper = k <= above + counts.y;
    shared.bin = static_cast<uint32_t>(upper ? bin + 1 : bin);
    shared.rest = k - above - (upper ? 0 : counts.y);
    shared.bin_count = upper ? counts.y : counts.x;
  }
  __syncthreads();
}

// The cut of those keys of the row that are in [low, high], of which the `rest` highest of
// kKeepListed at most are needed.
__device__ inline Cut rank_listed(const KeepCluster& cluster, const WarpKeys& keys, uint32_t low,
                                  uint32_t high, uint32_t rest, KeepShared& shared) {
  keys.each([&](int, uint32_t key) {
    if (key >= low && key <= high) shared.listed[atomicAdd(&shared.num_listed, 1u)] = key;
  });
  cluster.sync();
  uint32_t all = 0;
  for (int rank = 0; rank < cluster.size(); ++rank) {
    const uint32_t listed = *cluster.of(&shared.num_listed, rank);
    if (threadIdx.x < listed) {
      shared.all_listed[all + threadIdx.x] = cluster.of(shared.listed, rank)[threadIdx.x];
    }
    all += listed;
  }
  __syncthreads();
  if (threadIdx.x < all) {
    const uint32_t key = shared.all_listed[threadIdx.x];
    uint32_t above = 0, equal = 0;
#pragma unroll 2
    for (uint32_t i = 0; i < all; ++i) {
      above += shared.all_listed[i] > key ? 1u : 0u;
      equal += shared.all_listed[i] == key ? 1u : 0u;
    }
    if (above < rest && rest <= above + equal) shared.cut = {key, rest - above};
  }
  __syncthreads();
  return shared.cut;
}

// The cut of the k highest of the row's keys. shared.histogram[0] counts this block's by first_bin.
__device__ inline Cut find_row_cut(const KeepCluster& cluster, const WarpKeys& keys, uint32_t k,
                                   KeepShared& shared) {
  uint32_t low = 1, high = ~0u;  // [low, high] holds the cut, as the rest-th highest
  uint32_t rest = k;
#pragma unroll 1
  for (int round = 0;; ++round) {
    uint32_t* histogram = shared.histogram[round % 2];
    const int shift = max(21 - __clz(high - low), 0);
    if (round > 0) {
      // Many keys are nearly the same. The histogram of two rounds ago is no longer read by others.
      for (int i = threadIdx.x; i < kKeepBins; i += kKeepThreads) histogram[i] = 0;
      __syncthreads();
      keys.each([&](int, uint32_t key) {
        if (key >= low && key <= high) atomicAdd(&histogram[(key - low) >> shift], 1u);
      });
    }
    cluster.sync();
    find_bin(cluster, histogram, rest, shared);
    rest = shared.rest;
    const uint32_t bin = shared.bin;
    if (round == 0) {
      if (bin > 0) low = (kFirstBinBase + bin) << kFirstBinShift;
      if (bin < kKeepBins - 1) high = ((kFirstBinBase + bin + 1) << kFirstBinShift) - 1;
    } else {
      low += bin << shift;
      high = low + min(high - low, (1u << shift) - 1u);
    }
    if (rest == shared.bin_count) return {low - 1, 0};
    if (low == high) return {low, rest};
    if (shared.bin_count <= kKeepListed) break;
  }
  return rank_listed(cluster, keys, low, high, rest, shared);
}

// Writes the slots of selected keys to their places in `out`: those above the cut and the first of
// those that equal it. first: of the warp in the row.
__device__ inline void write_kept(const KeepCluster& cluster, const WarpKeys& keys, Cut cut,
                                  const CandidateList& list, int first, int32_t* out,
                                  KeepShared& shared) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  uint32_t above = 0, ties = 0;
  keys.each([&](int, uint32_t key) {
    above += key > cut.key ? 1u : 0u;
    ties += key == cut.key ? 1u : 0u;
  });
  above = __reduce_add_sync(~0u, above);
  ties = __reduce_add_sync(~0u, ties);
  if (lane == 0) shared.warp_counts[warp] = make_uint2(above, ties);
  __syncthreads();
  const uint2 warps = shared.warp_counts[lane];
  above = __reduce_add_sync(~0u, lane < warp ? warps.x : 0u);
  ties = __reduce_add_sync(~0u, lane < warp ? warps.y : 0u);
  if (warp == 0) {
    const uint2 block =
        make_uint2(__reduce_add_sync(~0u, warps.x), __reduce_add_sync(~0u, warps.y));
    if (lane < cluster.size()) *cluster.of(&shared.block_counts[cluster.rank()], lane) = block;
  }
  // After this no block reads what another has.
  cluster.sync();
  for (int rank = 0; rank < cluster.rank(); ++rank) {
    above += shared.block_counts[rank].x;
    ties += shared.block_counts[rank].y;
  }
  constexpr int kBatch = 4;  // slots of a thread that are on their way together
  const uint32_t lower = (1u << lane) - 1u;
  for (int base = 0; base < keys.size; base += 32 * kBatch) {
    int slot[kBatch];
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
      slot[j] = list[min(first + base + 32 * j + lane, first + keys.size - 1)];
    }
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
      const int i = base + 32 * j + lane;
      const uint32_t key = i < keys.size ? keys[i] : 0;
      const bool is_above = key > cut.key, is_tie = key != 0 && key == cut.key;
      const uint32_t all_above = __ballot_sync(~0u, is_above),
                     all_ties = __ballot_sync(~0u, is_tie);
      const uint32_t my_ties = ties + __popc(all_ties & lower);
      if (is_above || (is_tie && my_ties < cut.ties)) {
        out[above + __popc(all_above & lower) + min(my_ties, cut.ties)] = slot[j];
      }
      above += __popc(all_above);
      ties += __popc(all_ties);
    }
  }
}

// Of a row with no more candidates than its budget: all of them, ascending.
__device__ inline void keep_all(const RerankArgs& args, const RerankRow& rerank, int row,
                                int32_t* out) {
  const sikv_cache_view& view = args.view;
  const CandidateList& list = rerank.list;
  const int32_t* pinned = view.pinned_slots + int64_t{row} * view.pinned_capacity;
  for (int i = blockIdx.x * kKeepThreads + threadIdx.x; i < list.size();
       i += gridDim.x * kKeepThreads) {
    const int slot = list[i];
    int before = 0;
    bool open = true;
    if (i >= list.num_listed && rerank.closed > 0) {
#pragma unroll 1
      for (int p = 0; p < view.pinned_len[row]; ++p) {
        before += pinned[p] >= list.first_new && pinned[p] < slot ? 1 : 0;
        open = open && pinned[p] != slot;
      }
    }
    if (open) out[i - before] = slot;
  }
}

// Highest logits and weights of the heads' exponentials: one warp a head.
__device__ inline void merge_sums(const RerankArgs& args, const Shares& shares, int place,
                                  KeepShared& shared) {
  const int group = args.step.group, lane = threadIdx.x % 32;
  for (int g = threadIdx.x / 32; g < group; g += kKeepWarps) {
    SoftmaxSum sum;
#pragma unroll 1
    for (int block = shares.first_block(place) + lane; block < shares.end_block(place);
         block += 32) {
      sum.merge(__ldcg(args.sums + int64_t{block + place} * group + g));
    }
    for (int distance = 16; distance > 0; distance /= 2) sum.merge_lanes(distance);
    if (lane == 0) {
      shared.highest[g] = sum.highest;
      shared.weight[g] = 1.0f / (static_cast<float>(group) * sum.sum);
    }
  }
}

// A warp's keys from its logits [keys.size, padded_heads(G)], counted in shared.histogram[0].
// Probabilities are not negative: their bits are ordered as they are.
__device__ inline void make_keys(const RerankArgs& args, const Shares& shares, int place,
                                 const float* logits, const WarpKeys& keys, KeepShared& shared) {
  const int group = args.step.group, pairs = padded_heads(group) / 2, lane = threadIdx.x % 32;
  const auto* from = reinterpret_cast<const float2*>(logits);
  constexpr int kBatch = 4;  // candidates of a thread whose logits are on their way together
  float2 two[kBatch];
  const auto load = [&](int base, int pair) {
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
      const int i = min(base + 32 * j + lane, keys.size - 1);
      if (keys.size > 0) two[j] = __ldcg(from + i * pairs + pair);
    }
  };
  load(0, 0);
  merge_sums(args, shares, place, shared);
  __syncthreads();
  for (int base = 0; base < keys.size; base += 32 * kBatch) {
    float probability[kBatch] = {};
    bool open[kBatch];
    for (int pair = 0; pair < pairs; ++pair) {
      float2 now[kBatch];
#pragma unroll
      for (int j = 0; j < kBatch; ++j) now[j] = two[j];
      if (pair + 1 < pairs) {
        load(base, pair + 1);
      } else {
        load(base + 32 * kBatch, 0);
      }
      const bool both = 2 * pair + 1 < group;
#pragma unroll
      for (int j = 0; j < kBatch; ++j) {
        if (pair == 0) open[j] = now[j].x != -INFINITY;
        probability[j] += power_of_2(now[j].x - shared.highest[2 * pair]) * shared.weight[2 * pair];
        if (both) {
          probability[j] +=
              power_of_2(now[j].y - shared.highest[2 * pair + 1]) * shared.weight[2 * pair + 1];
        }
      }
    }
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
      const int i = base + 32 * j + lane;
      if (i >= keys.size) continue;
      const uint32_t key = open[j] ? __float_as_uint(probability[j]) + 1 : 0;
      keys[i] = key;
      if (key != 0) atomicAdd(&shared.histogram[0][first_bin(key)], 1u);
    }
  }
}

// One thread, of a row with a pool.
__device__ inline void count_step(const Step& step, int row) {
  atomicAdd(reinterpret_cast<unsigned long long*>(step.pool.step + row), 1ull);
  atomicAdd(&step.counts[row].rows, 1ull);
}

// grid (blocks of a cluster, rows)
__global__ void __launch_bounds__(kKeepThreads, 1)
    rerank_keep(const __grid_constant__ RerankArgs args) {
  const Step& step = args.step;
  extern __shared__ uint4 dynamic[];
  __shared__ KeepShared shared;
  const KeepCluster cluster;
  // Begins when all blocks of rerank_score know that the scan is over: so are its writes.
  const Shares shares(args);
  const int place = blockIdx.y, row = row_at(step, place);
  const RerankRow rerank(args, row);
  for (int i = threadIdx.x; i < kKeepBins; i += kKeepThreads) shared.histogram[0][i] = 0;
  if (threadIdx.x == 0) shared.num_listed = 0;
  wait_for_launch_before();
  const bool notes = cluster.rank() == 0 && threadIdx.x == kKeepThreads - 1;
  int32_t* out = args.selection.slots + int64_t{row} * args.selection.capacity;
  const int n = rerank.list.size();
  if (!rerank.ranked) {
    const int kept = rerank.budget <= 0 ? 0 : n - rerank.closed;
    if (kept > 0) keep_all(args, rerank, row, out);
    if (notes) args.selection.counts[row] = kept;
    if (notes && step.pool.state != nullptr) count_step(step, row);
    return;
  }
  const int share = keep_share(n, cluster.size()), warp = threadIdx.x / 32;
  const int first = min((cluster.rank() * kKeepWarps + warp) * share, n);
  float* logits = args.logits + (int64_t{row} * args.most + first) * padded_heads(step.group);
  WarpKeys keys{reinterpret_cast<uint32_t*>(dynamic) + warp * share, 1, min(share, n - first)};
  if (share * kKeepWarps > args.keep_tokens) {
    keys.first = reinterpret_cast<uint32_t*>(logits);
    keys.stride = padded_heads(step.group);
  }
  make_keys(args, shares, place, logits, keys, shared);
  const Cut cut = find_row_cut(cluster, keys, static_cast<uint32_t>(rerank.budget), shared);
  write_kept(cluster, keys, cut, rerank.list, first, out, shared);
  if (notes) {
    args.selection.counts[row] = static_cast<int32_t>(rerank.budget);
    // rerank_score has made copies of all candidates by now.
    if (step.pool.packed.signs != nullptr) step.pool.state[row].packed = 1;
    if (step.pool.state != nullptr) count_step(step, row);
  }
}

}  // namespace sikv::self_index

#endif  // SIKV_SELECTORS_SELF_INDEX_SELF_INDEX_KEEP_CUH_
