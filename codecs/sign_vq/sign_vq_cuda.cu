// sign_vq on CUDA: the reference's bytes, its tables to the bit.
#include "codecs/sign_vq/sign_vq_cuda.h"

#include "codecs/sign_vq/sign_vq.h"
#include "kernels/common/cuda_codec.h"

namespace sikv {
namespace {

// ---- medians ------------------------------------------------------------------------------------

// Numbers as unsigned integers in their order.
template <typename T>
__device__ uint32_t sort_key(T x) {
  if constexpr (sizeof(T) == 4) {
    const uint32_t bits = __float_as_uint(x);
    return (bits >> 31) != 0 ? ~bits : bits | 0x80000000u;
  } else {
    const uint32_t bits = *reinterpret_cast<const uint16_t*>(&x);
    return (bits >> 15) != 0 ? ~bits & 0xffffu : bits | 0x8000u;
  }
}
template <typename T>
__device__ float from_sort_key(uint32_t key) {
  constexpr uint32_t kSign = sizeof(T) == 4 ? 0x80000000u : 0x8000u;
  const uint32_t bits = (key & kSign) != 0 ? key & ~kSign : ~key & (2 * (kSign - 1) + 1);
  if constexpr (sizeof(T) == 4) {
    return __uint_as_float(bits);
  } else {
    const auto narrow = static_cast<uint16_t>(bits);
    return cuda::to_float(*reinterpret_cast<const T*>(&narrow));
  }
}

// Medians of 16 channels, by their keys' bytes from the highest down: a histogram of the byte among
// the numbers that agree so far, until one is left. Reads the rows sizeof(T) times. x = 16 channels
// of a head, y = sequence.
template <typename T>
__global__ void __launch_bounds__(256) channel_medians(const __grid_constant__ sikv_cache_view view,
                                                       const __grid_constant__ cuda::FitCall call) {
  constexpr int kChannels = 16, kBins = 256;
  __shared__ uint32_t histogram[kChannels][kBins];
  __shared__ uint32_t prefix[kChannels], rank[kChannels];
  const int per_head = view.head_dim / kChannels;
  const int h = static_cast<int>(blockIdx.x) / per_head;
  const int first_channel = static_cast<int>(blockIdx.x) % per_head * kChannels;
  const int b = static_cast<int>(blockIdx.y), count = call.rows.count[b];
  if (count <= 0) return;
  const FitSample sample(count, call.fit_tokens);
  const int thread = static_cast<int>(threadIdx.x);
  const int channel = thread % kChannels;  // a thread's, of every 16th token
  if (thread < kChannels) {
    prefix[thread] = 0;
    rank[thread] = static_cast<uint32_t>(sample.size - 1) / 2;
  }
  for (int byte = static_cast<int>(sizeof(T)) - 1; byte >= 0; --byte) {
    for (int i = thread; i < kChannels * kBins; i += 256) histogram[i / kBins][i % kBins] = 0;
    __syncthreads();
    const uint32_t agreed = prefix[channel];
    for (int i = thread / kChannels; i < sample.size; i += 256 / kChannels) {
      const uint8_t* row = cuda::row_address(call.rows, call.rows.first[b], sample.position(i), h);
      const uint32_t key = sort_key(reinterpret_cast<const T*>(row)[first_channel + channel]);
      if ((static_cast<uint64_t>(key) >> (8 * byte + 8)) != agreed) continue;
      atomicAdd(&histogram[channel][key >> (8 * byte) & 255u], 1u);
    }
    __syncthreads();
    if (thread < kChannels) {
      uint32_t left = rank[thread];
      int bin = 0;
      while (bin < kBins - 1 && left >= histogram[thread][bin]) left -= histogram[thread][bin++];
      rank[thread] = left;
      prefix[thread] = prefix[thread] << 8 | static_cast<uint32_t>(bin);
    }
    __syncthreads();
  }
  if (thread < kChannels) {
    const int64_t row = int64_t{b} * view.num_kv_heads + h;
    // -0 and 0 are the same number in the middle of a column: 0.
    call.mean[row * view.head_dim + first_channel + thread] =
        add_rn(from_sort_key<T>(prefix[thread]), 0.0f);
  }
}

void launch_medians(const sikv_cache_view& view, const cuda::FitCall& call, cudaStream_t stream) {
  cuda::with_dtype(call.rows.dtype, [&](auto element) {
    using T = decltype(element);
    const dim3 grid(view.num_kv_heads * view.head_dim / 16, view.num_sequences);
    channel_medians<T><<<grid, 256, 0, stream>>>(view, call);
    cuda::check_launch("channel_medians", grid, 256, stream);
  });
}

// ---- the codec ----------------------------------------------------------------------------------

class SignVqCuda final : public cuda::CudaCodec {
 public:
  explicit SignVqCuda(const CreateArgs& args)
      : CudaCodec(args, SIKV_KEY_CODEC, make_sign_vq_ref(args)),
        params_(sign4::read_params(layout_view())),
        center_(args.options.choice("center")),
        fit_tokens_(static_cast<int>(args.options.integer("fit_tokens"))) {}

