// Scan and select in one launch: the blocks of a row score their share of its tokens, keep the
// scores in shared memory, find the row's cut together and write what lies above it.
//
//   row      |  block 0  |  block 1  | ...                  chunk tokens each
//   block    tables -> scores + histogram -> merged histogram -> cut -> slots
//
// Integer scores (6-bit tables of the mean query): the table of a group is 16 bytes = 4 registers,
// and prmt looks 4 nibbles up at once. Bit 3 of a selector nibble makes prmt replicate the sign of
// the chosen byte, 0 for entries below 128, so the 16-entry lookup of 4 tokens is
//   prmt(t0, t1, nibbles) + prmt(t2, t3, nibbles ^ 0x8888)
// Other scores are floats, summed in the reference's order.
#ifndef SIKV_SELECTORS_SELF_INDEX_SELF_INDEX_SCAN_CUH_
#define SIKV_SELECTORS_SELF_INDEX_SELF_INDEX_SCAN_CUH_

#include <cuda_fp16.h>

#include "kernels/common/overlapped_launch.cuh"
#include "selectors/self_index/self_index_args.cuh"
#include "selectors/self_index/self_index_tables.cuh"
#include "selectors/self_index/self_index_team.cuh"

namespace sikv::self_index {

// How a warp reads tiles: each lane `words` neighbouring words, `lanes` lanes a tile.
template <int D>
struct ScanShape {
  static constexpr int kLanes = D == 64 ? 4 : D == 256 ? 16 : 8;
  static constexpr int kWords = D / 4 / kLanes;                          // 3 at D = 96, else 4
  static constexpr int kTokens = 8 * 32 / kLanes;                        // of one load of a warp
  static constexpr int kBins = D == 64 ? 1024 : D == 256 ? 4096 : 2048;  // scores to D/4 * 63
  static constexpr int kLoads = 4;                                       // in flight
  static constexpr int kItem = kTokens * kLoads;                         // tokens; divides a page
};

// Tokens [first, first + tokens) of a row.
struct Chunk {
  int row, first, tokens;
};

// Below this the tables cost more than the scan.
inline constexpr int kLeastChunk = 1024;

template <int D, int kThreads>
struct ScanShared {
  float query[D];
  TableScratch<D> tables;
  SelectScratch<kThreads> select;
};

__device__ inline uint32_t permute(uint32_t a, uint32_t b, uint32_t selector) {
  uint32_t out;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(out) : "r"(a), "r"(b), "r"(selector));
  return out;
}

// A lane's words of one load.
template <int D>
__device__ inline void load_words(const uint8_t* unit, uint32_t (&words)[ScanShape<D>::kWords]) {
  constexpr int kWords = ScanShape<D>::kWords;
  const uint8_t* address = unit + threadIdx.x % 32 * (kWords * 4);
  if constexpr (kWords == 4) {
    asm("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
        : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
        : "l"(address));
  } else {
#pragma unroll
    for (int w = 0; w < kWords; ++w)
      words[w] = __ldg(reinterpret_cast<const uint32_t*>(address) + w);
  }
}

// The tables of the groups whose words a lane reads.
template <int D>
struct LaneTables {
  uint32_t entries[ScanShape<D>::kWords][4];

  // From bytes [D/4, 16] in shared memory.
  __device__ explicit LaneTables(const uint8_t* bytes) {
    constexpr int kWords = ScanShape<D>::kWords;
    const int first = threadIdx.x % ScanShape<D>::kLanes * kWords;
#pragma unroll
    for (int w = 0; w < kWords; ++w) {
      const uint4 row = reinterpret_cast<const uint4*>(bytes)[first + w];
      entries[w][0] = row.x, entries[w][1] = row.y, entries[w][2] = row.z, entries[w][3] = row.w;
    }
  }

