#include <algorithm>
#include <cub/block/block_reduce.cuh>
#include <cub/block/block_scan.cuh>
#include <memory>
#include <string>

#include "kernels/common/cuda_launch.h"
#include "kernels/common/thread_cache.cuh"
#include "kernels/common/thread_select.cuh"
#include "plugins/layouts/arithmetic.h"
#include "plugins/sdk/select.h"
#include "selectors/quest/quest.h"

namespace sikv::quest {
namespace {

// A layer's summaries, [B, H, pages, 2, D] in the input type: channel minima, then maxima.
struct Summaries {
  void* data;
  int pages;        // of a row at most
  int page_tokens;  // tokens of a page

  __device__ int64_t minima(int row, int page, int dim) const {
    return (int64_t{row} * pages + page) * 2 * dim;
  }
};

// Rows of newly encoded keys: token t of `keys` has position first + t.
struct NewKeys {
  sikv_rows keys;
  const int32_t* first_slot;  // device; [B, H]; null for a prompt, whose pages start at 0

  __device__ int first(int row) const { return first_slot != nullptr ? first_slot[row] : 0; }
  __device__ int count(const sikv_cache_view& view, int row) const {
    const int count = keys.count[row / view.num_kv_heads];
    return first_slot != nullptr ? count : min(count, view.encoded_len[row]);
  }
};

// Grid (pages that a call can touch, rows), a thread for each channel. No selector that evicts goes
// with this one, so slots are positions.
__global__ void summarise(const __grid_constant__ sikv_cache_view view,
                          const __grid_constant__ NewKeys added, Summaries summaries) {
  const int row = static_cast<int>(blockIdx.y), d = static_cast<int>(threadIdx.x);
  const int sequence = row / view.num_kv_heads, head = row % view.num_kv_heads;
  const int first = added.first(row), end = first + added.count(view, row);
  const int page = first / summaries.page_tokens + static_cast<int>(blockIdx.x);
  const int begin = page * summaries.page_tokens;
  if (begin >= end || page >= summaries.pages) return;
  const int64_t minimum = summaries.minima(row, page, view.head_dim) + d,
                maximum = minimum + view.head_dim;
  float low = INFINITY, high = -INFINITY;
  if (begin < first) {  // its earlier tokens came before
    low = sikv_load(summaries.data, view.dtype, minimum);
    high = sikv_load(summaries.data, view.dtype, maximum);
  }
  const sikv_rows& keys = added.keys;
  for (int p = max(begin, first); p < min(begin + summaries.page_tokens, end); ++p) {
    const int64_t token = int64_t{keys.first[sequence]} + p - first;
    const float k =
        sikv_load(keys.data, keys.dtype, token * keys.token_stride + head * keys.head_stride + d);
    low = fminf(low, k);
    high = fmaxf(high, k);
  }
  sikv_store(summaries.data, view.dtype, minimum, low);
  sikv_store(summaries.data, view.dtype, maximum, high);
}

constexpr int kScoreThreads = 128;

__device__ inline int num_pages(const sikv_cache_view& view, int row, int page_tokens) {
  return (view.encoded_len[row] + page_tokens - 1) / page_tokens;
}

// scores [B, H, pages]: the upper bound of q.k over a page, q the mean of the group's queries. A
// thread sums a page's channels in order, so that scores are ref's to the bit; its 16-byte loads
// share lines with themselves.
template <typename T>
__global__ __launch_bounds__(kScoreThreads) void score_pages(
    const __grid_constant__ sikv_cache_view view, const T* q, int group, Summaries summaries,
    float* scores) {
  __shared__ float mean[kMaxHeadDim];
  const int row = static_cast<int>(blockIdx.y), dim = view.head_dim;
  const int pages = num_pages(view, row, summaries.page_tokens);
  if (static_cast<int>(blockIdx.x) * kScoreThreads >= max(pages, 1)) return;
  for (int d = threadIdx.x; d < dim; d += kScoreThreads) {
    float sum = 0.0f;
    for (int g = 0; g < group; ++g) {
      const float x = cuda::to_float(q[(int64_t{row} * group + g) * dim + d]);
      if (blockIdx.x == 0 && !cuda::is_storable(x)) {
        cuda::report_fault(view, SIKV_FAULT_Q, row / view.num_kv_heads,
                           row % view.num_kv_heads * group + g, cuda::row_length(view, row) - 1, d,
                           x);
      }
      sum = add_rn(sum, x);
    }
    mean[d] = div_rn(sum, static_cast<float>(group));
  }
  __syncthreads();
  const int page = static_cast<int>(blockIdx.x) * kScoreThreads + static_cast<int>(threadIdx.x);
  if (page >= pages) return;
  constexpr int kWide = 16 / sizeof(T);
  const T* minima = static_cast<const T*>(summaries.data) + summaries.minima(row, page, dim);
  float score = 0.0f;
  for (int d = 0; d < dim; d += kWide) {
    const uint4 low = *reinterpret_cast<const uint4*>(minima + d);
    const uint4 high = *reinterpret_cast<const uint4*>(minima + dim + d);
    const T* m = reinterpret_cast<const T*>(&low);
    const T* M = reinterpret_cast<const T*>(&high);
#pragma unroll
    for (int i = 0; i < kWide; ++i) {
      const float x = mean[d + i];
      score =
          add_rn(score, fmaxf(mul_rn(x, cuda::to_float(m[i])), mul_rn(x, cuda::to_float(M[i]))));
    }
  }
  scores[int64_t{row} * summaries.pages + page] = score;
}

constexpr int kTakeThreads = 1024;

// Larger scores have larger keys; -0 counts as +0.
__device__ inline uint32_t sort_key(float score) {
  const uint32_t bits = __float_as_uint(score + 0.0f);
  return (bits & 0x80000000u) != 0 ? ~bits : bits | 0x80000000u;
}

// One block a row: the key of the last page taken, by a radix select over pages weighted with their
// unpinned tokens; then the pages' tokens in order, of equal pages the lower ones first.
__global__ __launch_bounds__(kTakeThreads) void take_pages(
    const __grid_constant__ sikv_cache_view view, sikv_selection selection,
    cuda::DeviceBudget budget, Summaries summaries, const float* all_scores) {
  using Scan = cub::BlockScan<int2, kTakeThreads>;
  __shared__ union {
    int histogram[256];
    typename Scan::TempStorage scan;
  } storage;
  __shared__ uint32_t chosen;
  __shared__ int chosen_left;
  const int row = static_cast<int>(blockIdx.x), encoded = view.encoded_len[row];
  const int page_tokens = summaries.page_tokens, pages = num_pages(view, row, page_tokens);
  const float* scores = all_scores + int64_t{row} * summaries.pages;
  const cuda::Unpinned slots(view, row);
  const auto first_rank = [&](int page) { return slots.rank(min(page * page_tokens, encoded)); };
  const int unpinned = slots.rank(encoded);
  const auto wanted = static_cast<int>(
      min(budget.tokens(cuda::row_length(view, row)), static_cast<int64_t>(unpinned)));
  if (threadIdx.x == 0) selection.counts[row] = wanted;
  if (wanted == 0) return;

  // After round k the keys' upper 8 (k + 1) bits are known, and how many tokens are left for pages
  // that share them.
  uint32_t prefix = 0;
  int left = wanted;
  for (int shift = 24; shift >= 0; shift -= 8) {
    for (int i = threadIdx.x; i < 256; i += kTakeThreads) storage.histogram[i] = 0;
    __syncthreads();
    for (int page = threadIdx.x; page < pages; page += kTakeThreads) {
      const uint32_t key = sort_key(scores[page]);
      if (shift < 24 && key >> (shift + 8) != prefix) continue;
      const int weight = first_rank(page + 1) - first_rank(page);
      if (weight > 0) atomicAdd(&storage.histogram[key >> shift & 255u], weight);
    }
    __syncthreads();
    if (threadIdx.x < 32) {
      // Lane n has bins 255 - 8 n down to 248 - 8 n.
      const int lane = threadIdx.x;
      int total = 0;
      for (int i = 0; i < 8; ++i) total += storage.histogram[255 - 8 * lane - i];
      int above = total;
      for (int o = 1; o < 32; o *= 2) {
        const int other = __shfl_up_sync(0xffffffffu, above, o);
        if (lane >= o) above += other;
      }
      above -= total;
      if (above < left && above + total >= left) {
        int bin = 255 - 8 * lane;
        while (above + storage.histogram[bin] < left) above += storage.histogram[bin--];
        chosen = prefix << 8 | static_cast<uint32_t>(bin);
        chosen_left = left - above;
      }
    }
    __syncthreads();
    prefix = chosen;
    left = chosen_left;
  }

  int32_t* const out = selection.slots + int64_t{row} * selection.capacity;
  int2 done = {0, 0};  // tokens of better pages, and of pages with the last key, so far
  for (int base = 0; base < pages; base += kTakeThreads) {
    const int page = base + static_cast<int>(threadIdx.x);
    int2 tokens = {0, 0};
    int rank = 0;
    if (page < pages) {
      const uint32_t key = sort_key(scores[page]);
      rank = first_rank(page);
      const int weight = first_rank(page + 1) - rank;
      if (key > prefix) tokens.x = weight;
      if (key == prefix) tokens.y = weight;
    }
    const auto add = [](int2 a, int2 b) { return int2{a.x + b.x, a.y + b.y}; };
    int2 before, total;
    __syncthreads();
    Scan(storage.scan).ExclusiveScan(tokens, before, int2{0, 0}, add, total);
    before = add(before, done);
    // Of pages with the last key `left` tokens are taken in all.
    const int take = tokens.x + max(min(tokens.y, left - before.y), 0);
    const int at = before.x + min(before.y, left);
    for (int i = 0; i < take; ++i) out[at + i] = slots.slot(rank + i);
    done = add(done, total);
  }
}

class Quest : public Selector {
 public:
  explicit Quest(const CreateArgs& args)
      : budget_(args.options.budget("budget")),
        page_tokens_(static_cast<int>(args.options.integer("page_tokens"))),
        shape_(args.shape),
        rows_(int64_t{args.shape.max_sequences} * args.shape.num_kv_heads),
        pages_((args.shape.max_tokens + page_tokens_ - 1) / page_tokens_) {}
  Quest(const Quest&) = delete;
  Quest& operator=(const Quest&) = delete;
  ~Quest() override { cudaFree(summaries_); }

