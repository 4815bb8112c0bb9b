// One softmax per query head over a row's tokens, cut into splits of one block each; the last block
// of a row merges them in the same launch.
//
//   splits of a row   | encoded 0 | ... | encoded E-1 | exact 0 | ... | exact X-1 |
//   a split's result  per query head acc [D] and (m, l), fp32, in the workspace
//
// m is the largest logit so far times log2(e), l the sum of 2^(logit - m), acc that of
// 2^(logit - m) v. Encoded splits work in the space that tokens are stored in (rotated, centred);
// the merge brings their sum back and adds the exact ones: pinned copies and the tail.
//
// Sums run in an order that lengths and launch sizes fix, so two runs are bitwise equal.
#ifndef SIKV_KERNELS_COMMON_BLOCK_FLASH_CUH_
#define SIKV_KERNELS_COMMON_BLOCK_FLASH_CUH_

#include <algorithm>

#include "kernels/common/async_copy.cuh"
#include "kernels/common/overlapped_launch.cuh"
#include "kernels/common/warp_rows.cuh"

namespace sikv::cuda {

inline constexpr int kFlashWarps = 4, kFlashThreads = 32 * kFlashWarps;
// Blocks a multiprocessor holds at once: up to 168 registers a thread.
inline constexpr int kResident = 3;
inline constexpr float kLog2e = 1.4426950408889634f, kLn2 = 0.6931471805599453f;

// Where encoded token i of a split's list lies.
enum class Listed : int32_t {
  kSelection,  // at slot selection.slots[row][i]; all slots but pinned ones for SIKV_SELECT_ALL
  kPages,      // at slot i, pinned ones too
  kDecoded,    // at token i of "page" row of the stores; selection.counts says how many
};

struct FlashCall {
  sikv_cache_view view;
  RowStore keys, values;
  const void* q;  // [B, Hq, D] view dtype
  int32_t group;  // G
  float scale;    // of logits, times log2(e)
  sikv_selection selection;
  Listed listed;
  int32_t encoded_splits, exact_splits;
  bool joint;        // a block has an encoded and an exact split; as many of these as of those
  bool resume;       // encoded splits go on from their results so far
  bool finish;       // merge after this launch
  bool early;        // the launch before this one is the selector's: queries and exact rows, which
                     // it waited for too, are there before the selection is
  float* sums;       // [B, H, splits, G, D] acc
  float2* tops;      // [B, H, splits, G] (m, l)
  int32_t* tickets;  // [B, H], zero before and after
  float* out;        // [B, Hq, D]
  float* lse;        // [B, Hq]
  size_t merge_bytes;   // of shared memory that a block may take for the merge
  int32_t merge_batch;  // splits whose sums of a head are there at once

  __host__ __device__ int splits() const { return encoded_splits + exact_splits; }
  // Of shared memory, for a head that is merged: weights [splits, 2], sums [merge_batch, D].
  __host__ __device__ int merge_words() const {
    return (2 * splits() + 3) / 4 * 4 + merge_batch * view.head_dim;
  }
  // Of head g of a split, in sums (times D) and tops.
  __device__ int64_t result(int row, int split, int g) const {
    return (int64_t{row} * splits() + split) * group + g;
  }
  // Query head g of a row, in [B, Hq] order: rows are (sequence, KV head).
  __device__ int64_t head(int row, int g) const { return int64_t{row} * group + g; }
};

// ---- queries ------------------------------------------------------------------------------------

// Reports query head g of a row if it holds what no cache takes. One warp.
template <int kN>
__device__ inline void check_query(const FlashCall& call, int row, int g, const float (&q)[kN]) {
  bool storable = true;
#pragma unroll
  for (int i = 0; i < kN; ++i) storable = storable && is_storable(q[i]);
  if (storable) return;
  const int sequence = row / call.view.num_kv_heads;
  const int head = row % call.view.num_kv_heads * call.group + g;
  const int position = call.view.encoded_len[row] + call.view.tail_len[sequence] - 1;
#pragma unroll
  for (int i = 0; i < kN; ++i) {
    if (is_storable(q[i])) continue;
    report_fault(call.view, SIKV_FAULT_Q, sequence, head, position,
                 static_cast<int>(threadIdx.x) % 32 + 32 * i, q[i]);
  }
}

// Query head g of a row times call.scale, prepared for encoded tokens; returns what is missing from
// their logits. One warp.
template <int kN>
__device__ inline float prepare_query(const FlashCall& call, int row, int g, float (&q)[kN]) {
  const int dim = call.view.head_dim;
  const KeyMean<kN> mean(call.keys, row);
  warp_load(call.q, call.view.dtype, call.head(row, g) * dim, dim, q);
#pragma unroll
  for (int i = 0; i < kN; ++i) q[i] *= call.scale;
  const float shift = mean.shift(q);
  warp_prepare_query(call.keys, row, q);
  return shift;
}

// Results of the block's warps, in shared memory.
struct WarpStates {
  float* sums;   // [kFlashWarps, heads, D] acc
  float2* tops;  // [kFlashWarps, heads] (m, l); m = -inf: nothing, acc not read
  float* shift;  // [heads] to be added to m
  int heads;

