#include <memory>
#include <vector>

#include "kernels/common/cuda_launch.h"
#include "kernels/common/thread_select.cuh"
#include "plugins/sdk/select.h"
#include "selectors/random/random.h"

namespace sikv::random {
namespace {

// std::mt19937_64 seeded by std::seed_seq, by one block: the numbers of the C++ standard, so that a
// draw equals ref's.
class Mersenne {
 public:
  static constexpr int kWords = 312, kHalf = 156;

  struct Storage {
    uint64_t state[kWords];
  };

  __device__ explicit Mersenne(Storage& storage) : x_(storage.state) {}

  // One thread; a barrier must follow.
  __device__ void seed(const uint32_t (&words)[4]) {
    auto* const b = reinterpret_cast<uint32_t*>(x_);
    constexpr int n = 2 * kWords, s = 4, t = 11, p = (n - t) / 2, q = p + t;  // n >= 623: t = 11
    constexpr int m = n > s + 1 ? n : s + 1;
    const auto mix = [](uint32_t x) { return x ^ x >> 27; };
    for (int k = 0; k < n; ++k) b[k] = 0x8b8b8b8bu;
    for (int k = 0; k < m; ++k) {
      const uint32_t r1 = 1664525u * mix(b[k % n] ^ b[(k + p) % n] ^ b[(k + n - 1) % n]);
      const uint32_t r2 = r1 + static_cast<uint32_t>(k == 0   ? s
                                                     : k <= s ? k % n + words[k - 1]
                                                              : static_cast<uint32_t>(k % n));
      b[(k + p) % n] += r1;
      b[(k + q) % n] += r2;
      b[k % n] = r2;
    }
    for (int k = m; k < m + n; ++k) {
      const uint32_t r3 = 1566083941u * mix(b[k % n] + b[(k + p) % n] + b[(k + n - 1) % n]);
      const uint32_t r4 = r3 - static_cast<uint32_t>(k % n);
      b[(k + p) % n] ^= r3;
      b[(k + q) % n] ^= r4;
      b[k % n] = r4;
    }
    // A state whose upper 33 bits of word 0 and all other words are zero does not come out of these
    // seeds in practice; the standard's answer to it is 2^63 in word 0.
    bool zero = x_[0] >> 31 == 0;
    for (int i = 1; zero && i < kWords; ++i) zero = x_[i] == 0;
    if (zero) x_[0] = uint64_t{1} << 63;
  }

  // The next kWords states; all threads of a block of at least kHalf.
  __device__ void twist() {
    const int i = static_cast<int>(threadIdx.x);
    const auto next = [&](uint64_t upper, uint64_t lower, uint64_t far) {
      const uint64_t y = (upper & ~kLower) | (lower & kLower);
      return far ^ y >> 1 ^ ((y & 1u) != 0 ? 0xb5026f5aa96619e9u : 0u);
    };
    uint64_t x = 0;
    if (i < kHalf) x = next(x_[i], x_[i + 1], x_[i + kHalf]);
    __syncthreads();
    if (i < kHalf) x_[i] = x;
    __syncthreads();
    if (i < kHalf) x = next(x_[i + kHalf], x_[(i + kHalf + 1) % kWords], x_[i]);
    __syncthreads();
    if (i < kHalf) x_[i + kHalf] = x;
    __syncthreads();
  }

  // Number i of this round, in [0, 1).
  __device__ double uniform(int i) const {
    uint64_t z = x_[i];
    z ^= z >> 29 & 0x5555555555555555u;
    z ^= z << 17 & 0x71d67fffeda60000u;
    z ^= z << 37 & 0xfff7eee000000000u;
    z ^= z >> 43;
    return static_cast<double>(z >> 11) * 0x1p-53;
  }

 private:
  static constexpr uint64_t kLower = (uint64_t{1} << 31) - 1;