  Plan plan() override {
    if (summaries_ == nullptr) {
      const cudaError_t status = cudaMalloc(&summaries_, state_size());
      if (status == cudaErrorMemoryAllocation) {
        cudaGetLastError();
        throw Refused("quest keeps " + std::to_string(state_size() >> 20) +
                      " MiB of page summaries on the GPU, which are not free there: use fewer "
                      "sequences, shorter ones or larger page_tokens");
      }
      cuda::check(status, "cudaMalloc of quest's summaries");
    }
    return {selection_capacity(budget_, shape_),
            static_cast<uint64_t>(rows_ * pages_) * sizeof(float)};
  }

  // A sequence's pages are written before they are read again: nothing has to be dropped.
  void observe(const sikv_observe_args& args, const CacheView& view, Launch launch) override {
    summarise_new({args.keys, nullptr}, *args.view, view, launch, 0);
  }
  void observe_page(const sikv_observe_page_args& args, const CacheView& view,
                    Launch launch) override {
    // A page of the cache may begin within one of ours.
    summarise_new({args.keys, args.first_slot}, *args.view, view, launch, 1);
  }

  void run(const sikv_select_args& args, const CacheView& view, Launch launch) override {
    const cudaStream_t stream = cuda::stream(launch);
    const Summaries summaries = of_layer(view.layer());
    auto* const scores = static_cast<float*>(launch.workspace);
    const int most =
        std::min((args.view->max_encoded_len + page_tokens_ - 1) / page_tokens_, pages_);
    const dim3 grid(static_cast<unsigned>(std::max((most + kScoreThreads - 1) / kScoreThreads, 1)),
                    static_cast<unsigned>(view.num_rows()));
    cuda::with_dtype(view.dtype(), [&](auto element) {
      using T = decltype(element);
      score_pages<T><<<grid, kScoreThreads, 0, stream>>>(*args.view, static_cast<const T*>(args.q),
                                                         args.num_query_heads / view.num_kv_heads(),
                                                         summaries, scores);
    });
    cuda::check_launch("score_pages", grid, kScoreThreads, stream);
    const auto rows = static_cast<unsigned>(view.num_rows());
    take_pages<<<rows, kTakeThreads, 0, stream>>>(*args.view, args.selection,
                                                  cuda::DeviceBudget(budget_), summaries, scores);
    cuda::check_launch("take_pages", rows, kTakeThreads, stream);
  }

