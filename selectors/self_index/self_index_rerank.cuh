// Ranks a row's candidates by their decoded keys and keeps the budget's best.
//
//   rerank_score   many blocks a row: logits of candidates, pinned tokens and tail, softmax sums
//   rerank_keep    a cluster of blocks a row: probabilities, cut, slots (self_index_keep.cuh)
//
// Nothing but the launch between them makes a row's blocks of rerank_score wait for each other: a
// barrier over global memory takes 4 us where several would be needed.
#ifndef SIKV_SELECTORS_SELF_INDEX_SELF_INDEX_RERANK_CUH_
#define SIKV_SELECTORS_SELF_INDEX_SELF_INDEX_RERANK_CUH_

#include <cfloat>
#include <type_traits>

#include "kernels/common/overlapped_launch.cuh"
#include "kernels/common/warp_rows.cuh"
#include "selectors/self_index/self_index_args.cuh"
#include "selectors/self_index/self_index_softmax.cuh"
#include "selectors/self_index/self_index_team.cuh"

namespace sikv::self_index {

inline constexpr int kRerankThreads = 256;
// Of rerank_score on a multiprocessor: a third one spills and gains nothing.
inline constexpr int kScoreBlocks = 2;

// Candidates of a row: what a scan found, and the slots encoded since.
struct CandidateList {
  const int32_t* listed;
  int num_listed, first_new, num_new;

  __device__ int size() const { return num_listed + num_new; }
  // Past L1, which may have what an earlier scan wrote.
  __device__ int operator[](int i) const {
    return i < num_listed ? __ldcg(listed + i) : first_new + (i - num_listed);
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
  bool packed;  // its listed candidates have copies of their keys

  // All threads.
  __device__ RerankRow(const RerankArgs& args, int row) {
    const Step& step = args.step;
    list = {args.candidates + int64_t{row} * args.capacity, 0, 0, 0};
    packed = false;
    if (step.pool.state != nullptr) {
      // Past L1, which may have them as they were before the scan.
      const PoolState& state = step.pool.state[row];
      const int scanned = __ldcg(&state.scanned_len);
      packed = __ldcg(&state.packed) != 0;
      list = {step.pool.slots + int64_t{row} * step.pool.capacity, __ldcg(&state.pool_count),
              scanned, args.view.encoded_len[row] - scanned};
      list.num_new = min(list.num_new, static_cast<int>(args.most) - list.num_listed);
    } else {
      list.num_listed = __ldcg(args.found + row);
    }
    closed = list.num_new > 0
                 ? count_pinned(args.view, row, list.first_new, list.first_new + list.num_new)
                 : 0;
    budget = min(row_budget(step, args.view, row), int64_t{args.selection.capacity});
    ranked = budget > 0 && list.size() - closed > budget;
  }
};

// Who scores what: every block has a part of one row. Rows that are due, at the first places, get
// more blocks than those whose keys have packed copies.
struct Shares {
  int rows, due, due_blocks, other_blocks;

  __device__ explicit Shares(const RerankArgs& args)
      : rows(args.view.num_sequences * args.view.num_kv_heads), due(0), due_blocks(0) {
    const int blocks = args.score_blocks;
    other_blocks = blocks / rows;
    if (args.due_weight > args.other_weight) due = __ldcg(args.step.pool.num_due);
    if (due == 0 || due == rows) {
      due = 0;
      return;
    }
    // The slower of both kinds takes the least time; the more blocks the others have, the faster.
    const int windows = static_cast<int>(args.most / kWindow);
    int least = 0x7fffffff;
    for (int each = 1;; ++each) {
      const int left = (blocks - (rows - due) * each) / due;
      if (left < 1) break;
      const int time = max((windows + left - 1) / left * args.due_weight,
                           (windows + each - 1) / each * args.other_weight);
      if (time >= least) break;
      least = time, due_blocks = left, other_blocks = each;
    }
  }