  // Adds up a tile's words over its lanes. Lane l of `lanes` ends with token l of the tile in the
  // lower half (D = 64: l / 2 * 4 + l % 2, and in the upper half the one 2 behind; D = 256: l % 8).
  __device__ uint32_t score(const uint32_t (&words)[ScanShape<D>::kWords]) const {
    uint32_t low = 0, high = 0;  // bytes: tokens 0..3 and 4..7
#pragma unroll
    for (int w = 0; w < ScanShape<D>::kWords; ++w) {
      const uint32_t flipped = words[w] ^ 0x88888888u;
      low += permute(entries[w][0], entries[w][1], words[w]) +
             permute(entries[w][2], entries[w][3], flipped);
      high += permute(entries[w][0], entries[w][1], words[w] >> 16) +
              permute(entries[w][2], entries[w][3], flipped >> 16);
    }
    // Halves: tokens (0, 2), (1, 3), (4, 6), (5, 7).
    const uint32_t a = low & 0x00ff00ffu, b = low >> 8 & 0x00ff00ffu;
    const uint32_t c = high & 0x00ff00ffu, d = high >> 8 & 0x00ff00ffu;
    const int lane = threadIdx.x;
    constexpr int kFour = ScanShape<D>::kLanes == 4 ? 2 : 4;  // lane bit that chooses 4..7
    const bool upper = (lane & kFour) != 0, odd = (lane & 1) != 0;
    const uint32_t even_pair = (upper ? c : a) + __shfl_xor_sync(~0u, upper ? a : c, kFour);
    const uint32_t odd_pair = (upper ? d : b) + __shfl_xor_sync(~0u, upper ? b : d, kFour);
    uint32_t pair =
        (odd ? odd_pair : even_pair) + __shfl_xor_sync(~0u, odd ? even_pair : odd_pair, 1);
    if constexpr (ScanShape<D>::kLanes == 4) return pair;
    pair += __shfl_xor_sync(~0u, pair, 2);
    if constexpr (ScanShape<D>::kLanes == 16) pair += __shfl_xor_sync(~0u, pair, 8);
    return (lane & 2) != 0 ? pair >> 16 : pair & 0xffffu;
  }
};

// keys [chunk.tokens] = score + 1, and their histogram.
template <int D, int kThreads>
__device__ void scan_integer(const ScanArgs& args, const Chunk& chunk, const uint8_t* tables,
                             uint16_t* keys, uint32_t* histogram) {
  using Shape = ScanShape<D>;
  const LaneTables<D> lane_tables(tables);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int items = (chunk.tokens + Shape::kItem - 1) / Shape::kItem;
  const int32_t* pages = args.view.page_table + int64_t{chunk.row} * args.view.max_pages +
                         chunk.first / SIKV_PAGE_TOKENS;
  const auto page_of = [&](int item) { return pages[item * Shape::kItem / SIKV_PAGE_TOKENS]; };
  const auto count = [&](int token, uint32_t score) {
    if (token >= chunk.tokens) return;
    keys[token] = static_cast<uint16_t>(score + 1);
    atomicAdd(&histogram[score], 1u);
  };
  int64_t page = warp < items ? page_of(warp) : 0;
  for (int item = warp; item < items; item += kThreads / 32) {
    const int first = item * Shape::kItem;
    const uint8_t* unit = args.index.page(page) + first % SIKV_PAGE_TOKENS / 8 * D;
    uint32_t words[Shape::kLoads][Shape::kWords] = {};
#pragma unroll
    for (int i = 0; i < Shape::kLoads; ++i) {
      if (first + i * Shape::kTokens < chunk.tokens)
        load_words<D>(unit + i * Shape::kTokens / 8 * D, words[i]);
    }
    if (item + kThreads / 32 < items) page = page_of(item + kThreads / 32);
#pragma unroll
    for (int i = 0; i < Shape::kLoads; ++i) {
      const uint32_t score = lane_tables.score(words[i]);
      const int token = first + i * Shape::kTokens + lane / Shape::kLanes * 8;
      if constexpr (Shape::kLanes == 4) {
        const int mine = token + (lane & 2) * 2 + (lane & 1);
        count(mine, score & 0xffffu);
        count(mine + 2, score >> 16);
      } else if (Shape::kLanes == 8 || lane % 16 < 8) {
        count(token + lane % 8, score);
      }
    }
  }
}

