// Ranks a row's candidates by their decoded keys and keeps the budget's best.
//
//   rerank_score   many blocks a row: logits of candidates, pinned tokens and tail, softmax sums
//   rerank_keep    one block a row, as far as its shared memory goes: probabilities, cut, slots
//
// Nothing but the launch between them makes a row's blocks wait for each other: a barrier over
// global memory takes 4 us where several would be needed.
#ifndef SIKV_SELECTORS_SELF_INDEX_SELF_INDEX_RERANK_CUH_
#define SIKV_SELECTORS_SELF_INDEX_SELF_INDEX_RERANK_CUH_

#include <cfloat>

#include "kernels/common/warp_rows.cuh"
#include "selectors/self_index/self_index_args.cuh"
#include "selectors/self_index/self_index_softmax.cuh"
#include "selectors/self_index/self_index_team.cuh"

namespace sikv::self_index {

inline constexpr int kRerankThreads = 256;
// Of rerank_score on a multiprocessor: a third one spills and gains nothing.
inline constexpr int kScoreBlocks = 2;
inline constexpr int kKeepThreads = 1024;
// Keys of a block of rerank_keep: 128 KB of shared memory.
inline constexpr int kKeepTokens = 32768;

// Candidates of a row: what a scan found, and the slots encoded since.
struct CandidateList {
  const int32_t* listed;
  int num_listed, first_new, num_new;

  __device__ int size() const { return num_listed + num_new; }
  __device__ int operator[](int i) const {
    return i < num_listed ? listed[i] : first_new + (i - num_listed);
  }
};

// Candidates are scored a window at a time, while the next one is looked up: a token's planes lie
// behind its slot and its page, two more waits of half a microsecond. (To prefetch the planes too
// moves 324 bytes of a token instead of 256, and costs more than it hides.)
inline constexpr int kWindow = kRerankThreads;

struct Place {
  int32_t page;   // number in the pool, -1: not open
  int32_t token;  // in the page
};

struct ScoreShared {
  float shift[kMaxGroup];
  float2 sums[2 * kRerankThreads / 32][kMaxGroup];  // encoded, then exact, of each warp
  Place places[2][kWindow];
};

// A row's candidates and how many of them are kept.
struct RerankRow {
  CandidateList list;
  int closed;  // pinned ones among the new slots
  int64_t budget;
  bool ranked;  // there are more than fit

