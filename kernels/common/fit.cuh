// Fits on the device, equal to the reference's to the bit: sums in fp64 in runs of 256 tokens, a
// run by one thread (or group of threads) in token order, then the runs in order
// (plugins/layouts/paged_sum.h).
//
//   1. channel_runs: sums of every channel, one per (row, run)      reads the rows once, at
//   bandwidth
//   2. add_runs: runs onto totals, in order
//   3. mean = total / tokens
//   4. codebook_runs: sums of every (group, pattern, channel), counts, sums of |x|, largest |x|
//   5. add_runs, then codebook_finish
//
// Run sums of the codebook are 17 D doubles; longer prompts go in waves of as many runs as
// kWorkspaceBytes holds.
#ifndef SIKV_KERNELS_COMMON_FIT_CUH_
#define SIKV_KERNELS_COMMON_FIT_CUH_

#include <algorithm>

#include "kernels/common/cuda_launch.h"
#include "kernels/common/thread_sample.cuh"
#include "kernels/common/warp_tile.cuh"
#include "plugins/layouts/arithmetic.h"

namespace sikv::cuda {

inline constexpr int kRun = PagedSum::kRun;

// Doubles of one run's codebook sums: [16, 2, D/4, 2] sums by pattern, channel pair, group, then
// [2, D/4, 2] magnitudes: neighbouring groups lie together.
__host__ __device__ constexpr int codebook_run_doubles(int head_dim) { return 17 * head_dim; }

// The rows of a fit and where its results go.
struct FitCall {
  sikv_rows rows;
  sikv_fault_what what;
  bool aligned;
  int fit_tokens;    // 0: all
  int first_run;     // of this wave
  int runs;          // of this wave
  double* run_sums;  // [B * H, runs, n]
  double* totals;    // [B * H, n]
  uint32_t* counts;  // [B * H, D/4 * 16] tokens with a pattern, entry pattern * D/4 + group
  float* mean;       // [B, H, D]
  float* largest;    // [B, H, D] largest |x|, or null
  float* codebook;   // [B, H, D/4, 16, 4]
};

// A read that stays where it is written, so that several are under way.
__device__ inline uint4 load_ahead(const uint4* from) {
  uint4 v;
  asm volatile("ld.global.nc.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(from));
  return v;
}
// ---- channels -----------------------------------------------------------------------------------

// 16 bytes of a row to a thread, a run to a thread: x = (run, chunk of the H * D numbers of a
// token), z = sequence. 8 tokens are under way at a time.
template <typename T>
__global__ void __launch_bounds__(128) channel_runs(const __grid_constant__ sikv_cache_view view,
                                                    const __grid_constant__ FitCall call) {
  constexpr int kNumbers = 16 / sizeof(T), kAhead = 8;
  const int head_dim = view.head_dim;
  const int per_head = head_dim / kNumbers, per_token = per_head * view.num_kv_heads;
  const int flat = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  const int run = flat / per_token, chunk = flat % per_token;
  const int h = chunk / per_head, first_channel = chunk % per_head * kNumbers;
  const int b = static_cast<int>(blockIdx.z);
  const int count = call.rows.count[b];
  if (run >= call.runs || count <= 0) return;
  const FitSample sample(count, call.fit_tokens);
  const int first = (call.first_run + run) * kRun;
  if (first >= sample.size) return;
  const int entries = min(kRun, sample.size - first);

  const uint8_t* from =
      row_address(call.rows, call.rows.first[b], 0, h) + first_channel * sizeof(T);
  const int64_t stride = call.rows.token_stride * static_cast<int64_t>(sizeof(T));
  SampleWalk walk(sample, first);
  double sum[kNumbers] = {};
  LargestOf<T> largest;
  const auto add = [&](const uint32_t(&words)[4]) {
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      largest.see(words[w]);
      float x[2];
      unpack_word<T>(words[w], x);
#pragma unroll
      for (int k = 0; k < kPerWord<T>; ++k) sum[w * kPerWord<T> + k] += static_cast<double>(x[k]);
    }
  };
  if (call.aligned) {
    int t = 0;
    for (; t + kAhead <= entries; t += kAhead) {
      uint4 loaded[kAhead];
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        loaded[i] = load_ahead(reinterpret_cast<const uint4*>(from + walk.position() * stride));
        walk.advance();
      }
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        add({loaded[i].x, loaded[i].y, loaded[i].z, loaded[i].w});
      }
    }
    for (; t < entries; ++t) {
      const uint4 v = __ldg(reinterpret_cast<const uint4*>(from + walk.position() * stride));
      walk.advance();
      add({v.x, v.y, v.z, v.w});
    }
  } else {
    for (int t = 0; t < entries; ++t, walk.advance()) {
      uint32_t words[4] = {};
      for (int k = 0; k < kNumbers; ++k) {
        const uint8_t* at = from + walk.position() * stride + k * sizeof(T);
        if constexpr (sizeof(T) == 4) {
          words[k] = *reinterpret_cast<const uint32_t*>(at);
        } else {
          words[k / 2] |= uint32_t{*reinterpret_cast<const uint16_t*>(at)} << (16 * (k % 2));
        }
      }
      add(words);
    }
  }
  if (!largest.storable()) {
    SampleWalk again(sample, first);
    for (int t = 0; t < entries; ++t, again.advance()) {
      for (int k = 0; k < kNumbers; ++k) {
        const float x = to_float(reinterpret_cast<const T*>(from + again.position() * stride)[k]);
        if (is_storable(x)) continue;
        report_fault(view, call.what, b, h, again.position(), first_channel + k, x);
        return;
      }
    }
  }
  const int64_t row = int64_t{b} * view.num_kv_heads + h;
  double* to = call.run_sums + (row * call.runs + run) * head_dim + first_channel;