// Larger floats, larger keys; -0 and +0 alike. NaN comes out as some key above 0.
__device__ inline uint32_t key_of(float score) {
  const uint32_t bits = __float_as_uint(score + 0.0f);
  return bits ^ ((bits & 0x80000000u) != 0 ? 0xffffffffu : 0x80000000u);
}

// keys [chunk.tokens] of float scores. tables [sets, D/4, 16]; scales [sets] of 6-bit tables.
template <int D, int kThreads>
__device__ void scan_float(const ScanArgs& args, const Chunk& chunk, const float* tables,
                           const TableScale* scales, int sets, uint32_t* keys) {
  const int32_t* pages = args.view.page_table + int64_t{chunk.row} * args.view.max_pages +
                         chunk.first / SIKV_PAGE_TOKENS;
  for (int token = threadIdx.x; token < chunk.tokens; token += kThreads) {
    const int64_t page = pages[token / SIKV_PAGE_TOKENS];
    const int in_page = token % SIKV_PAGE_TOKENS, shift = token % 8 * 4;
    const auto* tile = reinterpret_cast<const uint4*>(args.index.page(page) + in_page / 8 * D);
    float best = 0.0f;
    for (int set = 0; set < sets; ++set) {
      const float* table = tables + set * 4 * D;
      float sum = 0.0f;
#pragma unroll 2
      for (int four = 0; four < D / 16; ++four) {
        const uint4 words = __ldg(tile + four);
        const float* entries = table + four * 64;
        sum = add_rn(sum, entries[words.x >> shift & 15u]);
        sum = add_rn(sum, entries[16 + (words.y >> shift & 15u)]);
        sum = add_rn(sum, entries[32 + (words.z >> shift & 15u)]);
        sum = add_rn(sum, entries[48 + (words.w >> shift & 15u)]);
      }
      if (args.step.six_bit) sum = add_rn(mul_rn(scales[set].scale, sum), scales[set].offset);
      best = set == 0 ? sum : fmaxf(best, sum);
    }
    if (args.step.norm_weighting) {
      const auto* weights = reinterpret_cast<const __half*>(args.weights.page(page));
      best = mul_rn(best, __half2float(weights[in_page]));
    }
    keys[token] = key_of(best);
  }
}

// Whether a pooled row's period has passed.
__device__ inline bool is_over(const Step& step, int row) {
  const PoolState& state = step.pool.state[row];
  return state.scanned == 0 || step.pool.step[row] >= state.next_scan;
}

// Whether the query has turned away from the last scanned one: cos(mean - m, scan_query - m) <
// refresh_cosine, m the prompt's mean. Without a direction there is no turn. One warp; what it
// returns counts in lane 0. Numbers that are not storable the kernel reports, which sees every row.
__device__ inline bool has_turned(const Step& step, const sikv_cache_view& view, int row) {
  const float* prompt = step.pool.prompt_mean + int64_t{row} * view.head_dim;
  const float* scanned = step.pool.scan_query + int64_t{row} * view.head_dim;
  double dot = 0.0, query_norm = 0.0, scan_norm = 0.0;
#pragma unroll 4
  for (int d = threadIdx.x % 32; d < view.head_dim; d += 32) {
    const double now = double{MeanChannel(step, view, row, d).get(false)} - double{prompt[d]};
    const double then = double{scanned[d]} - double{prompt[d]};
    dot += now * then;
    query_norm += now * now;
    scan_norm += then * then;
  }
  for (int distance = 16; distance > 0; distance /= 2) {
    dot += __shfl_xor_sync(~0u, dot, distance);
    query_norm += __shfl_xor_sync(~0u, query_norm, distance);
    scan_norm += __shfl_xor_sync(~0u, scan_norm, distance);
  }
  return dot < step.refresh_cosine * sqrt(query_norm * scan_norm);
}

inline constexpr int kDueThreads = 1024;