  // All threads.
  __device__ RerankRow(const RerankArgs& args, int row) {
    const Step& step = args.step;
    list = {args.candidates + int64_t{row} * args.capacity, 0, 0, 0};
    if (step.pool.state != nullptr) {
      const PoolState& state = step.pool.state[row];
      list = {step.pool.slots + int64_t{row} * step.pool.capacity, state.pool_count,
              state.scanned_len, args.view.encoded_len[row] - state.scanned_len};
      list.num_new = min(list.num_new, static_cast<int>(args.most) - list.num_listed);
    } else {
      list.num_listed = args.found[row];
    }
    closed = list.num_new > 0
                 ? count_pinned(args.view, row, list.first_new, list.first_new + list.num_new)
                 : 0;
    budget = min(row_budget(step, args.view, row), int64_t{args.selection.capacity});
    ranked = budget > 0 && list.size() - closed > budget;
  }
};

// Candidates of each of `blocks` blocks.
__device__ inline int share_of(int candidates, int blocks, int unit) {
  return (candidates + blocks * unit - 1) / (blocks * unit) * unit;
}

__device__ inline bool is_pinned(const sikv_cache_view& view, int row, int slot) {
  const int32_t* slots = view.pinned_slots + int64_t{row} * view.pinned_capacity;
  const int n = view.pinned_len[row];
  for (int i = 0; i < n; ++i) {
    if (slots[i] == slot) return true;
  }
  return false;
}

// -inf marks what cannot be selected; a query that is not finite must not add to that.
__device__ inline float open_logit(float logit) { return fmaxf(logit, -FLT_MAX); }

// q_exact, q_stored [G, D] and shift [G]: the queries times scale * log2(e), so that logits are
// powers of two; as they are, in the stored keys' space, and what the latter lack.
__device__ inline void prepare_queries(const RerankArgs& args, int row, float* q_exact,
                                       float* q_stored, float* shift) {
  const int head_dim = args.view.head_dim, lane = threadIdx.x % 32;
  const float scale = args.step.scale * 1.4426950408889634f;
  const int64_t first = first_query(args.step, args.view, row);
  for (int g = threadIdx.x / 32; g < args.step.group; g += kRerankThreads / 32) {
    float q[cuda::kMaxLaneChannels] = {};
#pragma unroll
    for (int i = 0; i < cuda::kMaxLaneChannels; ++i) {
      const int d = lane + 32 * i;
      if (32 * i >= head_dim) continue;
      q[i] = scale * load_element(args.step.q, args.view.dtype, first + int64_t{g} * head_dim + d);
      q_exact[g * head_dim + d] = q[i];
    }
    const float missing = cuda::warp_key_shift(args.keys, row, q);
    if (lane == 0) shift[g] = missing;
    cuda::warp_prepare_query(args.keys, row, q);
#pragma unroll
    for (int i = 0; i < cuda::kMaxLaneChannels; ++i) {
      if (32 * i < head_dim) q_stored[g * head_dim + lane + 32 * i] = q[i];
    }
  }
}

// Which copies of a row's keys are read or written: from `first` on, in the order of its list.
struct PackedUse {
  PoolKeys keys;
  int64_t first;
  bool read, write;
};

template <cuda::TileKeys kTile>
__device__ inline void read_packed(const PoolKeys& packed, int64_t token, int i,
                                   cuda::KeyTile<kTile>& tile) {
  const int64_t part = token * 4 + threadIdx.x % 4;
  const uint32_t signs = __ldcs(packed.signs + part);
  const uint2 levels = __ldcs(packed.levels + part);
  tile.levels[i][0] = levels.x, tile.levels[i][1] = levels.y;
  if constexpr (cuda::KeyTile<kTile>::kLines) {
    tile.index[i][0] = signs;
  } else {
    tile.shift[i] = 0;
#pragma unroll
    for (int w = 0; w < 8; ++w) tile.index[i][w] = signs >> (4 * w);
  }
  if constexpr (cuda::has_levels(kTile)) {
    tile.scale[i].x = __ldcs(static_cast<const unsigned short*>(packed.scales) + token);
  } else {
    tile.scale[i] = __ldcs(static_cast<const uint4*>(packed.scales) + token);
  }
}

template <cuda::TileKeys kTile>
__device__ inline void write_packed(const cuda::KeyTile<kTile>& tile, int i, int64_t token,
                                    const PoolKeys& packed) {
  const int64_t part = token * 4 + threadIdx.x % 4;
  uint32_t signs = 0;
  if constexpr (cuda::KeyTile<kTile>::kLines) {
    signs = tile.index[i][0];
  } else {
#pragma unroll
    for (int w = 0; w < 8; ++w) signs |= (tile.index[i][w] >> tile.shift[i] & 15u) << (4 * w);
  }
  packed.signs[part] = signs;
  packed.levels[part] = make_uint2(tile.levels[i][0], tile.levels[i][1]);
  if (threadIdx.x % 4 != 0) return;
  if constexpr (cuda::has_levels(kTile)) {
    static_cast<unsigned short*>(packed.scales)[token] =
        static_cast<unsigned short>(tile.scale[i].x);
  } else {
    static_cast<uint4*>(packed.scales)[token] = tile.scale[i];
  }
}

// Writes logits [last - first, padded_heads(G)] of candidates [first, last) and leaves each warp's
// sums in shared.sums. Candidates that turn out to be pinned get -inf.
template <RerankKeys kKeys>
__device__ void score_candidates(const RerankArgs& args, int row, const CandidateList& list,
                                 int first, int last, const PackedUse& packed,
                                 const float* q_stored, float* logits, ScoreShared& shared) {
  const sikv_cache_view& view = args.view;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  constexpr int kWarps = kRerankThreads / 32;
  const int group = args.step.group, padded = padded_heads(group);
  if constexpr (kKeys != RerankKeys::kUnits) {
    constexpr auto kTile = kKeys == RerankKeys::kLevels3       ? cuda::TileKeys::kLevels3
                           : kKeys == RerankKeys::kLineLevels3 ? cuda::TileKeys::kLineLevels3
                                                               : cuda::TileKeys::kSignMinMax2;
    __shared__ cuda::TileQuery queries[kMaxGroup / 8];
    const auto prefetch = [](const void* line) {
      asm volatile("prefetch.global.L2 [%0];" ::"l"(line));
    };
    // Looks up one candidate of a window; copies are asked for, as they lie one after the other.
    const auto stage = [&](int window) {
      const int candidate = first + window * kWindow + threadIdx.x;
      if (candidate >= last) return;
      if (packed.read && candidate < list.num_listed) {
        if (threadIdx.x % 2 == 0) prefetch(packed.keys.signs + (packed.first + candidate) * 4);
        prefetch(packed.keys.levels + (packed.first + candidate) * 4);
        return;
      }
      const int slot = list[candidate];
      const bool open = candidate < list.num_listed || !is_pinned(view, row, slot);
      const int64_t page = cuda::page_number(view, row, slot / SIKV_PAGE_TOKENS);
      const int token = slot % SIKV_PAGE_TOKENS;
      shared.places[window % 2][threadIdx.x] = {open ? static_cast<int32_t>(page) : -1, token};
    };
    stage(0);
    for (int set = 0; set * 8 < group; ++set) {
      cuda::build_tile_query<kTile>(q_stored + set * 8 * cuda::kTileDim, min(group - set * 8, 8),
                                    queries[set]);
    }
    __syncthreads();
    SoftmaxSum sums[kMaxGroup / 8][2];
    for (int window = 0; first + window * kWindow < last; ++window) {
      if (window > 0) __syncthreads();
      stage(window + 1);
      const int end = min(first + (window + 1) * kWindow, last);
      for (int base = first + window * kWindow + warp * cuda::kTileTokens; base < end;
           base += kWarps * cuda::kTileTokens) {
        cuda::KeyTile<kTile> tile;
        bool open[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int candidate = min(base + lane / 4 + 8 * i, last - 1);
          const bool copied = candidate < list.num_listed;
          open[i] = base + lane / 4 + 8 * i < last;
          if (copied && packed.read) {
            read_packed<kTile>(packed.keys, packed.first + candidate, i, tile);
            continue;
          }
          const Place place = shared.places[window % 2][(candidate - first) % kWindow];
          open[i] = open[i] && place.page >= 0;
          tile.load(args.keys, i, max(place.page, 0), place.token);
          if (copied && packed.write) {
            write_packed<kTile>(tile, i, packed.first + candidate, packed.keys);
          }
        }
#pragma unroll
        for (int set = 0; set < kMaxGroup / 8; ++set) {
          if (set * 8 >= group) break;
          float c[4];
          tile.score(queries[set], c);
          const int head = set * 8 + lane % 4 * 2;
          float2 pair[2];
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            const int candidate = base + lane / 4 + 8 * i;
            pair[i] = make_float2(-INFINITY, -INFINITY);
            if (head >= group || candidate >= last) continue;
            if (open[i]) {
              pair[i] = make_float2(open_logit(c[2 * i] + shared.shift[head]),
                                    open_logit(c[2 * i + 1] + shared.shift[head + 1]));
            }
            *reinterpret_cast<float2*>(logits + int64_t{candidate - first} * padded + head) =
                pair[i];
          }
          sums[set][0].add(pair[0].x, pair[1].x);
          sums[set][1].add(pair[0].y, pair[1].y);
        }
      }
    }
#pragma unroll
    for (int set = 0; set < kMaxGroup / 8; ++set) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        for (int distance = 4; distance < 32; distance *= 2) sums[set][i].merge_lanes(distance);
        if (lane < 4) shared.sums[warp][set * 8 + lane * 2 + i] = sums[set][i].pair();
      }
    }
  } else {
    const UnitReader reader(view.head_dim);
    SoftmaxSum sums[2];
    for (int base = first + warp * reader.tokens(); base < last; base += kWarps * reader.tokens()) {
      const int candidate = base + reader.token;
      const int slot = list[min(candidate, last - 1)];
      const bool open =
          candidate < last && (candidate < list.num_listed || !is_pinned(view, row, slot));
      float x[cuda::kUnit] = {}, found[2];
      if (reader.unit >= 0) {
        cuda::load_unit(args.keys, row, cuda::page_number(view, row, slot / SIKV_PAGE_TOKENS),
                        slot % SIKV_PAGE_TOKENS, reader.unit, x);
      }
      reader.dot(x, q_stored, group, view.head_dim, found);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int head = reader.sub + i * reader.lanes;
        if (head >= group || candidate >= last) continue;
        const float logit = open ? open_logit(found[i] + shared.shift[head]) : -INFINITY;
        logits[int64_t{candidate - first} * padded + head] = logit;
        sums[i].add(logit);
      }
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      for (int distance = reader.lanes; distance < 32; distance *= 2) sums[i].merge_lanes(distance);
      const int head = reader.sub + i * reader.lanes;
      if (reader.token == 0 && head < kMaxGroup) shared.sums[warp][head] = sums[i].pair();
    }
  }
}