#pragma unroll
  for (int k = 0; k < kNumbers; k += 2) {
    reinterpret_cast<double2*>(to)[k / 2] = make_double2(sum[k], sum[k + 1]);
  }
}

// Checks the newest tokens of every prompt, a warp to a token: they may stay in the tail, where no
// encode sees them. For fits that read a sample, and codecs without tables.
static __global__ void __launch_bounds__(128)
    check_newest(const __grid_constant__ sikv_cache_view view,
                 const __grid_constant__ FitCall call) {
  const int b = static_cast<int>(blockIdx.y), count = call.rows.count[b];
  const int age = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x) / 32;  // 0: the newest
  const int lane = static_cast<int>(threadIdx.x) % 32;
  if (age >= count) return;
  const int position = count - 1 - age;
  for (int h = 0; h < view.num_kv_heads; ++h) {
    const uint8_t* row = row_address(call.rows, call.rows.first[b], position, h);
    for (int d = lane; d < view.head_dim; d += 32) {
      const float x = load_number(call.rows.dtype, row, d);
      if (!is_storable(x)) report_fault(view, call.what, b, h, position, d, x);
    }
  }
}

// ---- runs ---------------------------------------------------------------------------------------

// Adds a wave's runs onto totals [B * H, n], in order; the first wave begins at 0.
static __global__ void __launch_bounds__(256)
    add_runs(const __grid_constant__ sikv_cache_view view, const __grid_constant__ FitCall call,
             int n) {
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  const int row = static_cast<int>(blockIdx.y);
  const int count = call.rows.count[row / view.num_kv_heads];
  if (i >= n || count <= 0) return;
  const int size = FitSample(count, call.fit_tokens).size;
  const int runs = min((size + kRun - 1) / kRun - call.first_run, call.runs);
  double* total = call.totals + int64_t{row} * n + i;
  double sum = call.first_run == 0 ? 0.0 : *total;
  const double* run = call.run_sums + int64_t{row} * call.runs * n + i;
  int r = 0;
  for (; r + 8 <= runs; r += 8) {  // 8 loads under way
    double ahead[8];
#pragma unroll
    for (int k = 0; k < 8; ++k) ahead[k] = __ldg(run + int64_t{r + k} * n);
#pragma unroll
    for (int k = 0; k < 8; ++k) sum += ahead[k];
  }
  for (; r < runs; ++r) sum += run[int64_t{r} * n];
  *total = sum;
}

// mean [B, H, D] <- totals / tokens; 0 where `centred` is false. Clears `largest`.
static __global__ void __launch_bounds__(256)
    mean_finish(const __grid_constant__ sikv_cache_view view, const __grid_constant__ FitCall call,
                bool centred) {
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  const int row = static_cast<int>(blockIdx.y);
  const int count = call.rows.count[row / view.num_kv_heads];
  if (i >= view.head_dim || count <= 0) return;
  const int64_t at = int64_t{row} * view.head_dim + i;
  const double tokens = FitSample(count, call.fit_tokens).size;
  call.mean[at] = centred ? static_cast<float>(call.totals[at] / tokens) : 0.0f;
  if (call.largest != nullptr) call.largest[at] = 0.0f;
}