  uint64_t state_bytes() const override { return summaries_ == nullptr ? 0 : state_size(); }

 private:
  int64_t layer_bytes() const {
    return rows_ * pages_ * 2 * shape_.head_dim * sikv_dtype_bytes(shape_.dtype);
  }
  uint64_t state_size() const {
    return static_cast<uint64_t>(layer_bytes()) * static_cast<uint64_t>(shape_.num_layers);
  }
  Summaries of_layer(int layer) const {
    return {static_cast<uint8_t*>(summaries_) + layer_bytes() * layer, pages_, page_tokens_};
  }

  void summarise_new(const NewKeys& added, const sikv_cache_view& raw, const CacheView& view,
                     Launch launch, int more_pages) const {
    const int pages = (added.keys.max_count + page_tokens_ - 1) / page_tokens_ + more_pages;
    const dim3 grid(static_cast<unsigned>(std::max(std::min(pages, pages_), 1)),
                    static_cast<unsigned>(view.num_rows()));
    const auto threads = static_cast<unsigned>(view.head_dim());
    summarise<<<grid, threads, 0, cuda::stream(launch)>>>(raw, added, of_layer(view.layer()));
    cuda::check_launch("summarise", grid, threads, cuda::stream(launch));
  }

  Budget budget_;
  int page_tokens_;
  sikv_shape shape_;
  int64_t rows_;
  int pages_;
  void* summaries_ = nullptr;  // device; [layers, B, H, pages, 2, D]
};

std::unique_ptr<Selector> make_cuda(const CreateArgs& args) {
  return std::make_unique<Quest>(args);
}

}  // namespace
}  // namespace sikv::quest

SIKV_PLUGIN(
    "quest", "1.0.0", SIKV_CUDA, SIKV_KIND_BIT(SIKV_SELECTOR),
    sikv::selector<sikv::quest::make_cuda, sikv::quest::kOptions, sikv::cuda::probe>("cuda"))