  static constexpr size_t bytes(int heads, int dim) {
    return static_cast<size_t>(heads) *
           (kFlashWarps * (sizeof(float) * static_cast<size_t>(dim) + sizeof(float2)) +
            sizeof(float));
  }
  __device__ WarpStates(float* shared, int heads, int dim)
      : sums(shared),
        tops(reinterpret_cast<float2*>(sums + kFlashWarps * heads * dim)),
        shift(reinterpret_cast<float*>(tops + kFlashWarps * heads)),
        heads(heads) {}
};

// Merges the warps' states of `heads` heads into the split's result of heads first .. . All
// threads; after a barrier.
__device__ inline void store_split(const FlashCall& call, int row, int split, int first, int heads,
                                   const WarpStates& states) {
  const int dim = call.view.head_dim;
  for (int i = threadIdx.x; i < heads * (dim / 4); i += kFlashThreads) {
    const int g = i / (dim / 4), chunk = i % (dim / 4);
    float2 tops[kFlashWarps];
    float m = -INFINITY, l = 0.0f;
#pragma unroll
    for (int w = 0; w < kFlashWarps; ++w) {
      tops[w] = states.tops[w * states.heads + g];
      m = fmaxf(m, tops[w].x);
    }
    float4 sum = {};
#pragma unroll
    for (int w = 0; w < kFlashWarps; ++w) {
      if (tops[w].x == -INFINITY) continue;
      const float weight = exp2f(tops[w].x - m);
      const float4 x =
          reinterpret_cast<const float4*>(states.sums + (w * states.heads + g) * dim)[chunk];
      l = fmaf(weight, tops[w].y, l);
      sum.x = fmaf(weight, x.x, sum.x), sum.y = fmaf(weight, x.y, sum.y);
      sum.z = fmaf(weight, x.z, sum.z), sum.w = fmaf(weight, x.w, sum.w);
    }
    const int64_t result = call.result(row, split, first + g);
    reinterpret_cast<float4*>(call.sums + result * dim)[chunk] = sum;
    if (chunk == 0) call.tops[result] = {m + states.shift[g], l};
  }
}

inline constexpr int kMaxSplits = 128;  // of each kind

// Merges query head g of a row, of up to 32 kN channels, and writes its output. One warp. All that
// it waits for is L2: the sums of as many splits as `shared` [call.merge_words()] holds are copied
// there along with the splits' tops. Loops are short on purpose: a launch comes here once, and what
// a multiprocessor has not run lately it fetches from memory (unrolled to 37 KB, with batches of
// sums in registers, it took 6 us, in which all rows waited for the same lines).
template <int kN>
__device__ inline void merge_head(const FlashCall& call, int row, int g, float* shared) {
  constexpr int kChunks = (kN + 3) / 4;  // of 4 channels, of a lane
  const int lane = threadIdx.x % 32, dim = call.view.head_dim, splits = call.splits();
  const int64_t first = call.result(row, 0, g);
  auto* const weights = reinterpret_cast<float2*>(shared);  // first (m, l)
  float* const sums = shared + call.merge_words() - call.merge_batch * dim;
  const auto load = [&](int begin) {
    const float* from = call.sums + (first + int64_t{begin} * call.group) * dim;
    const int n = min(call.merge_batch, splits - begin);
#pragma unroll 2
    for (int s = 0; s < n; ++s, from += call.group * dim) {
#pragma unroll
      for (int c = 0; c < kChunks; ++c) {
        const int d = 4 * lane + 128 * c;
        if (d < dim) copy_async_16(sums + s * dim + d, from + d);
      }
    }
    commit_copies();
  };
  load(0);
  float mean[kN] = {};
  if (call.values.rotated()) {
    warp_load(call.values.mean, SIKV_FP32, int64_t{row} * dim, dim, mean);
  }

  float m[2] = {-INFINITY, -INFINITY}, l[2] = {};  // encoded, exact
#pragma unroll 2
  for (int s = lane; s < splits; s += 32) {
    const float2 top = __ldcg(call.tops + first + int64_t{s} * call.group);
    weights[s] = top;
    const bool encoded = s < call.encoded_splits;
    m[0] = fmaxf(m[0], encoded ? top.x : -INFINITY);
    m[1] = fmaxf(m[1], encoded ? -INFINITY : top.x);
  }
  m[0] = warp_max(m[0]);
  m[1] = warp_max(m[1]);
#pragma unroll 1
  for (int s = lane; s < splits; s += 32) {
    const float2 top = weights[s];
    const bool encoded = s < call.encoded_splits;
    const float weight = top.x == -INFINITY ? 0.0f : exp2f(top.x - (encoded ? m[0] : m[1]));
    const float2 both = {encoded ? weight : 0.0f, encoded ? 0.0f : weight};
    l[0] = fmaf(both.x, top.y, l[0]);
    l[1] = fmaf(both.y, top.y, l[1]);
    weights[s] = both;
  }
  l[0] = warp_sum(l[0]);
  l[1] = warp_sum(l[1]);
  __syncwarp();

  float4 acc[kChunks][2] = {};  // encoded, exact
  const auto add = [](float4& sum, float weight, const float4& term) {
    sum.x = fmaf(weight, term.x, sum.x), sum.y = fmaf(weight, term.y, sum.y);
    sum.z = fmaf(weight, term.z, sum.z), sum.w = fmaf(weight, term.w, sum.w);
  };
#pragma unroll 1
  for (int begin = 0;;) {
    wait_copies<0>();
    const int n = min(call.merge_batch, splits - begin);
#pragma unroll 2
    for (int s = 0; s < n; ++s) {
      const float2 both = weights[begin + s];
#pragma unroll
      for (int c = 0; c < kChunks; ++c) {
        const int d = 4 * lane + 128 * c;
        if (d >= dim) continue;  // others' copies
        const float4 x = *reinterpret_cast<const float4*>(sums + s * dim + d);
        add(acc[c][0], both.x, x);
        add(acc[c][1], both.y, x);
      }
    }
    if ((begin += n) >= splits) break;
    load(begin);
  }
  // From 4 neighbouring channels a lane to every 32nd.
  float channels[2][kN] = {};
#pragma unroll
  for (int kind = 0; kind < 2; ++kind) {
    __syncwarp();
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      const int d = 4 * lane + 128 * c;
      if (d < dim) *reinterpret_cast<float4*>(sums + d) = acc[c][kind];
    }
    __syncwarp();
#pragma unroll
    for (int c = 0; c < kN; ++c) {
      if (32 * c < dim) channels[kind][c] = sums[lane + 32 * c];
    }
  }