// ---- codebook -----------------------------------------------------------------------------------

// The sums of one run and group, in shared memory: each thread owns a column, so that any patterns
// of 8 neighbours fall into different banks. 32 bytes read and 32 written per token and group.
template <int D, int kThreads>
struct CodebookColumns {
  double2* sums;                // [16, 2, kThreads] by pattern and channel pair
  uint16_t* counts;             // [16, kThreads]
  uint32_t sums_at, counts_at;  // the same as addresses of shared memory

  static constexpr int kBytes = kThreads * (16 * 2 * 16 + 16 * 2);

  __device__ CodebookColumns(uint8_t* shared, int column)
      : sums(reinterpret_cast<double2*>(shared) + column),
        counts(reinterpret_cast<uint16_t*>(shared + kThreads * 16 * 2 * 16) + column),
        sums_at(static_cast<uint32_t>(__cvta_generic_to_shared(sums))),
        counts_at(static_cast<uint32_t>(__cvta_generic_to_shared(counts))) {}
  __device__ void clear() {
    for (int i = 0; i < 32; ++i) sums[i * kThreads] = make_double2(0.0, 0.0);
    for (int i = 0; i < 16; ++i) counts[i * kThreads] = 0;
  }
  __device__ void add(const float4& x, const double (&wide)[4]) {
    const int pattern = (x.x >= 0.0f ? 1 : 0) | (x.y >= 0.0f ? 2 : 0) | (x.z >= 0.0f ? 4 : 0) |
                        (x.w >= 0.0f ? 8 : 0);
    // All three are read before any is written: one trip to shared memory per token, not three.
    const uint32_t at = sums_at + static_cast<uint32_t>(pattern) * (2 * kThreads * 16);
    const uint32_t count_at = counts_at + static_cast<uint32_t>(pattern) * (kThreads * 2);
    double2 low, high;
    uint16_t count;
    asm volatile("ld.shared.v2.f64 {%0, %1}, [%2];" : "=d"(low.x), "=d"(low.y) : "r"(at));
    asm volatile("ld.shared.v2.f64 {%0, %1}, [%2];"
                 : "=d"(high.x), "=d"(high.y)
                 : "r"(at + kThreads * 16));
    asm volatile("ld.shared.u16 %0, [%1];" : "=h"(count) : "r"(count_at));
    low.x += wide[0], low.y += wide[1], high.x += wide[2], high.y += wide[3];
    asm volatile("st.shared.v2.f64 [%0], {%1, %2};" ::"r"(at), "d"(low.x), "d"(low.y) : "memory");
    asm volatile("st.shared.v2.f64 [%0], {%1, %2};" ::"r"(at + kThreads * 16), "d"(high.x),
                 "d"(high.y)
                 : "memory");
    asm volatile("st.shared.u16 [%0], %1;" ::"r"(count_at), "h"(static_cast<uint16_t>(count + 1))
                 : "memory");
  }
};

// What a thread gathers of its group over a run, besides the columns.
template <bool kLargest>
struct GroupExtras {
  double magnitude[4] = {};
  float4 largest = {};

  __device__ void add(const float4& x, const double (&wide)[4]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) magnitude[i] += fabs(wide[i]);
    if constexpr (kLargest) {
      largest.x = fmaxf(largest.x, fabsf(x.x)), largest.y = fmaxf(largest.y, fabsf(x.y));
      largest.z = fmaxf(largest.z, fabsf(x.z)), largest.w = fmaxf(largest.w, fabsf(x.w));
    }
  }
};

// Non-negative floats order like their bits.
__device__ inline void raise(float* to, float x) {
  if (x > 0.0f) atomicMax(reinterpret_cast<unsigned int*>(to), __float_as_uint(x));
}