  __device__ int place(int block) const {
    const int others = block - due * due_blocks;
    return others < 0 ? block / due_blocks : due + others / other_blocks;
  }
  __device__ int blocks(int place) const { return place < due ? due_blocks : other_blocks; }
  __device__ int first_block(int place) const {
    return place < due ? place * due_blocks : due * due_blocks + (place - due) * other_blocks;
  }
};

__device__ inline int row_at(const Step& step, int place) {
  return step.pool.order == nullptr ? place : __ldcg(step.pool.order + place);
}

__device__ inline bool is_pinned(const sikv_cache_view& view, int row, int slot) {
  const int32_t* slots = view.pinned_slots + int64_t{row} * view.pinned_capacity;
  const int n = view.pinned_len[row];
#pragma unroll 1
  for (int i = 0; i < n; ++i) {
    if (slots[i] == slot) return true;
  }
  return false;
}

inline constexpr float kLog2e = 1.4426950408889634f;

// -inf marks what cannot be selected; a query that is not finite must not add to that.
__device__ inline float open_logit(float logit) { return fmaxf(logit, -FLT_MAX); }

// q_exact, q_stored [G, D] and shift [G]: the queries times scale * log2(e), so that logits are
// powers of two; as they are, in the stored keys' space, and what the latter lack.
template <int kChannels>
__device__ inline void prepare_queries(const RerankArgs& args, int row, float* q_exact,
                                       float* q_stored, float* shift) {
  const int head_dim = args.view.head_dim, lane = threadIdx.x % 32;
  const float scale = args.step.scale * kLog2e;
  const int64_t first = first_query(args.step, args.view, row);
  for (int g = threadIdx.x / 32; g < args.step.group; g += kRerankThreads / 32) {
    const cuda::KeyMean<kChannels> mean(args.keys, row);
    float q[kChannels];
    cuda::warp_load(args.step.q, args.view.dtype, first + int64_t{g} * head_dim, head_dim, q);
#pragma unroll
    for (int i = 0; i < kChannels; ++i) {
      q[i] *= scale;
      if (32 * i < head_dim) q_exact[g * head_dim + lane + 32 * i] = q[i];
    }
    const float missing = mean.shift(q);
    if (lane == 0) shift[g] = missing;
    cuda::warp_prepare_query(args.keys, row, q);
#pragma unroll
    for (int i = 0; i < kChannels; ++i) {
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

// What a lane reads of two tokens' copies.
template <cuda::TileKeys kTile>
struct PackedTile {
  using Scale = std::conditional_t<cuda::has_levels(kTile), unsigned short, uint4>;
  uint32_t signs[2];
  uint64_t levels[2];
  Scale scale[2];

  // Tokens token + lane / 4 and 8 behind it, none after `last`. Only issues loads.
  __device__ void load(const PoolKeys& packed, int64_t first, int token, int last) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int64_t at = first + min(token + static_cast<int>(threadIdx.x) % 32 / 4 + 8 * i, last);
      signs[i] = __ldcs(packed.signs + at * 4 + threadIdx.x % 4);
      levels[i] = __ldcs(packed.levels + at * 4 + threadIdx.x % 4);
      scale[i] = __ldcs(static_cast<const Scale*>(packed.scales) + at);
    }
  }
  __device__ void unpack(cuda::KeyTile<kTile>& tile) const {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      tile.levels[i] = levels[i];
      if constexpr (cuda::KeyTile<kTile>::kLines) {
        tile.index[i][0] = signs[i];
      } else {
        tile.shift[i] = 0;
#pragma unroll
        for (int w = 0; w < 8; ++w) tile.index[i][w] = signs[i] >> (4 * w);
      }
      if constexpr (cuda::has_levels(kTile)) {
        tile.scale[i].x = scale[i];
      } else {
        tile.scale[i] = scale[i];
      }
    }
  }
};

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
  packed.levels[part] = tile.levels[i];
  if (threadIdx.x % 4 != 0) return;
  if constexpr (cuda::has_levels(kTile)) {
    static_cast<unsigned short*>(packed.scales)[token] =
        static_cast<unsigned short>(tile.scale[i].x);
  } else {
    static_cast<uint4*>(packed.scales)[token] = tile.scale[i];
  }
}

// Writes logits [candidates, padded_heads(G)] of candidates [first, last) of a row and leaves each
// warp's sums in shared.sums. Candidates that turn out to be pinned get -inf.
template <RerankKeys kKeys, bool kFour>
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
    constexpr int kSets = kFour ? 1 : kMaxGroup / 8;
    __shared__ std::conditional_t<kFour, cuda::FourQueries, cuda::TileQuery> queries[kSets];
    SoftmaxSum sums[kSets][2];
    // Of 16 candidates from `base` on, as far as `end`.
    const auto score = [&](const cuda::KeyTile<kTile>& tile, const bool(&open)[2], int base,
                           int end) {
      if constexpr (kFour) {
        float c[2];
        tile.score(queries[0], c);
        const bool second = (lane & 2) != 0;
        const int head = lane % 2 * 2, candidate = base + lane / 4 + (second ? 8 : 0);
        if (head >= group || candidate >= end) return;
        float2 pair = make_float2(-INFINITY, -INFINITY);
        if (second ? open[1] : open[0]) {
          pair = make_float2(open_logit(c[0] + shared.shift[head]),
                             open_logit(c[1] + shared.shift[head + 1]));
        }
        *reinterpret_cast<float2*>(logits + int64_t{candidate} * 4 + head) = pair;
        sums[0][0].add(pair.x);
        sums[0][1].add(pair.y);
        return;
      } else {
#pragma unroll
        for (int set = 0; set < kSets; ++set) {
          if (set * 8 >= group) break;
          float c[4];
          tile.score(queries[set], c);
          const int head = set * 8 + lane % 4 * 2;
          float2 pair[2];
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            const int candidate = base + lane / 4 + 8 * i;
            pair[i] = make_float2(-INFINITY, -INFINITY);
            if (head >= group || candidate >= end) continue;
            if (open[i]) {
              pair[i] = make_float2(open_logit(c[2 * i] + shared.shift[head]),
                                    open_logit(c[2 * i + 1] + shared.shift[head + 1]));
            }
            *reinterpret_cast<float2*>(logits + int64_t{candidate} * padded + head) = pair[i];
          }
          sums[set][0].add(pair[0].x, pair[1].x);
          sums[set][1].add(pair[0].y, pair[1].y);
        }
      }
    };
    // Looks up one candidate of a window.
    const auto stage = [&](int window) {
      const int candidate = first + window * kWindow + threadIdx.x;
      if (candidate >= last) return;
      const int slot = list[candidate];
      const bool open = candidate < list.num_listed || !is_pinned(view, row, slot);
      const int64_t page = cuda::page_number(view, row, slot / SIKV_PAGE_TOKENS);
      const int token = slot % SIKV_PAGE_TOKENS;
      shared.places[window % 2][threadIdx.x] = {open ? static_cast<int32_t>(page) : -1, token};
    };
    // Copies need no places: a warp's next ones are on their way while it scores.
    PackedTile<kTile> copies;
    const int end_copies = packed.read ? min(last, list.num_listed) : first;
    int base = first + warp * cuda::kTileTokens;
    if (base < end_copies) copies.load(packed.keys, packed.first, base, end_copies - 1);
    const int first_copy = base;
    first = max(first, end_copies);
    const auto build_queries = [&] {
      if constexpr (kFour) {
        cuda::build_four_queries<kTile>(q_stored, group, queries[0]);
        __syncthreads();
      } else {
        for (int set = 0; set * 8 < group; ++set) {
          cuda::build_tile_query<kTile>(q_stored + set * 8 * cuda::kTileDim,
                                        min(group - set * 8, 8), queries[set]);
        }
        __syncthreads();
      }
    };
    const auto score_copies = [&] {
      for (base = first_copy; base < end_copies; base += kWarps * cuda::kTileTokens) {
        cuda::KeyTile<kTile> tile;
        copies.unpack(tile);
        const int next = base + kWarps * cuda::kTileTokens;
        if (next < end_copies) copies.load(packed.keys, packed.first, next, end_copies - 1);
        score(tile, {true, true}, base, end_copies);
      }
    };
    if constexpr (cuda::KeyTile<kTile>::kLines) {
      // A warp scores two tiles while the lines of the next two are on their way, the pages of the
      // two behind them and the slots of two more: nothing waits for what it has just asked for.
      constexpr int kPair = 2 * cuda::kTileTokens, kStep = kWarps * kPair;
      // Past the end the last candidate's: loads that may not be would be moved.
      const int32_t* page_table = view.page_table + int64_t{row} * view.max_pages;
      const auto slot_at = [&](int base) { return list[min(base + lane, last - 1)]; };
      const auto place_at = [&](int slot) {
        return Place{page_table[slot / SIKV_PAGE_TOKENS], slot % SIKV_PAGE_TOKENS};
      };
      const auto open_at = [&](int base, int slot) {
        const int candidate = base + lane;
        return __ballot_sync(
            ~0u, candidate < last && (candidate < list.num_listed || !is_pinned(view, row, slot)));
      };
      const auto load = [&](const Place& place, cuda::KeyTile<kTile>& tile, int t) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int from = lane / 4 + 8 * i + cuda::kTileTokens * t;
          const int64_t page = __shfl_sync(~0u, place.page, from);
          tile.load(args.keys, i, page, __shfl_sync(~0u, place.token, from));
        }
      };
      Place place{};
      uint32_t open = 0, open_ahead = 0;
      int slot = 0;
      cuda::KeyTile<kTile> tiles[2];
      if (first < last) {
        base = first + warp * kPair;
        const int now = slot_at(base), ahead = slot_at(base + kStep);
        slot = slot_at(base + 2 * kStep);
        place = place_at(now);
        open = open_at(base, now);
        load(place, tiles[0], 0), load(place, tiles[1], 1);
        place = place_at(ahead);
        open_ahead = open_at(base + kStep, ahead);
      }
      build_queries();
      score_copies();
      // What was asked for in the turn before is used up before more is asked for, and goes where
      // it stays: a register that is moved is waited for, and with it what was asked for since.
      for (base = first + warp * kPair; base < last; base += kStep) {
        const int32_t* page = page_table + slot / SIKV_PAGE_TOKENS;
        const int token = slot % SIKV_PAGE_TOKENS;
        const uint32_t open_after = open_at(base + 2 * kStep, slot);
        slot = slot_at(base + 3 * kStep);
#pragma unroll
        for (int t = 0; t < 2; ++t) {
          const int tile = base + t * cuda::kTileTokens;
          bool counts[2];
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            const int n = lane / 4 + 8 * i, candidate = tile + n;
            counts[i] = (open >> (t * cuda::kTileTokens + n) & 1u) != 0;
            if (packed.write && candidate < min(last, list.num_listed)) {
              write_packed<kTile>(tiles[t], i, packed.first + candidate, packed.keys);
            }
          }
          score(tiles[t], counts, tile, last);
          load(place, tiles[t], t);
        }
        place = {*page, token};
        open = open_ahead, open_ahead = open_after;
      }
    } else {
      stage(0);
      build_queries();
      score_copies();
      for (int window = 0; first + window * kWindow < last; ++window) {
        if (window > 0) __syncthreads();
        stage(window + 1);
        const int end = min(first + (window + 1) * kWindow, last);
        for (base = first + window * kWindow + warp * cuda::kTileTokens; base < end;
             base += kWarps * cuda::kTileTokens) {
          cuda::KeyTile<kTile> tile;
          bool open[2];
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            const int candidate = min(base + lane / 4 + 8 * i, last - 1);
            const Place place = shared.places[window % 2][(candidate - first) % kWindow];
            open[i] = place.page >= 0;
            tile.load(args.keys, i, max(place.page, 0), place.token);
            if (packed.write && candidate < list.num_listed) {
              write_packed<kTile>(tile, i, packed.first + candidate, packed.keys);
            }
          }
          score(tile, open, base, end);
        }
      }
    }
    constexpr int kColumns = kFour ? 2 : 4;  // lanes that have heads of their own