  const float top = fmaxf(m[0], m[1]);
  const float w0 = m[0] == -INFINITY ? 0.0f : exp2f(m[0] - top);
  const float w1 = m[1] == -INFINITY ? 0.0f : exp2f(m[1] - top);
  const float sum = w0 * l[0] + w1 * l[1];
  const bool empty = top == -INFINITY;
  const float encoded = empty ? 0.0f : __fdividef(w0, sum);
  const float exact = empty ? 0.0f : __fdividef(w1, sum);
  if (lane == 0) {
    call.lse[call.head(row, g)] = empty ? -INFINITY : (top + __log2f(sum)) * kLn2;
  }
  // Without encoded tokens the row's side tables may never have been filled.
  if (encoded != 0.0f && call.values.rotated()) {
    warp_restore_value(call.values, mean, l[0], channels[0]);
  }
  float* out = call.out + call.head(row, g) * dim + lane;
#pragma unroll
  for (int c = 0; c < kN; ++c) {
    if (32 * c < dim) out[32 * c] = encoded * channels[0][c] + exact * channels[1][c];
  }
  __syncwarp();
}

// After a block has stored its results: the last of `blocks` blocks of a row merges it, a warp a
// head, in the block's shared memory.
template <int kN>
__device__ inline void finish_row(const FlashCall& call, int row, int blocks, float* shared) {
  if (!call.finish) return;
  __shared__ bool last;
  __syncthreads();
  if (threadIdx.x == 0) {
    // Releases what the whole block wrote, which the barrier before orders, and acquires what the
    // others have.
    int ticket;
    asm volatile("atom.acq_rel.gpu.global.add.s32 %0, [%1], 1;"
                 : "=r"(ticket)
                 : "l"(call.tickets + row)
                 : "memory");
    last = ticket == blocks - 1;
  }
  __syncthreads();
  if (!last) return;
  // Known to be the same for the whole warp, which shortens its code.
  const int warp = __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x) / 32, 0);