// Writes a run's sums of group g.
template <int D, int kThreads, bool kLargest>
__device__ inline void store_group(const FitCall& call, int64_t row, int run, int g,
                                   const CodebookColumns<D, kThreads>& columns,
                                   const GroupExtras<kLargest>& extras) {
  constexpr int kGroups = D / 4;
  double* sums = call.run_sums + (row * call.runs + run) * codebook_run_doubles(D);
  auto* pairs = reinterpret_cast<double2*>(sums) + g;
#pragma unroll 4
  for (int i = 0; i < 32; ++i) pairs[i * kGroups] = columns.sums[i * kThreads];
  pairs[32 * kGroups] = make_double2(extras.magnitude[0], extras.magnitude[1]);
  pairs[33 * kGroups] = make_double2(extras.magnitude[2], extras.magnitude[3]);
  uint32_t* counts = call.counts + row * 16 * kGroups + g;
  for (int c = 0; c < 16; ++c) {
    const uint32_t n = columns.counts[c * kThreads];
    if (n != 0) atomicAdd(counts + c * kGroups, n);
  }
  if constexpr (kLargest) {
    float* largest = call.largest + row * D + 4 * g;
    raise(largest, extras.largest.x), raise(largest + 1, extras.largest.y);
    raise(largest + 2, extras.largest.z), raise(largest + 3, extras.largest.w);
  }
}

// Rows minus their mean: a thread to (run, group). What a thread needs of the next 12 to 16 tokens
// is on its way to a ring of its own in shared memory: loads into registers end up next to their
// use, where every token costs a trip to memory.
template <int D>
inline constexpr int kCodebookThreads = D == 96 ? 96 : 64;

template <int D, typename T>
__global__ void __launch_bounds__(kCodebookThreads<D>)
    centred_codebook_runs(const __grid_constant__ sikv_cache_view view,
                          const __grid_constant__ FitCall call) {
  constexpr int kThreads = kCodebookThreads<D>, kGroups = D / 4, kRing = 16, kStep = 4;
  using Columns = CodebookColumns<D, kThreads>;
  using Packed = std::conditional_t<sizeof(T) == 4, uint4, uint2>;
  extern __shared__ __align__(16) uint8_t shared[];
  const int thread = static_cast<int>(threadIdx.x), g = thread % kGroups;
  const int flat = static_cast<int>(blockIdx.x) * (kThreads / kGroups) + thread / kGroups;
  const int heads = view.num_kv_heads, h = flat % heads, run = flat / heads;
  const int b = static_cast<int>(blockIdx.y), count = call.rows.count[b];
  if (run >= call.runs || count <= 0) return;
  const FitSample sample(count, call.fit_tokens);
  const int first = (call.first_run + run) * kRun;
  if (first >= sample.size) return;
  const int entries = min(kRun, sample.size - first);
  const int64_t row = int64_t{b} * heads + h;
  const float4 mean = reinterpret_cast<const float4*>(call.mean + row * D)[g];

  auto* ring = reinterpret_cast<Packed*>(shared + Columns::kBytes) + thread;
  const uint8_t* from = row_address(call.rows, call.rows.first[b], 0, h) + 4 * g * sizeof(T);
  const int64_t stride = call.rows.token_stride * static_cast<int64_t>(sizeof(T));
  SampleWalk walk(sample, first);
  const auto copy = [&](int t) {
    Packed* to = ring + t % kRing * kThreads;
    const uint8_t* at = from + walk.position() * stride;
    walk.advance();
    if (call.aligned) {
      copy_async<sizeof(Packed)>(to, at);
    } else {
      for (int k = 0; k < 4; ++k) reinterpret_cast<T*>(to)[k] = reinterpret_cast<const T*>(at)[k];
    }
  };
  const auto ask = [&](int t) {  // for entries t .. t + kStep - 1
    if (t + kStep <= entries) {
#pragma unroll
      for (int i = 0; i < kStep; ++i) copy(t + i);
    } else {
      for (int i = t; i < entries; ++i) copy(i);
    }
    commit_copies();
  };
#pragma unroll
  for (int t = 0; t < kRing - kStep; t += kStep) ask(t);

  Columns columns(shared, thread);
  columns.clear();
  GroupExtras<true> extras;
  const auto add = [&](const Packed& packed) {
    float v[4];
    unpack_word<T>(packed.x, v);
    unpack_word<T>(packed.y, v + kPerWord<T>);
    if constexpr (sizeof(T) == 4) {
      unpack_word<T>(packed.z, v + 2);
      unpack_word<T>(packed.w, v + 3);
    }
    const float4 x = make_float4(add_rn(v[0], -mean.x), add_rn(v[1], -mean.y),
                                 add_rn(v[2], -mean.z), add_rn(v[3], -mean.w));
    const double wide[4] = {x.x, x.y, x.z, x.w};
    columns.add(x, wide);
    extras.add(x, wide);
  };
  for (int t = 0; t < entries; t += kStep) {
    ask(t + kRing - kStep);
    wait_copies<kRing / kStep - 1>();
    // All of a step's numbers are read before the first sum is written.
    Packed packed[kStep];
#pragma unroll
    for (int i = 0; i < kStep; ++i) packed[i] = ring[(t + i) % kRing * kThreads];
    if (t + kStep <= entries) {
#pragma unroll
      for (int i = 0; i < kStep; ++i) add(packed[i]);
    } else {
#pragma unroll
      for (int i = 0; i < kStep; ++i) {
        if (t + i < entries) add(packed[i]);
      }
    }
  }
  store_group<D, kThreads>(call, row, run, g, columns, extras);
}