// The block's share of pinned tokens and tail, which only take part in the normalisation.
__device__ inline void score_exact(const RerankArgs& args, int row, int block, int blocks,
                                   const float* q_exact, ScoreShared& shared) {
  const sikv_cache_view& view = args.view;
  constexpr int kWarps = kRerankThreads / 32;
  const int warp = threadIdx.x / 32, head_dim = view.head_dim;
  const int pinned = view.pinned_len[row], sequence = row / view.num_kv_heads;
  const int tokens = pinned + view.tail_len[sequence];
  const int row_bytes = head_dim * sikv_dtype_bytes(view.dtype);
  const UnitReader reader(head_dim);
  SoftmaxSum sums[2];
  for (int base = (block * kWarps + warp) * reader.tokens(); base < tokens;
       base += blocks * kWarps * reader.tokens()) {
    const int token = base + reader.token;
    float x[cuda::kUnit] = {}, found[2];
    if (token < tokens && reader.unit >= 0) {
      const int64_t pinned_row = int64_t{row} * view.pinned_capacity + token;
      const int64_t tail_row =
          (int64_t{sequence} * view.tail_capacity + token - pinned) * view.num_kv_heads +
          row % view.num_kv_heads;
      const void* data = token < pinned ? view.pinned_k : view.tail_k;
      cuda::load_raw_unit(
          static_cast<const uint8_t*>(data) + (token < pinned ? pinned_row : tail_row) * row_bytes,
          view.dtype, reader.unit, x);
    }
    reader.dot(x, q_exact, args.step.group, head_dim, found);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (token < tokens && reader.sub + i * reader.lanes < args.step.group) sums[i].add(found[i]);
    }
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    for (int distance = reader.lanes; distance < 32; distance *= 2) sums[i].merge_lanes(distance);
    const int head = reader.sub + i * reader.lanes;
    if (reader.token == 0 && head < kMaxGroup) shared.sums[kWarps + warp][head] = sums[i].pair();
  }
}