#pragma unroll 1
  for (int g = warp; g < call.group; g += kFlashWarps) {
    merge_head<kN>(call, row, g, shared + warp * call.merge_words());
  }
  if (threadIdx.x == 0) call.tickets[row] = 0;
}

// ---- one token after another, in fp32 -----------------------------------------------------------

// [begin, end) of n tokens for part `part` of `parts`, in multiples of `unit`.
struct Range {
  int begin, end;
};
__device__ inline Range part_of(int n, int part, int parts, int unit) {
  const int share = (n + parts * unit - 1) / (parts * unit) * unit;
  const int64_t begin = int64_t{share} * part;
  return {static_cast<int>(min(begin, int64_t{n})),
          static_cast<int>(min(begin + share, int64_t{n}))};
}

// The running softmax of kHeads query heads over tokens whose channels lie in kLanes lanes, 8 in
// each; 32 / kLanes tokens at a time.
template <int kLanes, int kHeads>
class LaneFlash {
 public:
  // q_s [heads, D], heads <= kHeads.
  __device__ LaneFlash(const float* q_s, int heads, int dim) : dim_(dim) {
    const int unit = threadIdx.x % kLanes;
#pragma unroll
    for (int g = 0; g < kHeads; ++g) {
      m_[g] = -INFINITY;
      l_[g] = 0.0f;
#pragma unroll
      for (int i = 0; i < kUnit; ++i) {
        q_[g][i] = g < heads && kUnit * unit < dim ? q_s[g * dim + kUnit * unit + i] : 0.0f;
        acc_[g][i] = 0.0f;
      }
    }
  }

  // Goes on from stored results: sums [heads, D], tops [heads].
  __device__ void resume(const float* sums, const float2* tops, int heads) {
    const int lane = threadIdx.x % 32;
    if (lane >= kLanes || kUnit * lane >= dim_) return;
#pragma unroll
    for (int g = 0; g < kHeads; ++g) {
      if (g >= heads) break;
      m_[g] = tops[g].x;
      l_[g] = tops[g].y;
#pragma unroll
      for (int i = 0; i < kUnit; ++i) acc_[g][i] = sums[g * dim_ + kUnit * lane + i];
    }
  }

  // load(i, unit, k [8], v [8]) -> whether token i counts.
  template <int kUnroll, typename Load>
  __device__ void attend(Range range, Load&& load) {
    constexpr int kPer = 32 / kLanes, kStep = kFlashWarps * kPer;
    const int sub = threadIdx.x % 32 / kLanes;
    const int unit = min(static_cast<int>(threadIdx.x) % kLanes, dim_ / kUnit - 1);
    for (int base = range.begin + static_cast<int>(threadIdx.x) / 32 * kPer; base < range.end;
         base += kStep * kUnroll) {
      float k[kUnroll][kUnit], v[kUnroll][kUnit];
      bool counts[kUnroll];
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        const int i = base + u * kStep + sub;
        counts[u] = load(min(i, range.end - 1), unit, k[u], v[u]) && i < range.end;
      }
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
#pragma unroll
        for (int g = 0; g < kHeads; ++g) {
          float logit = 0.0f;
#pragma unroll
          for (int i = 0; i < kUnit; ++i) logit = fmaf(q_[g][i], k[u][i], logit);
#pragma unroll
          for (int o = 1; o < kLanes; o *= 2) logit += __shfl_xor_sync(0xffffffffu, logit, o);
          add(g, counts[u] ? logit : -INFINITY, 1.0f, v[u]);
        }
      }
    }
  }

  // Writes the warp's state.
  __device__ void store(const WarpStates& states, int heads) {
    const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll
    for (int g = 0; g < kHeads; ++g) {
#pragma unroll
      for (int o = kLanes; o < 32; o *= 2) {
        const float m = __shfl_xor_sync(0xffffffffu, m_[g], o);
        const float l = __shfl_xor_sync(0xffffffffu, l_[g], o);
        float acc[kUnit];
#pragma unroll
        for (int i = 0; i < kUnit; ++i) acc[i] = __shfl_xor_sync(0xffffffffu, acc_[g][i], o);
        add(g, m, l, acc);
      }
      if (g >= heads || kUnit * lane >= dim_) continue;
      if (lane == 0) states.tops[warp * states.heads + g] = {m_[g], l_[g]};
      float* to = states.sums + (warp * states.heads + g) * dim_ + kUnit * lane;
#pragma unroll
      for (int i = 0; i < kUnit; ++i) to[i] = acc_[g][i];
    }
  }

 private:
  __device__ void add(int g, float m, float l, const float (&v)[kUnit]) {
    const float top = fmaxf(m_[g], m);
    if (top == -INFINITY) return;
    const float down = exp2f(m_[g] - top), weight = exp2f(m - top);
    m_[g] = top;
    l_[g] = fmaf(l_[g], down, weight * l);
#pragma unroll
    for (int i = 0; i < kUnit; ++i) acc_[g][i] = fmaf(acc_[g][i], down, weight * v[i]);
  }

  int dim_;
  float q_[kHeads][kUnit], m_[kHeads], l_[kHeads], acc_[kHeads][kUnit];
};