  uint64_t* x_;
};

constexpr int kThreads = 160;

// Selection sampling (Knuth's algorithm S), one block a row. Warp 0 looks at 32 slots at a time:
// until the first that is taken nothing changes for those behind it.
__global__ __launch_bounds__(kThreads) void draw(const __grid_constant__ sikv_cache_view view,
                                                 sikv_selection selection,
                                                 cuda::DeviceBudget budget, uint32_t seed,
                                                 const int64_t* step) {
  __shared__ Mersenne::Storage storage;
  __shared__ int taken;
  const int row = static_cast<int>(blockIdx.x), lane = static_cast<int>(threadIdx.x) % 32;
  const cuda::Unpinned slots(view, row);
  const int left = slots.rank(view.encoded_len[row]);
  const auto wanted =
      static_cast<int>(min(budget.tokens(cuda::row_length(view, row)), static_cast<int64_t>(left)));
  Mersenne generator(storage);
  if (threadIdx.x == 0) {
    generator.seed({seed, static_cast<uint32_t>(view.layer), static_cast<uint32_t>(row),
                    static_cast<uint32_t>(*step)});
    taken = 0;
  }
  __syncthreads();
  int32_t* const out = selection.slots + int64_t{row} * selection.capacity;
  for (int base = 0; base < left && taken < wanted; base += Mersenne::kWords) {
    generator.twist();
    if (threadIdx.x < 32) {
      int have = taken;
      const int count = min(Mersenne::kWords, left - base);
      for (int first = 0; first < count && have < wanted; first += 32) {
        const int i = first + lane, rank = base + i;
        const double need =
            i < count ? generator.uniform(i) * static_cast<double>(left - rank) : INFINITY;
        unsigned open = 0xffffffffu;
        while (true) {
          const unsigned take =
              __ballot_sync(0xffffffffu, need < static_cast<double>(wanted - have)) & open;
          if (take == 0) break;
          const int winner = __ffs(static_cast<int>(take)) - 1;
          if (lane == winner) out[have] = slots.slot(rank);
          ++have;
          open = winner == 31 ? 0u : 0xffffffffu << (winner + 1);
        }
      }
      __syncwarp();
      if (lane == 0) taken = have;
    }
    __syncthreads();
  }
  if (threadIdx.x == 0) selection.counts[row] = wanted;
}

// After the rows of a layer have drawn.
__global__ void advance(int64_t* step) { ++*step; }

class Random : public Selector {
 public:
  explicit Random(const CreateArgs& args)
      : budget_(args.options.budget("budget")),
        seed_(static_cast<uint32_t>(args.options.integer("seed"))),
        shape_(args.shape) {
    const size_t bytes = static_cast<size_t>(shape_.num_layers) * sizeof(int64_t);
    cuda::check(cudaMalloc(&steps_, bytes), "cudaMalloc of random's step counters");
    cuda::check(cudaMemset(steps_, 0, bytes), "cudaMemset of random's step counters");
  }
  Random(const Random&) = delete;
  Random& operator=(const Random&) = delete;
  ~Random() override { cudaFree(steps_); }

  Plan plan() override { return {selection_capacity(budget_, shape_), 0}; }

  // Layers count their own steps on the device, so that a replayed graph goes on; a number out of
  // turn is uploaded, when all that runs is through.
  void begin_step(int64_t step) override {
    const bool in_turn = step == step_ + 1;
    step_ = step;
    if (in_turn) return;
    cuda::check(cudaDeviceSynchronize(), "cudaDeviceSynchronize before another step");
    const std::vector<int64_t> steps(static_cast<size_t>(shape_.num_layers), step);
    cuda::check(
        cudaMemcpy(steps_, steps.data(), steps.size() * sizeof(int64_t), cudaMemcpyHostToDevice),
        "cudaMemcpy of random's step counters");
  }

  void run(const sikv_select_args& args, const CacheView& view, Launch launch) override {
    const cudaStream_t stream = cuda::stream(launch);
    const auto rows = static_cast<unsigned>(view.num_rows());
    int64_t* const step = steps_ + view.layer();
    draw<<<rows, kThreads, 0, stream>>>(*args.view, args.selection, cuda::DeviceBudget(budget_),
                                        seed_, step);
    cuda::check_launch("draw", rows, kThreads, stream);
    advance<<<1, 1, 0, stream>>>(step);
    cuda::check_launch("advance", 1, 1, stream);
  }

  uint64_t state_bytes() const override {
    return static_cast<uint64_t>(shape_.num_layers) * sizeof(int64_t);
  }

 private:
  Budget budget_;
  uint32_t seed_;
  sikv_shape shape_;
  int64_t* steps_ = nullptr;  // device; [layers]
  int64_t step_ = -2;         // of the last begin_step
};

std::unique_ptr<Selector> make_cuda(const CreateArgs& args) {
  return std::make_unique<Random>(args);
}

}  // namespace
}  // namespace sikv::random

SIKV_PLUGIN(
    "random", "1.0.0", SIKV_CUDA, SIKV_KIND_BIT(SIKV_SELECTOR),
    sikv::selector<sikv::random::make_cuda, sikv::random::kOptions, sikv::cuda::probe>("cuda"))