// grid (score_blocks, rows)
template <RerankKeys kKeys>
__global__ void __launch_bounds__(kRerankThreads, kScoreBlocks)
    rerank_score(const __grid_constant__ RerankArgs args) {
  const Step& step = args.step;
  const int row = blockIdx.y, group = step.group;
  extern __shared__ uint4 dynamic[];
  __shared__ ScoreShared shared;
  float* q_exact = reinterpret_cast<float*>(dynamic);
  float* q_stored = q_exact + group * args.view.head_dim;
  // The queries are ready before the scan is over.
  prepare_queries(args, row, q_exact, q_stored, shared.shift);
  __syncthreads();
  wait_for_launch_before();
  start_next_launch();
  const RerankRow rerank(args, row);
  if (!rerank.ranked) return;
  const int n = rerank.list.size(), share = share_of(n, gridDim.x, kWindow);
  const int blocks = (n + share - 1) / share;
  if (static_cast<int>(blockIdx.x) >= blocks) return;
  const int first = blockIdx.x * share, last = min(first + share, n);

  PackedUse packed{step.pool.packed, int64_t{row} * step.pool.capacity, false, false};
  if (packed.keys.signs != nullptr) {
    packed.read = step.pool.state[row].packed != 0;
    packed.write = !packed.read;
  }
  float* logits = args.logits + (int64_t{row} * args.most + first) * padded_heads(group);
  score_candidates<kKeys>(args, row, rerank.list, first, last, packed, q_stored, logits, shared);
  score_exact(args, row, blockIdx.x, blocks, q_exact, shared);
  __syncthreads();
  if (static_cast<int>(threadIdx.x) < group) {
    SoftmaxSum sum;
    for (int i = 0; i < 2 * kRerankThreads / 32; ++i) sum.merge(shared.sums[i][threadIdx.x]);
    args.sums[(int64_t{row} * gridDim.x + blockIdx.x) * group + threadIdx.x] = sum.pair();
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
      for (int p = 0; p < view.pinned_len[row]; ++p) {
        before += pinned[p] >= list.first_new && pinned[p] < slot ? 1 : 0;
        open = open && pinned[p] != slot;
      }
    }
    if (open) out[i - before] = slot;
  }
}