__device__ inline bool is_pinned(const sikv_cache_view& view, int row, int slot) {
  const int32_t* pinned = view.pinned_slots + int64_t{row} * view.pinned_capacity;
  int low = 0, high = view.pinned_len[row];
  while (low < high) {
    const int middle = (low + high) / 2;
    if (pinned[middle] < slot) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low < view.pinned_len[row] && pinned[low] == slot;
}

// The encoded tokens of a row, as call.listed says.
struct EncodedList {
  const int32_t* slots;  // null: 0, 1, ...
  int count;
  bool skip_pinned;

  __device__ EncodedList(const FlashCall& call, int row)
      : slots(nullptr), count(0), skip_pinned(false) {
    if (call.listed == Listed::kDecoded) {
      count = call.selection.counts[row];
      return;
    }
    count = call.view.encoded_len[row];
    if (call.listed == Listed::kPages) return;
    const int listed = call.selection.counts[row];
    if (listed == SIKV_SELECT_ALL) {
      skip_pinned = call.view.pinned_capacity > 0 && call.view.pinned_len[row] > 0;
    } else {
      slots = call.selection.slots + int64_t{row} * call.selection.capacity;
      count = listed;
    }
  }
};

// Shared memory of a block that attends to `heads` heads at a time: queries, then states.
constexpr size_t flash_shared_bytes(int heads, int dim) {
  return sizeof(float) * static_cast<size_t>(heads * dim) + WarpStates::bytes(heads, dim);
}

// A split of encoded tokens of any layout, heads first .. first + heads - 1.
template <int kLanes, int kHeads>
__device__ void attend_encoded(const FlashCall& call, int row, int split, int first, int heads,
                               float* shared) {
  const int dim = call.view.head_dim, lane = static_cast<int>(threadIdx.x) % 32;
  float* const q_s = shared;
  const WarpStates states(shared + kHeads * dim, kHeads, dim);
  const EncodedList list(call, row);
  const Range range = part_of(list.count, split, call.encoded_splits, 16);
  const bool any = range.begin < range.end;  // else the side tables may never have been filled
  for (int g = static_cast<int>(threadIdx.x) / 32; g < heads; g += kFlashWarps) {
    float q[kMaxLaneChannels] = {};
    const float shift = any ? prepare_query(call, row, first + g, q) : 0.0f;
    if (lane == 0) states.shift[g] = shift;
#pragma unroll
    for (int i = 0; i < kMaxLaneChannels; ++i) {
      if (32 * i < dim) q_s[g * dim + lane + 32 * i] = q[i];
    }
  }
  __syncthreads();
  LaneFlash<kLanes, kHeads> flash(q_s, heads, dim);
  if (call.resume && threadIdx.x < 32) {
    const int64_t result = call.result(row, split, first);
    flash.resume(call.sums + result * dim, call.tops + result, heads);
  }
  flash.template attend<1>(range, [&](int i, int unit, float(&k)[kUnit], float(&v)[kUnit]) {
    const int slot = list.slots != nullptr ? list.slots[i] : i;
    int64_t page = row;
    int token = slot;
    if (call.listed != Listed::kDecoded) {
      page = page_number(call.view, row, slot / SIKV_PAGE_TOKENS);
      token = slot % SIKV_PAGE_TOKENS;
    }
    load_unit(call.keys, row, page, token, unit, k);
    load_unit(call.values, row, page, token, unit, v);
    return !(list.skip_pinned && is_pinned(call.view, row, slot));
  });
  flash.store(states, heads);
  __syncthreads();
  store_split(call, row, split, first, heads, states);
}

// Pinned copies and tail of a row, one after the other: rows in the view's type.
struct ExactRows {
  const uint8_t *pinned_k, *pinned_v, *tail_k, *tail_v;
  int64_t row_bytes, tail_stride;  // from one token to the next
  int pinned, count;

  __device__ ExactRows(const FlashCall& call, int row) {
    const sikv_cache_view& view = call.view;
    const int sequence = row / view.num_kv_heads, head = row % view.num_kv_heads;
    row_bytes = int64_t{view.head_dim} * sikv_dtype_bytes(view.dtype);
    tail_stride = row_bytes * view.num_kv_heads;
    const int64_t first_pinned = int64_t{row} * view.pinned_capacity * row_bytes;
    const int64_t first_tail =
        int64_t{sequence} * view.tail_capacity * tail_stride + head * row_bytes;
    pinned_k = static_cast<const uint8_t*>(view.pinned_k) + first_pinned;
    pinned_v = static_cast<const uint8_t*>(view.pinned_v) + first_pinned;
    tail_k = static_cast<const uint8_t*>(view.tail_k) + first_tail;
    tail_v = static_cast<const uint8_t*>(view.tail_v) + first_tail;
    pinned = call.listed != Listed::kPages && view.pinned_capacity > 0 ? view.pinned_len[row] : 0;
    count = pinned + view.tail_len[sequence];
  }
  __device__ const uint8_t* k(int i) const {
    return i < pinned ? pinned_k + i * row_bytes : tail_k + (i - pinned) * tail_stride;
  }
  __device__ const uint8_t* v(int i) const {
    return i < pinned ? pinned_v + i * row_bytes : tail_v + (i - pinned) * tail_stride;
  }
};

// Split `part` of the exact rows.
template <int kLanes, int kHeads>
__device__ __noinline__ void attend_exact(const FlashCall& call, int row, int part, int first,
                                          int heads, float* shared) {
  const int dim = call.view.head_dim, lane = static_cast<int>(threadIdx.x) % 32;
  float* const q_s = shared;
  const WarpStates states(shared + kHeads * dim, kHeads, dim);
  for (int g = static_cast<int>(threadIdx.x) / 32; g < heads; g += kFlashWarps) {
    float q[kMaxLaneChannels];
    warp_load(call.q, call.view.dtype, call.head(row, first + g) * dim, dim, q);
    check_query(call, row, first + g, q);
    if (lane == 0) states.shift[g] = 0.0f;
#pragma unroll
    for (int i = 0; i < kMaxLaneChannels; ++i) {
      if (32 * i < dim) q_s[g * dim + lane + 32 * i] = q[i] * call.scale;
    }
  }
  __syncthreads();
  const ExactRows rows(call, row);
  LaneFlash<kLanes, kHeads> flash(q_s, heads, dim);
  flash.template attend<2>(part_of(rows.count, part, call.exact_splits, 1),
                           [&](int i, int unit, float(&k)[kUnit], float(&v)[kUnit]) {
                             load_raw_unit(rows.k(i), call.view.dtype, unit, k);
                             load_raw_unit(rows.v(i), call.view.dtype, unit, v);
                             return true;
                           });
  flash.store(states, heads);
  __syncthreads();
  store_split(call, row, call.encoded_splits + part, first, heads, states);
}

// Grid (splits, rows, tiles of kHeads query heads).
template <int kLanes, int kHeads>
__global__ __launch_bounds__(kFlashThreads,
                             kResident) void attend_any(const __grid_constant__ FlashCall call) {
  extern __shared__ float4 shared_words[];
  float* const shared = reinterpret_cast<float*>(shared_words);
  const int row = static_cast<int>(blockIdx.y), split = static_cast<int>(blockIdx.x);
  const int first = static_cast<int>(blockIdx.z) * kHeads, heads = min(kHeads, call.group - first);
  wait_for_launch_before();
  if (split < call.encoded_splits) {
    attend_encoded<kLanes, kHeads>(call, row, split, first, heads, shared);
  } else if (call.finish) {
    attend_exact<kLanes, kHeads>(call, row, split - call.encoded_splits, first, heads, shared);
  }
  finish_row<kLanes / 4>(call, row, static_cast<int>(gridDim.x * gridDim.z), shared);
}

// ---- host ---------------------------------------------------------------------------------------

// What the merge of a row needs beside the workspace: counters of finish_row, zero, of at most `rows`
// rows, and how much shared memory the GPU has for it.
class Tickets {
 public:
  Tickets() = default;
  Tickets(const Tickets&) = delete;
  Tickets& operator=(const Tickets&) = delete;
  ~Tickets() { cudaFree(data_); }
  void allocate(int64_t rows) {
    if (data_ != nullptr) return;
    const size_t bytes = static_cast<size_t>(rows) * sizeof(int32_t);
    check(cudaMalloc(&data_, bytes), "cudaMalloc of a kernel's counters");
    check(cudaMemset(data_, 0, bytes), "cudaMemset of a kernel's counters");
    int device = 0, shared = 0, reserved = 0;
    check(cudaGetDevice(&device), "cudaGetDevice");
    check(cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerMultiprocessor, device),
          "asking for a multiprocessor's shared memory");
    check(cudaDeviceGetAttribute(&reserved, cudaDevAttrReservedSharedMemoryPerBlock, device),
          "asking for the shared memory that a block leaves");
    merge_bytes_ = static_cast<size_t>(std::max(shared / kResident - reserved, 0)) / 1024 * 1024;
  }
  int32_t* data() const { return data_; }
  // Of each of kResident blocks on a multiprocessor, at most.
  size_t merge_bytes() const { return merge_bytes_; }

 private:
  int32_t* data_ = nullptr;
  size_t merge_bytes_ = 0;
};