// Orders the rows of a step with a pool: those that are due, ascending, then the others. Decided
// once, as the scan changes what it is decided by. One block.
__global__ void __launch_bounds__(kDueThreads) find_due(const __grid_constant__ ScanArgs args) {
  const Step& step = args.step;
  const sikv_cache_view& view = args.view;
  const int rows = view.num_sequences * view.num_kv_heads;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  __shared__ bool is_due[kDueThreads];
  __shared__ int warp_due[kDueThreads / 32];
  cuda::wait_for_launch_before();
  cuda::start_next_launch();
  int before = 0;
  for (int first = 0; first < rows; first += kDueThreads) {
    const int here = min(rows - first, kDueThreads), row = first + threadIdx.x;
    bool due = row < rows && is_over(step, row);
    if (step.pool.scan_query != nullptr) {
      is_due[threadIdx.x] = due;
      __syncthreads();
      for (int i = warp; i < here; i += kDueThreads / 32) {
        if (is_due[i]) continue;
        const bool turned = has_turned(step, view, first + i);
        __syncwarp();
        if (lane == 0) is_due[i] = turned;
      }
      __syncthreads();
      due = is_due[threadIdx.x];
    }
    const uint32_t lanes = __ballot_sync(~0u, due);
    if (lane == 0) warp_due[warp] = __popc(lanes);
    __syncthreads();
    const int others = warp_due[lane];
    const int due_before = before + __reduce_add_sync(~0u, lane < warp ? others : 0) +
                           __popc(lanes & ((1u << lane) - 1u));
    // The others are laid from the end on.
    if (row < rows) step.pool.order[due ? due_before : rows - 1 - (row - due_before)] = row;
    before += __reduce_add_sync(~0u, others);
    __syncthreads();
  }
  if (threadIdx.x == 0) *step.pool.num_due = before;
}

// The share of a block: chunk number `rank` of a row, `chunk` tokens from one to the next, for one of
// the queries.
struct Share {
  int row, rank, chunk, query, list;
};

// With a pool all blocks go to the rows that are due, as many to each; row -1: this one is left.
__device__ inline Share find_share(const ScanArgs& args) {
  if (args.step.pool.state == nullptr) {
    const int query = args.pass.query();
    return {args.pass.row(), static_cast<int>(blockIdx.x), args.chunk, query,
            args.pass.list(query)};
  }
  const int due = __ldcg(args.step.pool.num_due), tokens = max(args.view.max_encoded_len, 1);
  if (due == 0) return {-1, 0, 0, 0, 0};
  const int all = static_cast<int>(gridDim.x);
  const bool few = int64_t{tokens} * due <= int64_t{args.few_tokens} * (all / 2);
  const int blocks = min((few ? all / 2 : all) / due, args.most_blocks);
  int chunk = (tokens + blocks * SIKV_PAGE_TOKENS - 1) / (blocks * SIKV_PAGE_TOKENS);
  chunk = min(max(chunk * SIKV_PAGE_TOKENS, kLeastChunk), args.chunk);
  const int each = (tokens + chunk - 1) / chunk, place = static_cast<int>(blockIdx.x) / each;
  if (place >= due) return {-1, 0, 0, 0, 0};
  const int row = __ldcg(args.step.pool.order + place);
  return {row, static_cast<int>(blockIdx.x) % each, chunk, 0, row};
}

// The first block of a scanned row notes what was done; rerank_keep counts the step of a pooled
// row. Staggered, the first period is cut short so that head j of the model's KV heads, counted
// layer by layer, scans where (step + j) mod period = 0; later ones keep the phase.
__device__ inline void end_scan(const Step& step, const sikv_cache_view& view, int row, int found,
                                const float* mean) {
  const bool pooled = step.pool.state != nullptr;
  if (pooled && step.pool.scan_query != nullptr) {
    for (int d = threadIdx.x; d < view.head_dim; d += blockDim.x) {
      step.pool.scan_query[int64_t{row} * view.head_dim + d] = mean[d];
    }
  }
  if (threadIdx.x != 0) return;
  if (step.counts != nullptr) {
    step.counts[row].rows += pooled ? 0 : 1;
    step.counts[row].scans += 1;
    step.counts[row].read += view.encoded_len[row] * step.index_page_bytes / SIKV_PAGE_TOKENS;
  }
  if (!pooled) return;
  PoolState& state = step.pool.state[row];
  const int64_t now = step.pool.step[row];
  const int64_t period = state.period > 0 ? state.period : step.scan_every;
  const int64_t j = int64_t{view.layer} * view.num_kv_heads + row % view.num_kv_heads;
  const bool shortened = step.stagger && state.scanned == 0;
  state.next_scan = now + period - (shortened ? (now + j) % period : 0);
  state.scanned = 1;
  state.scanned_len = view.encoded_len[row];
  state.pool_count = found;
  state.packed = 0;
}