// grid (blocks of a row, rows)
__global__ void __launch_bounds__(kKeepThreads, 1)
    rerank_keep(const __grid_constant__ RerankArgs args) {
  const Step& step = args.step;
  const int row = blockIdx.y, group = step.group, padded = padded_heads(group);
  wait_for_launch_before();
  const RerankRow rerank(args, row);
  const CandidateList& list = rerank.list;
  if (blockIdx.x == 0 && threadIdx.x == 0 && step.pool.state != nullptr) {
    step.pool.step[row] += 1;
    step.counts[row].rows += 1;
  }
  int32_t* out = args.selection.slots + int64_t{row} * args.selection.capacity;
  const int n = list.size();
  if (!rerank.ranked) {
    const int kept = rerank.budget <= 0 ? 0 : n - rerank.closed;
    if (kept > 0) keep_all(args, rerank, row, out);
    if (blockIdx.x == 0 && threadIdx.x == 0) args.selection.counts[row] = kept;
    return;
  }
  const int share = share_of(n, gridDim.x, kCompactTokens), blocks = (n + share - 1) / share;
  if (static_cast<int>(blockIdx.x) >= blocks) return;
  Team team(step.teams + row, blockIdx.x, blocks);
  const int first = blockIdx.x * share, mine = min(share, n - first);

  extern __shared__ uint4 dynamic[];
  __shared__ float highest[kMaxGroup], weight[kMaxGroup];
  __shared__ SelectScratch<kKeepThreads> select;
  __shared__ uint32_t histogram[kRadixBins];
  uint32_t* keys = reinterpret_cast<uint32_t*>(dynamic);
  const int scored = share_of(n, args.score_blocks, kWindow);
  const int score_blocks = (n + scored - 1) / scored, lane = threadIdx.x % 32;
  for (int g = threadIdx.x / 32; g < group; g += kKeepThreads / 32) {
    SoftmaxSum sum;
    for (int block = lane; block < score_blocks; block += 32) {
      sum.merge(args.sums[(int64_t{row} * args.score_blocks + block) * group + g]);
    }
    for (int distance = 16; distance > 0; distance /= 2) sum.merge_lanes(distance);
    if (lane == 0) {
      highest[g] = sum.highest;
      weight[g] = 1.0f / (static_cast<float>(group) * sum.sum);
    }
  }
  __syncthreads();
  // Probabilities are not negative: their bits are ordered as they are.
  const float2* logits =
      reinterpret_cast<const float2*>(args.logits + (int64_t{row} * args.most + first) * padded);
  const int end = (mine + kCompactTokens - 1) / kCompactTokens * kCompactTokens;
  constexpr int kBatch = 4;  // candidates of a thread whose logits are on their way together
  for (int base = threadIdx.x; base < end; base += kBatch * kKeepThreads) {
    float probability[kBatch] = {};
    bool open[kBatch];
    for (int pair = 0; pair < padded / 2; ++pair) {
      float2 two[kBatch];
#pragma unroll
      for (int j = 0; j < kBatch; ++j) {
        const int64_t i = min(base + j * kKeepThreads, mine - 1);
        two[j] = __ldcg(logits + i * (padded / 2) + pair);
      }
      const bool both = 2 * pair + 1 < group;
#pragma unroll
      for (int j = 0; j < kBatch; ++j) {
        if (pair == 0) open[j] = two[j].x != -INFINITY;
        probability[j] += power_of_2(two[j].x - highest[2 * pair]) * weight[2 * pair];
        if (both)
          probability[j] += power_of_2(two[j].y - highest[2 * pair + 1]) * weight[2 * pair + 1];
      }
    }
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
      const int i = base + j * kKeepThreads;
      if (i >= end) continue;
      keys[i] = i < mine && open[j] ? __float_as_uint(probability[j]) + 1 : 0;
    }
  }
  __syncthreads();
  const Cut cut = find_radix_cut<kKeepThreads>(
      team, [&](int i) { return keys[i]; }, mine, static_cast<uint32_t>(rerank.budget), histogram,
      select);
  compact<kKeepThreads>(
      team, keys, mine, cut, out, [&](int i) { return list[first + i]; }, select);
  if (blockIdx.x == 0 && threadIdx.x == 0) {
    args.selection.counts[row] = static_cast<int32_t>(rerank.budget);
    // rerank_score has made copies of all candidates by now.
    if (step.pool.packed.signs != nullptr) step.pool.state[row].packed = 1;
  }
  team.leave();
}

}  // namespace sikv::self_index

#endif  // SIKV_SELECTORS_SELF_INDEX_SELF_INDEX_RERANK_CUH_