inline constexpr int kMaxRounds = 12;

struct Splits {
  int encoded, exact;
  bool joint;  // by the same blocks
};

// Splits of `tokens` encoded and `exact_tokens` other tokens of each row: as many blocks as the GPU
// holds at once (one more would run alone afterwards), or up to kMaxRounds times that while a split
// keeps kLong tokens, so that blocks that end early are followed by others; the number of rounds
// whose last one is fullest. A tile for each warp at least, two of exact tokens, which are there
// before the selection is.
inline Splits flash_splits(int64_t tokens, int64_t exact_tokens, int64_t rows, int multiprocessors,
                           bool can_join) {
  constexpr int64_t kLeast = 64, kLong = 768, kLeastExact = 128;
  const int64_t blocks = int64_t{multiprocessors} * kResident;
  const auto parts = [](int64_t n, int64_t least, int64_t most) {
    return std::max<int64_t>(std::min((n + least - 1) / least, most), 1);
  };
  const int64_t exact =
      parts(exact_tokens, kLeastExact, std::min<int64_t>(blocks / rows / 4, kMaxSplits));
  int64_t best = std::min<int64_t>(blocks / rows - exact, kMaxSplits), best_rounds = 1;
  for (int64_t rounds = 2; rounds <= kMaxRounds; ++rounds) {
    // Exact splits are short: not counted.
    const int64_t share = blocks * rounds / rows;
    if (share > kMaxSplits || share * kLong > tokens) break;
    if (share * best_rounds > best * rounds) best = share, best_rounds = rounds;
  }
  // Where a row has few blocks, one of exact tokens alone is missed by the others: with joint
  // splits 128 rows of 2048 tokens take 46.5 us for 54, 64 rows 28.9 for 29.2.
  const int64_t most = std::min<int64_t>(blocks / rows, kMaxSplits);
  if (can_join && best_rounds == 1 && exact == 1 && best > 0) {
    const auto steps = [](int64_t n, int64_t splits) {
      return (n + kLeast * splits - 1) / (kLeast * splits);
    };
    if (steps(tokens, most) < steps(tokens, best)) {
      return {static_cast<int>(most), static_cast<int>(most), true};
    }
  }
  return {static_cast<int>(parts(tokens, kLeast, best)), static_cast<int>(exact), false};
}
inline Splits flash_splits(int64_t tokens, const sikv_cache_view& view, int multiprocessors,
                           bool can_join = false) {
  return flash_splits(tokens, view.pinned_capacity + view.tail_capacity,
                      int64_t{view.num_sequences} * view.num_kv_heads, multiprocessors, can_join);
}

