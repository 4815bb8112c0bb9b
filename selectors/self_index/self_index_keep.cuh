// Keeps the budget's best of a row's scored candidates, in one launch of a cluster of blocks a row:
//
//   logits, sums -> probabilities + histogram of 32 bins an octave -> the bin of the cut
//                -> the few keys of that bin, ranked against each other -> cut -> slots in order
//
// A warp has neighbouring candidates and a thread returns to its own keys only, so that nothing but
// counts goes from warp to warp. The blocks of a cluster read each other's histograms and write
// each other's lists in shared memory: two waits of a row, 0.8 us each, where a barrier over global
// memory would take 4. All of this is latency: with 1024 threads, clusters of 8 and a third wait it
// took 15.5 us at 8 rows instead of 10.6, for more warps to issue and more histograms to read.
#ifndef SIKV_SELECTORS_SELF_INDEX_SELF_INDEX_KEEP_CUH_
#define SIKV_SELECTORS_SELF_INDEX_SELF_INDEX_KEEP_CUH_

#include <cooperative_groups.h>

#include "selectors/self_index/self_index_rerank.cuh"

namespace sikv::self_index {

inline constexpr int kKeepThreads = 512, kKeepWarps = kKeepThreads / 32;
inline constexpr unsigned kMaxKeepBlocks = 4;
// Keys of a block: 96 KB of shared memory, or what the GPU has. Where it has more keys, they take the place of logits.
inline constexpr int kKeepTokens = 24576;
inline constexpr int kKeepBits = 10, kKeepBins = 1 << kKeepBits;  // two a thread
// Keys of a bin that are ranked against each other. Of 8192 probabilities it has about 30.
inline constexpr int kKeepListed = 256;
static_assert(kKeepBins == 2 * kKeepThreads && kKeepListed <= kKeepThreads &&
              kMaxGroup <= kKeepWarps);

// Candidates of a warp.
__host__ __device__ constexpr int keep_share(int candidates, int blocks) {
  return (candidates + blocks * kKeepThreads - 1) / (blocks * kKeepThreads) * 32;
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
  // Written by each block of the row, in all of them.
  uint32_t listed[kMaxKeepBlocks][kKeepListed], num_listed[kMaxKeepBlocks];
  uint32_t own_listed;
  uint32_t warp_sums[kKeepWarps];
  uint32_t bin, rest, bin_count;
  // Keys of the blocks before this one: in that bin, above the cut, equal to it.
  uint32_t lower_bin, lower_above, lower_ties;
  Cut cut;
  uint2 warp_counts[kKeepWarps];  // above the cut, ties
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

// Keys of positive floats up to 1, from 2^-32 on in steps of 2^-5 of an octave: rows of a real
// model's probabilities spread over some 10 octaves. What lies outside goes to the ends.
inline constexpr int kFirstBinShift = 18, kFirstBinBase = (127 - 32) << 5;
static_assert(32 << 5 == kKeepBins);
__device__ inline uint32_t first_bin(uint32_t key) {
  const int bin = static_cast<int>(key >> kFirstBinShift) - kFirstBinBase;
  return static_cast<uint32_t>(min(max(bin, 0), kKeepBins - 1));
}

// shared.bin, .rest and .bin_count: the bin that holds the k-th highest key of the row, how many of
// its keys are needed, how many it has. The cluster's histograms are complete. All threads;
// .lower_above and .lower_bin are complete after the next barrier.
__device__ inline void find_bin(const KeepCluster& cluster, uint32_t* histogram, uint32_t k,
                                KeepShared& shared) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  // Two bins a thread, from the top.
  const int bin = kKeepBins - 2 - 2 * static_cast<int>(threadIdx.x);
  uint2 counts = {0, 0}, lower = {0, 0};
#pragma unroll
  for (int rank = 0; rank < static_cast<int>(kMaxKeepBlocks); ++rank) {
    if (rank >= cluster.size()) break;
    const uint2 two = *reinterpret_cast<const uint2*>(cluster.of(histogram, rank) + bin);
    counts.x += two.x, counts.y += two.y;
    if (rank < cluster.rank()) lower.x += two.x, lower.y += two.y;
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
    shared.lower_bin = upper ? lower.y : lower.x;
  }
  __syncthreads();
  const int found = static_cast<int>(shared.bin);
  const uint32_t lower_above =
      __reduce_add_sync(~0u, (bin > found ? lower.x : 0u) + (bin + 1 > found ? lower.y : 0u));
  if (lane == 0 && lower_above > 0) atomicAdd(&shared.lower_above, lower_above);
}

// The cut of those keys of the row that are in [low, high], kKeepListed at most, of which the
// `rest` highest are needed.
__device__ inline Cut rank_listed(const KeepCluster& cluster, const WarpKeys& keys, uint32_t low,
                                  uint32_t high, uint32_t rest, KeepShared& shared) {
  keys.each([&](int, uint32_t key) {
    if (key < low || key > high) return;
    uint32_t* place = &shared.listed[cluster.rank()][atomicAdd(&shared.own_listed, 1u)];
    for (int rank = 0; rank < cluster.size(); ++rank) *cluster.of(place, rank) = key;
  });
  __syncthreads();
  if (static_cast<int>(threadIdx.x) < cluster.size()) {
    *cluster.of(&shared.num_listed[cluster.rank()], threadIdx.x) = shared.own_listed;
  }
  // After this no block reaches into another.
  cluster.sync();
  // Four threads a key.
  uint32_t all = 0;
  for (int rank = 0; rank < cluster.size(); ++rank) all += shared.num_listed[rank];
  const auto find_listed = [&](uint32_t i, int& block) {
    for (block = 0; i >= shared.num_listed[block]; ++block) i -= shared.num_listed[block];
    return shared.listed[block][i];
  };
  const uint32_t part = threadIdx.x % 4;
#pragma unroll 1
  for (uint32_t first = 0; first < all; first += kKeepThreads / 4) {
    const uint32_t i = min(first + threadIdx.x / 4, all - 1);
    int block;
    const uint32_t key = find_listed(i, block);
    uint32_t counts = 0;  // above, and equal in the upper half
    for (int rank = 0; rank < cluster.size(); ++rank) {
      const uint32_t* others = shared.listed[rank];
#pragma unroll 4
      for (uint32_t j = part; j < shared.num_listed[rank]; j += 4) {
        counts += (others[j] > key ? 1u : 0u) + (others[j] == key ? 0x10000u : 0u);
      }
    }
    counts += __shfl_xor_sync(~0u, counts, 1);
    counts += __shfl_xor_sync(~0u, counts, 2);
    const uint32_t above = counts & 0xffffu, equal = counts >> 16;
    if (above < rest && rest <= above + equal) shared.cut = {key, rest - above};
  }
  __syncthreads();
  const Cut cut = shared.cut;
  if (threadIdx.x < all) {
    int block;
    const uint32_t key = find_listed(threadIdx.x, block);
    if (block < cluster.rank()) {
      if (key > cut.key) atomicAdd(&shared.lower_above, 1u);
      if (key == cut.key) atomicAdd(&shared.lower_ties, 1u);
    }
  }
  return cut;
}

// The cut of the k highest of the row's keys. shared.histogram[0] counts this block's by first_bin.
// All threads; shared.lower_above and .lower_ties are complete after the next barrier.
__device__ inline Cut find_row_cut(const KeepCluster& cluster, const WarpKeys& keys, uint32_t k,
                                   KeepShared& shared) {
  uint32_t low = 1, high = ~0u;  // [low, high] holds the cut, as the rest-th highest
  uint32_t rest = k;
#pragma unroll 1
  for (int round = 0;; ++round) {
    uint32_t* histogram = shared.histogram[round % 2];
    const int shift = max(32 - kKeepBits - __clz(high - low), 0);
    if (round > 0) {
      // Many keys are nearly the same. The histogram of two rounds ago is no longer read by others.
      for (int i = 0; i < kKeepBins; i += kKeepThreads) histogram[i + threadIdx.x] = 0;
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
    const bool whole = rest == shared.bin_count;
    if (whole || low == high) {
      if (threadIdx.x == 0) {
        atomicAdd(whole ? &shared.lower_above : &shared.lower_ties, shared.lower_bin);
      }
      cluster.sync();  // others may still read this block's histogram
      return whole ? Cut{low - 1, 0} : Cut{low, rest};
    }
    if (shared.bin_count <= kKeepListed) break;
  }
  return rank_listed(cluster, keys, low, high, rest, shared);
}

constexpr int kKeepBatch = 4;  // candidates of a thread whose data are on their way together

// Slots of a warp's candidates from first + base on.
__device__ inline void load_slots(const CandidateList& list, int first, int base, int size,
                                  int (&slot)[kKeepBatch]) {
#pragma unroll
  for (int j = 0; j < kKeepBatch; ++j) {
    const int i = base + 32 * j + static_cast<int>(threadIdx.x) % 32;
    if (size > 0) slot[j] = list[first + min(i, size - 1)];
  }
}

// Writes the slots of selected keys to their places in `out`: those above the cut and the first of
// those that equal it. first: of the warp in the row; slot: its first ones.
__device__ inline void write_kept(const WarpKeys& keys, Cut cut, const CandidateList& list,
                                  int first, int (&slot)[kKeepBatch], int32_t* out,
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
  const uint2 before = lane < warp ? shared.warp_counts[lane] : make_uint2(0, 0);
  above = shared.lower_above + __reduce_add_sync(~0u, before.x);
  ties = shared.lower_ties + __reduce_add_sync(~0u, before.y);
  const uint32_t lower = (1u << lane) - 1u;
#pragma unroll 1
  for (int base = 0; base < keys.size; base += 32 * kKeepBatch) {
    if (base > 0) load_slots(list, first, base, keys.size, slot);
#pragma unroll
    for (int j = 0; j < kKeepBatch; ++j) {
      const int i = base + 32 * j + lane;
      const uint32_t key = i < keys.size ? keys[i] : 0;
      const bool is_above = key > cut.key, is_tie = key != 0 && key == cut.key;
      const uint32_t all_above = __ballot_sync(~0u, is_above);
      const uint32_t all_ties = __ballot_sync(~0u, is_tie);
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
#pragma unroll 1
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

// A warp's keys from its logits [keys.size, padded_heads(G)], counted in shared.histogram[0].
// Probabilities are not negative: their bits are ordered as they are. sums: of the row's score
// blocks [num_sums, G].
__device__ inline void make_keys(int group, const float2* sums, int num_sums, const float* logits,
                                 const WarpKeys& keys, KeepShared& shared) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, quads = padded_heads(group) / 4;
  const auto* from = reinterpret_cast<const float4*>(logits);
  float4 four[kKeepBatch];
  const auto load = [&](int base, int quad) {
#pragma unroll
    for (int j = 0; j < kKeepBatch; ++j) {
      if (keys.size > 0)
        four[j] = __ldcg(from + min(base + 32 * j + lane, keys.size - 1) * quads + quad);
    }
  };
  // A warp a head; its sums are asked for before the logits.
  float2 pair = {-FLT_MAX, 0.0f};
  if (warp < group && lane < num_sums) pair = __ldcg(sums + lane * group + warp);
  load(0, 0);
  if (warp < group) {
    SoftmaxSum sum;
    sum.merge(pair);
#pragma unroll 1
    for (int i = lane + 32; i < num_sums; i += 32) sum.merge(__ldcg(sums + i * group + warp));
    for (int distance = 16; distance > 0; distance /= 2) sum.merge_lanes(distance);
    if (lane == 0) {
      shared.highest[warp] = sum.highest;
      shared.weight[warp] = 1.0f / (static_cast<float>(group) * sum.sum);
    }
  }
  __syncthreads();
#pragma unroll 1
  for (int base = 0; base < keys.size; base += 32 * kKeepBatch) {
    float probability[kKeepBatch] = {};
    bool open[kKeepBatch];
#pragma unroll 1
    for (int quad = 0; quad < quads; ++quad) {
      if (base > 0 || quad > 0) load(base, quad);
      const float* highest = shared.highest + 4 * quad;
      const float* weight = shared.weight + 4 * quad;
      const int heads = group - 4 * quad;
#pragma unroll
      for (int j = 0; j < kKeepBatch; ++j) {
        if (quad == 0) open[j] = four[j].x != -INFINITY;
        float& p = probability[j];
        p += power_of_2(four[j].x - highest[0]) * weight[0];
        if (heads > 1) p += power_of_2(four[j].y - highest[1]) * weight[1];
        if (heads > 2) p += power_of_2(four[j].z - highest[2]) * weight[2];
        if (heads > 3) p += power_of_2(four[j].w - highest[3]) * weight[3];
      }
    }
#pragma unroll
    for (int j = 0; j < kKeepBatch; ++j) {
      const int i = base + 32 * j + lane;
      if (i >= keys.size) continue;
      const uint32_t key = open[j] ? __float_as_uint(probability[j]) + 1 : 0;
      keys[i] = key;
      if (key != 0) atomicAdd(&shared.histogram[0][first_bin(key)], 1u);
    }
  }
}

// One thread. ranked: candidates whose keys were read.
__device__ inline void count_step(const RerankArgs& args, int row, int ranked) {
  const Step& step = args.step;
  if (ranked > 0) {
    const int exact = args.view.pinned_len[row] + args.view.tail_len[row / args.view.num_kv_heads];
    const int64_t bytes =
        ranked * step.key_page_bytes / SIKV_PAGE_TOKENS + exact * step.exact_key_bytes;
    atomicAdd(&step.counts[row].read, static_cast<unsigned long long>(bytes));
  }
  if (step.pool.state == nullptr) return;  // whose scan has counted it
  atomicAdd(reinterpret_cast<unsigned long long*>(step.pool.step + row), 1ull);
  atomicAdd(&step.counts[row].rows, 1ull);
}

// grid (blocks of a cluster, rows)
__global__ void __launch_bounds__(kKeepThreads, 2)
    rerank_keep(const __grid_constant__ RerankArgs args) {
  const Step& step = args.step;
  extern __shared__ uint4 dynamic[];
  __shared__ KeepShared shared;
  const KeepCluster cluster;
  // Begins when all blocks of rerank_score know that the scan is over: so are its writes.
  const Shares shares(args);
  const int place = blockIdx.y, row = row_at(step, place);
  const RerankRow rerank(args, row);
  for (int i = 0; i < kKeepBins; i += kKeepThreads) shared.histogram[0][i + threadIdx.x] = 0;
  if (threadIdx.x == 0) shared.own_listed = shared.lower_above = shared.lower_ties = 0;
  const int n = rerank.list.size(), warp = threadIdx.x / 32;
  const int share = keep_share(n, cluster.size());
  const int first = min((cluster.rank() * kKeepWarps + warp) * share, n);
  float* logits = args.logits + (int64_t{row} * args.most + first) * padded_heads(step.group);
  WarpKeys keys{reinterpret_cast<uint32_t*>(dynamic) + warp * share, 1, min(share, n - first)};
  if (share * kKeepWarps > args.keep_tokens) {
    keys.first = reinterpret_cast<uint32_t*>(logits);
    keys.stride = padded_heads(step.group);
  }
  const int first_block = shares.first_block(place);
  const int num_sums = shares.blocks(place);
  const float2* sums = args.sums + int64_t{first_block} * step.group;
  int slot[kKeepBatch];
  load_slots(rerank.list, first, 0, keys.size, slot);
  cuda::wait_for_launch_before();
  cuda::start_next_launch();
  const bool notes = cluster.rank() == 0 && threadIdx.x == kKeepThreads - 1;
  int32_t* out = args.selection.slots + int64_t{row} * args.selection.capacity;
  if (!rerank.ranked) {
    const int kept = rerank.budget <= 0 ? 0 : n - rerank.closed;
    if (kept > 0) keep_all(args, rerank, row, out);
    if (notes) args.selection.counts[row] = kept;
    if (notes) count_step(args, row, 0);
    return;
  }
  make_keys(step.group, sums, num_sums, logits, keys, shared);
  const Cut cut = find_row_cut(cluster, keys, static_cast<uint32_t>(rerank.budget), shared);
  write_kept(keys, cut, rerank.list, first, slot, out, shared);
  if (notes) {
    args.selection.counts[row] = static_cast<int32_t>(rerank.budget);
    // rerank_score has made copies of all candidates by now.
    if (step.pool.packed.signs != nullptr) step.pool.state[row].packed = 1;
    count_step(args, row, n - rerank.closed);
  }
}

}  // namespace sikv::self_index

#endif  // SIKV_SELECTORS_SELF_INDEX_SELF_INDEX_KEEP_CUH_