#pragma unroll
    for (int set = 0; set < kSets; ++set) {
      if (set * 8 >= group) break;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        for (int distance = kColumns; distance < 32; distance *= 2) {
          sums[set][i].merge_lanes(distance);
        }
        if (lane < kColumns) shared.sums[warp][set * 8 + lane * 2 + i] = sums[set][i].pair();
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
        logits[int64_t{candidate} * padded + head] = logit;
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

// The same on the tensor cores, of rows of 16 bits of kTileDim channels: a tile of 16 tokens a
// warp. The first one is on its way while the queries are prepared. (8 channels a lane took a sixth
// of rerank_score's instructions.)
class ExactTiles {
 public:
  __device__ static bool reads(const RerankArgs& args) {
    return args.view.head_dim == cuda::kTileDim && args.view.dtype != SIKV_FP32;
  }
  // Only issues loads.
  __device__ ExactTiles(const RerankArgs& args, int row, int block, int blocks)
      : args_(args), row_(row), stride_(blocks * kWarps) {
    const sikv_cache_view& view = args.view;
    pinned_ = view.pinned_len[row];
    tokens_ = pinned_ + view.tail_len[row / view.num_kv_heads];
    first_ = static_cast<int>(threadIdx.x) / 32 * blocks + block;
    if (first_ * cuda::kTileTokens >= tokens_) return;
    load_query(0);
    load_keys(first_);
  }

  // Leaves each warp's sums in shared.sums.
  __device__ void score(ScoreShared& shared) {
    constexpr int kSets = kMaxGroup / 8;
    const int lane = threadIdx.x % 32, group = args_.step.group;
    SoftmaxSum sums[kSets][2];
    for (int tile = first_; tile * cuda::kTileTokens < tokens_; tile += stride_) {
      if (tile != first_) load_keys(tile);
#pragma unroll
      for (int set = 0; set < kSets; ++set) {
        if (set * 8 >= group) break;
        if (group > 8 && (tile != first_ || set > 0)) load_query(set);
        float c[4] = {};
        if (args_.view.dtype == SIKV_FP16) {
          multiply<__half>(c);
        } else {
          multiply<__nv_bfloat16>(c);
        }
        const float scale = args_.step.scale * kLog2e;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          if (tile * cuda::kTileTokens + lane / 4 + 8 * i >= tokens_) continue;
          sums[set][0].add(c[2 * i] * scale);
          sums[set][1].add(c[2 * i + 1] * scale);
        }
      }
    }
#pragma unroll
    for (int set = 0; set < kSets; ++set) {
      if (set * 8 >= group) break;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        if (first_ * cuda::kTileTokens < tokens_) {
          for (int distance = 4; distance < 32; distance *= 2) sums[set][i].merge_lanes(distance);
        }
        if (lane < 4) {
          shared.sums[kWarps + threadIdx.x / 32][set * 8 + lane * 2 + i] = sums[set][i].pair();
        }
      }
    }
  }

 private:
  static constexpr int kWarps = kRerankThreads / 32, kChunks = cuda::kTileDim / 32;

  // B fragments of heads 8 set ..: the very bytes of the queries.
  __device__ void load_query(int set) {
    const int lane = threadIdx.x % 32, head = set * 8 + lane / 4;
    const auto* q = static_cast<const uint16_t*>(args_.step.q) +
                    first_query(args_.step, args_.view, row_) + int64_t{head} * cuda::kTileDim;
#pragma unroll
    for (int n = 0; n < kChunks; ++n) {
      query_[n] =
          head < args_.step.group ? reinterpret_cast<const uint4*>(q)[4 * n + lane % 4] : uint4{};
    }
  }
  __device__ void load_keys(int tile) {
    const sikv_cache_view& view = args_.view;
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int token = min(tile * cuda::kTileTokens + lane / 4 + 8 * i, tokens_ - 1);
      const int64_t pinned = int64_t{row_} * view.pinned_capacity + token;
      const int64_t tail =
          (int64_t{row_ / view.num_kv_heads} * view.tail_capacity + token - pinned_) *
              view.num_kv_heads +
          row_ % view.num_kv_heads;
      const void* data = token < pinned_ ? view.pinned_k : view.tail_k;
      const auto* key =
          static_cast<const uint16_t*>(data) + (token < pinned_ ? pinned : tail) * cuda::kTileDim;
#pragma unroll
      for (int n = 0; n < kChunks; ++n) {
        keys_[i][n] = reinterpret_cast<const uint4*>(key)[4 * n + lane % 4];
      }
    }
  }
  template <typename T>
  __device__ void multiply(float (&c)[4]) const {
#pragma unroll
    for (int n = 0; n < kChunks; ++n) {
      const uint4 &x = keys_[0][n], &y = keys_[1][n], &q = query_[n];
      cuda::mma_16bit<T>(c, {x.x, y.x, x.y, y.y}, {q.x, q.y});
      cuda::mma_16bit<T>(c, {x.z, y.z, x.w, y.w}, {q.z, q.w});
    }
  }

  const RerankArgs& args_;
  int row_, stride_, pinned_, tokens_, first_;
  uint4 keys_[2][kChunks], query_[kChunks];
};