// codebook [B, H, D/4, 16, 4] <- totals and counts; zeros of `largest` become 1.
static __global__ void __launch_bounds__(256)
    codebook_finish(const __grid_constant__ sikv_cache_view view,
                    const __grid_constant__ FitCall call) {
  const int head_dim = view.head_dim, groups = head_dim / 4;
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  const int row = static_cast<int>(blockIdx.y);
  const int count = call.rows.count[row / view.num_kv_heads];
  if (i >= 16 * head_dim || count <= 0) return;
  const int g = i / 64, c = i / 4 % 16, k = i % 4;
  const double* totals = call.totals + int64_t{row} * codebook_run_doubles(head_dim);
  const uint32_t n = call.counts[int64_t{row} * 16 * groups + c * groups + g];
  const int pair = ((c * 2 + k / 2) * groups + g) * 2 + k % 2;
  double entry = totals[pair] / static_cast<double>(n);
  if (n == 0) {
    const double tokens = FitSample(count, call.fit_tokens).size;
    const double magnitude = totals[16 * head_dim + (k / 2 * groups + g) * 2 + k % 2] / tokens;
    entry = (c >> k & 1) != 0 ? magnitude : -magnitude;
  }
  call.codebook[int64_t{row} * 16 * head_dim + i] = static_cast<float>(entry);
  if (call.largest != nullptr && i < head_dim) {
    float* largest = call.largest + int64_t{row} * head_dim + i;
    if (*largest == 0.0f) *largest = 1.0f;
  }
}

// ---- host ---------------------------------------------------------------------------------------

// Of the workspace, for run sums: the 64 runs of a sample of 16384 tokens for 64 rows at D = 128.
inline constexpr uint64_t kWorkspaceBytes = uint64_t{72} << 20;

// The workspace of a fit: [totals][counts][run sums].
struct FitWorkspace {
  uint64_t totals, counts, run_sums;

  FitWorkspace(int rows, int head_dim)
      : totals(uint64_t{sizeof(double)} * rows * codebook_run_doubles(head_dim)),
        counts(uint64_t{sizeof(uint32_t)} * rows * 4 * head_dim),
        run_sums(std::max(kWorkspaceBytes, totals)) {}
  uint64_t bytes() const { return totals + counts + run_sums; }
};

inline FitCall fit_call(const sikv_rows& rows, const sikv_cache_view& view, sikv_fault_what what,
                        int fit_tokens, int max_rows, void* workspace) {
  const FitWorkspace parts(max_rows, view.head_dim);
  auto* bytes = static_cast<uint8_t*>(workspace);
  FitCall call{};
  call.rows = rows;
  call.what = what;
  call.aligned = is_aligned(rows);
  call.fit_tokens = fit_tokens;
  call.totals = reinterpret_cast<double*>(bytes);
  call.counts = reinterpret_cast<uint32_t*>(bytes + parts.totals);
  call.run_sums = reinterpret_cast<double*>(bytes + parts.totals + parts.counts);
  return call;
}