// A call over all of `args` but its lists and stores.
inline FlashCall flash_call(const sikv_attend_args& args, void* workspace, const Tickets& tickets,
                            Splits splits) {
  FlashCall call{};
  call.view = *args.view;
  call.q = args.q;
  call.group = args.num_query_heads / args.view->num_kv_heads;
  call.scale = args.scale * kLog2e;
  call.selection = args.selection;
  call.finish = true;
  call.early = args.selection.capacity > 0;
  call.encoded_splits = splits.encoded;
  call.exact_splits = splits.exact;
  call.joint = splits.joint;
  call.sums = static_cast<float*>(workspace);
  call.tops = reinterpret_cast<float2*>(call.sums + int64_t{args.view->num_sequences} *
                                                        args.num_query_heads * call.splits() *
                                                        args.view->head_dim);
  call.tickets = tickets.data();
  call.merge_bytes = tickets.merge_bytes();
  call.out = args.out;
  call.lse = args.lse;
  return call;
}

// Bytes of results of any batch of at most `rows` rows, whose splits flash_splits counted.
inline uint64_t flash_workspace_bytes(int64_t rows, int group, int dim, int multiprocessors) {
  const int64_t blocks = int64_t{multiprocessors} * kResident;
  const int64_t splits = blocks * kMaxRounds + blocks / 4 + 2 * rows;
  return static_cast<uint64_t>(splits * group) *
         (sizeof(float2) + sizeof(float) * static_cast<uint64_t>(dim));
}