// The sums of all warps and both kinds of tokens, of each head.
__device__ inline void merge_warps(int group, const ScoreShared& shared, float2* out) {
  constexpr int kParts = 2 * kRerankThreads / 32;
  static_assert(kParts == 16);
  const int part = threadIdx.x % kParts, head = threadIdx.x / kParts;
  static_assert(kRerankThreads / kParts == kMaxGroup);
  if (head / 2 * 2 >= group) return;  // whole warps: two heads each
  SoftmaxSum sum;
  if (head < group) sum.merge(shared.sums[part][head]);
#pragma unroll
  for (int distance = 1; distance < kParts; distance *= 2) sum.merge_lanes(distance);
  if (part == 0 && head < group) out[head] = sum.pair();
}

// grid (score_blocks). kFour: of up to four query heads.
template <RerankKeys kKeys, bool kFour = false>
__global__ void __launch_bounds__(kRerankThreads, kScoreBlocks)
    rerank_score(const __grid_constant__ RerankArgs args) {
  const Step& step = args.step;
  constexpr int kChannels =
      kKeys == RerankKeys::kUnits ? cuda::kMaxLaneChannels : cuda::kTileDim / 32;
  const int group = step.group, block = blockIdx.x;
  extern __shared__ uint4 dynamic[];
  __shared__ ScoreShared shared;
  float* q_exact = reinterpret_cast<float*>(dynamic);
  float* q_stored = q_exact + group * args.view.head_dim;
  // The order of rows is older than the scan, whose launch waited for it.
  const Shares shares(args);
  const int place = shares.place(block);
  if (place >= shares.rows) return cuda::wait_for_launch_before();
  const int row = row_at(step, place);
  const int rank = block - shares.first_block(place), blocks = shares.blocks(place);
  // Neither queries nor exact keys wait for the scan.
  const auto prepare = [&] {
    prepare_queries<kChannels>(args, row, q_exact, q_stored, shared.shift);
    __syncthreads();
  };
  bool exact_tiles = false;
  if constexpr (kKeys != RerankKeys::kUnits) {
    if (ExactTiles::reads(args)) {
      exact_tiles = true;
      ExactTiles exact(args, row, rank, blocks);
      prepare();
      exact.score(shared);
    }
  }
  if (!exact_tiles) {
    prepare();
    score_exact(args, row, rank, blocks, q_exact, shared);
  }
  cuda::wait_for_launch_before();
  cuda::start_next_launch();
  const RerankRow rerank(args, row);
  if (!rerank.ranked) return;
  const int n = rerank.list.size(), windows = (n + kWindow - 1) / kWindow;
  const int first = windows * rank / blocks * kWindow;
  const int last = min(windows * (rank + 1) / blocks * kWindow, n);
  PackedUse packed{step.pool.packed, int64_t{row} * step.pool.capacity, false, false};
  if (packed.keys.signs != nullptr) packed.read = rerank.packed, packed.write = !rerank.packed;
  float* logits = args.logits + int64_t{row} * args.most * padded_heads(group);
  score_candidates<kKeys, kFour>(args, row, rerank.list, first, last, packed, q_stored, logits,
                                 shared);
  __syncthreads();
  merge_warps(group, shared, args.sums + int64_t{block} * group);
}

}  // namespace sikv::self_index

#endif  // SIKV_SELECTORS_SELF_INDEX_SELF_INDEX_RERANK_CUH_