// Bytes of dynamic shared memory.
template <int D>
constexpr int64_t scan_shared_bytes(bool integer, int sets, int chunk) {
  return integer ? 4 * D + int64_t{ScanShape<D>::kBins} * 4 + int64_t{chunk} * 2
                 : (int64_t{16} * D + 16) * sets + kRadixBins * 4 + int64_t{chunk} * 4;
}

// grid (blocks of a row, rows, queries), with a pool (blocks)
template <int D, int kThreads, bool kInteger>
__global__ void __launch_bounds__(kThreads, 1024 / kThreads)
    scan_select(const __grid_constant__ ScanArgs args) {
  using Key = std::conditional_t<kInteger, uint16_t, uint32_t>;
  constexpr int kBins = kInteger ? ScanShape<D>::kBins : kRadixBins;
  const sikv_cache_view& view = args.view;
  const Step& step = args.step;
  const bool pooled = step.pool.state != nullptr;
  // The next launch begins when the order of rows is there.
  cuda::wait_for_launch_before();
  cuda::start_next_launch();
  const auto [row, rank, largest, query, list] = find_share(args);
  if (row < 0) return;
  // What the row needs is asked for at once: one after the other costs a microsecond each.
  const int first = rank * largest, ahead = first + 8 * static_cast<int>(threadIdx.x);
  const bool has_channel = threadIdx.x < D;
  MeanChannel channel(step, view, row, has_channel ? threadIdx.x : 0, query);
  int64_t page_ahead = 0;
  if (ahead / SIKV_PAGE_TOKENS < view.max_pages) {
    page_ahead = cuda::page_number(view, row, ahead / SIKV_PAGE_TOKENS);
  }
  const int len = view.encoded_len[row];
  const int num_pinned = view.pinned_len[row];
  const uint32_t turn = __ldcg(&step.teams[list].turn);
  const int64_t budget = row_budget(step, view, row);
  const int32_t* pinned = view.pinned_slots + int64_t{row} * view.pinned_capacity;
  int my_pinned = static_cast<int>(threadIdx.x) < view.pinned_capacity ? pinned[threadIdx.x] : 0;
  const auto* codebook = reinterpret_cast<const float4*>(args.codebook) + int64_t{row} * 4 * D;
  float4 my_centre = {};
  if (threadIdx.x < 4 * D) my_centre = codebook[threadIdx.x];
  const int blocks = max((len + largest - 1) / largest, 1);
  if (rank >= blocks) return;
  Team team(step.teams + list, turn, rank, blocks);
  const Chunk chunk{row, first, min(largest, len - first)};

  extern __shared__ uint4 dynamic[];
  __shared__ ScanShared<D, kThreads> shared;
  const int sets = kInteger || !step.max_over_heads ? 1 : step.group;
  auto* tables = reinterpret_cast<std::conditional_t<kInteger, uint8_t, float>*>(dynamic);
  auto* scales = reinterpret_cast<TableScale*>(tables + 4 * D * sets);  // float scores
  auto* histogram =
      reinterpret_cast<uint32_t*>(kInteger ? tables + 4 * D : tables + (4 * D + 4) * sets);
  Key* keys = reinterpret_cast<Key*>(histogram + kBins);

  // Chosen is what is best by the mean query, or by any head's.
  __shared__ float mean[D];
  static_assert(D <= kThreads);
  // The first codes come while the tables are made.
  if (ahead < first + chunk.tokens) {
    const uint8_t* tile = args.index.page(page_ahead) + ahead % SIKV_PAGE_TOKENS / 8 * D;
    asm volatile("prefetch.global.L2 [%0];" ::"l"(tile));
  }
  if (has_channel) mean[threadIdx.x] = channel.get(rank == 0);

  team.clear_other_side(kInteger ? kBins : kAllRadixBins);
  for (int i = threadIdx.x; i < kBins; i += kThreads) histogram[i] = 0;
  __syncthreads();
  int open = len;
  for (int i = threadIdx.x; i - static_cast<int>(threadIdx.x) < num_pinned; i += kThreads) {
    if (i >= kThreads) my_pinned = i < num_pinned ? pinned[i] : len;
    open -= __syncthreads_count(i < num_pinned && my_pinned < len);
  }
  const int64_t wanted = row_candidates(step, budget);
  const uint32_t k = static_cast<uint32_t>(max(min(wanted, int64_t{open}), int64_t{0}));
  if (k > 0) {
    for (int set = 0; set < sets; ++set) {
      const int64_t head = first_query(step, view, row, query) + int64_t{set} * D;
      if (has_channel && (sets > 1 || !step.rotated)) {
        shared.query[threadIdx.x] =
            sets == 1 ? mean[threadIdx.x] : load_element(step.q, view.dtype, head + threadIdx.x);
      }
      if (step.rotated) {
        rotate_shared<D>(sets == 1 ? mean : shared.query, shared.query);
      } else {
        __syncthreads();
      }
      auto* table = tables + set * 4 * D;
      const auto exact = [&](int entry) {
        const bool loaded = entry == static_cast<int>(threadIdx.x);
        return table_entry(shared.query + entry / 16 * 4, loaded ? my_centre : codebook[entry]);
      };
      if (kInteger || step.six_bit) {
        const TableScale scale = quantise<D, kThreads>(
            exact,
            [&](int entry, float level) {
              table[entry] = static_cast<std::remove_reference_t<decltype(*table)>>(level);
            },
            !kInteger, shared.tables);
        if constexpr (!kInteger) {
          if (threadIdx.x == 0) scales[set] = scale;
        }
      } else {
        for (int entry = threadIdx.x; entry < 4 * D; entry += kThreads) table[entry] = exact(entry);
      }
      __syncthreads();
    }

    if constexpr (kInteger) {
      scan_integer<D, kThreads>(args, chunk, tables, keys, histogram);
    } else {
      scan_float<D, kThreads>(args, chunk, tables, scales, sets, keys);
    }
    const int padded = (chunk.tokens + kCompactTokens - 1) / kCompactTokens * kCompactTokens;
    for (int i = chunk.tokens + threadIdx.x; i < padded; i += kThreads) keys[i] = 0;
    __syncthreads();
    for (int i = threadIdx.x; i < num_pinned; i += kThreads) {
      const int token = (num_pinned <= kThreads ? my_pinned : pinned[i]) - first;
      if (token < 0 || token >= chunk.tokens) continue;
      if (kInteger) atomicSub(&histogram[keys[token] - 1], 1u);
      keys[token] = 0;
    }
    Cut cut;
    if constexpr (kInteger) {
      team.merge(histogram, kBins, 0);
      cut = find_cut<kThreads>(histogram, kBins, k, shared.select);
      cut.key += 1;
    } else {
      __syncthreads();
      cut = find_radix_cut<kThreads>(
          team, [&](int i) { return keys[i]; }, chunk.tokens, k, histogram, shared.select);
    }
    int32_t* out = pooled ? step.pool.slots + int64_t{row} * step.pool.capacity
                          : args.slots + int64_t{list} * args.capacity;
    compact<kThreads>(
        team, keys, chunk.tokens, cut, out, [&](int i) { return first + i; }, shared.select);
  }
  if (!pooled && rank == 0 && threadIdx.x == 0) args.found[list] = static_cast<int32_t>(k);
  if (rank == 0) end_scan(step, view, row, static_cast<int>(k), mean);
}

}  // namespace sikv::self_index

#endif  // SIKV_SELECTORS_SELF_INDEX_SELF_INDEX_SCAN_CUH_