// Launches `wave` for as many runs at a time as the workspace holds, n doubles each, and adds them
// to the totals.
template <typename Wave>
void for_each_wave(const sikv_cache_view& view, FitCall call, int max_rows, int n,
                   cudaStream_t stream, const Wave& wave) {
  const int rows = view.num_sequences * view.num_kv_heads;
  const int longest = FitSample(call.rows.max_count, call.fit_tokens).size;
  const int runs = (longest + kRun - 1) / kRun;
  const uint64_t bytes = FitWorkspace(max_rows, view.head_dim).run_sums;
  const auto most = static_cast<int>(
      std::min<uint64_t>(bytes / (uint64_t{sizeof(double)} * rows * n), uint64_t(runs)));
  const int waves = (runs + most - 1) / most, room = (runs + waves - 1) / waves;  // of one size
  for (call.first_run = 0; call.first_run < runs; call.first_run += room) {
    call.runs = std::min(room, runs - call.first_run);
    wave(call);
    const dim3 grid((n + 255) / 256, rows);
    add_runs<<<grid, 256, 0, stream>>>(view, call, n);
    check_launch("add_runs", grid, 256, stream);
  }
}

// Looks for numbers that are not storable in the newest page's worth of every prompt.
inline void launch_check_newest(const sikv_cache_view& view, const FitCall& call,
                                cudaStream_t stream) {
  const dim3 grid(SIKV_PAGE_TOKENS / 4, view.num_sequences);
  check_newest<<<grid, 128, 0, stream>>>(view, call);
  check_launch("check_newest", grid, 128, stream);
}

// call.mean <- the channels' means, or 0; every number read is checked.
inline void launch_means(const sikv_cache_view& view, const FitCall& call, int max_rows,
                         bool centred, cudaStream_t stream) {
  for_each_wave(view, call, max_rows, view.head_dim, stream, [&](const FitCall& wave) {
    with_dtype(wave.rows.dtype, [&](auto element) {
      using T = decltype(element);
      const int per_token = view.head_dim * static_cast<int>(sizeof(T)) / 16 * view.num_kv_heads;
      const auto threads = int64_t{wave.runs} * per_token;
      const dim3 grid(static_cast<unsigned>((threads + 127) / 128), 1, view.num_sequences);
      channel_runs<T><<<grid, 128, 0, stream>>>(view, wave);
      check_launch("channel_runs", grid, 128, stream);
    });
  });
  const dim3 grid((view.head_dim + 255) / 256, view.num_sequences * view.num_kv_heads);
  mean_finish<<<grid, 256, 0, stream>>>(view, call, centred);
  check_launch("mean_finish", grid, 256, stream);
  if (call.fit_tokens != 0) launch_check_newest(view, call, stream);
}

// A wave of centred_codebook_runs.
template <int D>
void launch_centred_codebook(const sikv_cache_view& view, const FitCall& wave,
                             cudaStream_t stream) {
  constexpr int kThreads = kCodebookThreads<D>;
  with_dtype(wave.rows.dtype, [&](auto element) {
    using T = decltype(element);
    constexpr int kRuns = kThreads / (D / 4);
    constexpr int kShared =
        CodebookColumns<D, kThreads>::kBytes + kThreads * 16 * 4 * static_cast<int>(sizeof(T));
    check(cudaFuncSetAttribute(centred_codebook_runs<D, T>,
                               cudaFuncAttributeMaxDynamicSharedMemorySize, kShared),
          "raising the shared memory of centred_codebook_runs");
    const dim3 grid((wave.runs * view.num_kv_heads + kRuns - 1) / kRuns, view.num_sequences);
    centred_codebook_runs<D, T><<<grid, kThreads, kShared, stream>>>(view, wave);
    check_launch("centred_codebook_runs", grid, kThreads, stream);
  });
}

// call.codebook and call.largest from `wave`, which launches the codebook sums of its runs.
template <typename Wave>
void launch_codebook(const sikv_cache_view& view, const FitCall& call, int max_rows,
                     cudaStream_t stream, const Wave& wave) {
  const int rows = view.num_sequences * view.num_kv_heads;
  check(cudaMemsetAsync(call.counts, 0, sizeof(uint32_t) * 4 * rows * view.head_dim, stream),
        "clearing the counts of a fit");
  for_each_wave(view, call, max_rows, codebook_run_doubles(view.head_dim), stream, wave);
  const dim3 grid((16 * view.head_dim + 255) / 256, rows);
  codebook_finish<<<grid, 256, 0, stream>>>(view, call);
  check_launch("codebook_finish", grid, 256, stream);
}

}  // namespace sikv::cuda

#endif  // SIKV_KERNELS_COMMON_FIT_CUH_