// Shared memory of a block for the merge, at most: of 35 splits of 128 channels, as 8 rows have, one
// copy brings all sums. What reads whole rows needs the L1 that this takes from, 98 KB for what is on
// its way (dense_attention, 64 rows of 128K: 0.92 of cuDNN's rate with as much, 0.97 with less).
inline constexpr size_t kMergeBytes = size_t{74} * 1024, kRowMergeBytes = size_t{31} * 1024;
static_assert(kRowMergeBytes / kFlashWarps >= sizeof(float) * (4 * kMaxSplits + kMaxHeadDim),
              "the weights of all splits and the sums of one");

// Bytes of shared memory of a launch that needs `own` until it merges; fills call.merge_batch.
// most_own: what any launch of the kernel needs.
template <typename Kernel>
size_t flash_launch_bytes(FlashCall& call, Kernel* kernel, size_t own, size_t most_own,
                          size_t merge_bytes) {
  const size_t most = std::max(std::min(merge_bytes, call.merge_bytes), kRowMergeBytes);
  size_t bytes = own;
  if (call.finish) {
    call.merge_batch = 0;
    const int words = static_cast<int>(std::max(own, most) / (sizeof(float) * kFlashWarps));
    call.merge_batch = std::min(call.splits(), (words - call.merge_words()) / call.view.head_dim);
    bytes = std::max(own, sizeof(float) * kFlashWarps * static_cast<size_t>(call.merge_words()));
  }
  if (bytes > 48 * 1024) {
    // The same for every launch, so that launches of other threads cannot be in each other's way.
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               static_cast<int>(std::max(most_own, most))),
          "asking for an attention kernel's shared memory");
  }
  return bytes;
}

inline void launch_attend_any(FlashCall call, cudaStream_t stream) {
  const int dim = call.view.head_dim, rows = call.view.num_sequences * call.view.num_kv_heads;
  const auto launch = [&](auto lanes, auto heads) {
    constexpr int kLanes = decltype(lanes)::value, kHeads = decltype(heads)::value;
    const auto kernel = attend_any<kLanes, kHeads>;
    const dim3 grid(static_cast<unsigned>(call.splits()), static_cast<unsigned>(rows),
                    static_cast<unsigned>((call.group + kHeads - 1) / kHeads));
    const size_t bytes =
        flash_launch_bytes(call, kernel, flash_shared_bytes(kHeads, dim),
                           flash_shared_bytes(kHeads, kMaxHeadDim), kRowMergeBytes);
    launch_overlapped("attend_any", kernel, grid, kFlashThreads, bytes, stream, call);
  };
  const auto with_lanes = [&](auto heads) {
    if (dim == 64) return launch(std::integral_constant<int, 8>{}, heads);
    if (dim == 256) return launch(std::integral_constant<int, 32>{}, heads);
    launch(std::integral_constant<int, 16>{}, heads);
  };
  if (call.group == 1) return with_lanes(std::integral_constant<int, 1>{});
  with_lanes(std::integral_constant<int, 4>{});
}

}  // namespace sikv::cuda

#endif  // SIKV_KERNELS_COMMON_BLOCK_FLASH_CUH_