  uint64_t workspace_bytes() const override {
    return cuda::FitWorkspace(max_rows(), head_dim()).bytes();
  }

  void fit(const RowsView& rows, const CacheView& cache, Launch launch) override {
    if (rows.raw().max_count <= 0) return;
    const sikv_cache_view& view = cache.raw();
    const cudaStream_t stream = cuda::stream(launch);
    cuda::FitCall call =
        cuda::fit_call(rows.raw(), view, what(), fit_tokens_, max_rows(), launch.workspace);
    call.mean = cuda::table_of(view.key, SIKV_KEY_MEAN);
    call.largest = cuda::table_of(view.key, SIKV_KEY_SCALE);
    call.codebook = cuda::table_of(view.key, SIKV_CODEBOOK);
    // Without a mean the pass still looks for numbers that are not storable.
    cuda::launch_means(view, call, max_rows(), center_ == "mean", stream);
    if (center_ == "median") launch_medians(view, call, stream);
    cuda::launch_codebook(view, call, max_rows(), stream, [&](const cuda::FitCall& wave) {
      cuda::with_head_dim(head_dim(), [&](auto dim) {
        cuda::SignVqLaunches<dim.value>::codebook(view, wave, stream);
      });
    });
  }

  void encode(const RowsView& rows, const int32_t* first_slot, const CacheView& cache,
              Launch launch) override {
    cuda::with_head_dim(head_dim(), [&](auto dim) {
      cuda::SignVqLaunches<dim.value>::encode(params_, cache.raw(), rows.raw(), first_slot,
                                              planes(cache.raw()), cuda::stream(launch));
    });
  }

  void decode(const sikv_decode_args& args, const CacheView& cache, void* stream) const override {
    cuda::with_head_dim(head_dim(), [&](auto dim) {
      cuda::SignVqLaunches<dim.value>::decode(params_, args, planes(cache.raw()),
                                              static_cast<cudaStream_t>(stream));
    });
  }

 private:
  static cuda::SignVqPlanes planes(const sikv_cache_view& view) {
    return {cuda::plane_of(view.key, SIKV_INDEX_CODE), cuda::plane_of(view.key, SIKV_MAGNITUDE),
            cuda::plane_of(view.key, SIKV_SCALE),      cuda::table_of(view.key, SIKV_CODEBOOK),
            cuda::table_of(view.key, SIKV_KEY_MEAN),   cuda::table_of(view.key, SIKV_KEY_SCALE)};
  }

  sign4::Params params_;
  std::string center_;
  int fit_tokens_;
};

std::unique_ptr<Codec> make_sign_vq_cuda(const CreateArgs& args) {
  return std::make_unique<SignVqCuda>(args);
}

}  // namespace
}  // namespace sikv

SIKV_PLUGIN(
    "sign_vq", "1.0.0", SIKV_CUDA, SIKV_KIND_BIT(SIKV_KEY_CODEC),
    sikv::key_codec<sikv::make_sign_vq_cuda, sikv::kSignVqOptions, sikv::cuda::probe>("cuda"))
