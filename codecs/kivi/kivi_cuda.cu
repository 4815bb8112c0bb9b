// kivi on CUDA, with the reference's bytes: keys per channel over groups of tokens, values as
// intq's.
#include "codecs/kivi/kivi.h"
#include "kernels/common/cuda_codec.h"
#include "kernels/common/thread_minmax.cuh"

namespace sikv {
namespace {

// ---- keys ---------------------------------------------------------------------------------------

struct KiviPlanes {
  cuda::Plane magnitude, scale;
};

// A warp to a group of tokens, a lane to 4 neighbouring channels (and the 4 that lie 128 further at
// D = 256). The rows are read twice, the second time from L1: 8 KB for 32 tokens at D = 128.
template <int D, int kBits, typename T>
__global__ void __launch_bounds__(128)
    encode_groups(const __grid_constant__ sikv_cache_view view,
                  const __grid_constant__ sikv_rows rows, const int32_t* first_slots, int group,
                  int max_groups, bool aligned, KiviPlanes planes) {
  constexpr int kUnits = D / 4;
  const int heads = view.num_kv_heads, lane = static_cast<int>(threadIdx.x) % 32;
  const int flat = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x) / 32;
  const int h = flat % heads, index = flat / heads, b = static_cast<int>(blockIdx.y);
  const int count = rows.count[b], first = index * group;
  if (index >= max_groups || first >= count) return;
  const int tokens = min(group, count - first);
  const int row = b * heads + h, slot = first_slots[row] + first;
  const int64_t page = cuda::page_number(view, row, slot / SIKV_PAGE_TOKENS);
  const int in_page = slot % SIKV_PAGE_TOKENS;
  const int64_t stride = rows.token_stride * static_cast<int64_t>(sizeof(T));

  for (int u = lane; u < kUnits; u += 32) {
    const uint8_t* from = cuda::row_address(rows, rows.first[b], first, h) + 4 * u * sizeof(T);
    const auto load = [&](int t, float(&x)[4]) {
      const uint8_t* at = from + t * stride;
      if (aligned) {
        const float4 v = cuda::load_channels(at,
                                             std::is_same_v<T, float>    ? SIKV_FP32
                                             : std::is_same_v<T, __half> ? SIKV_FP16
                                                                         : SIKV_BF16,
                                             0);
        x[0] = v.x, x[1] = v.y, x[2] = v.z, x[3] = v.w;
      } else {
        for (int k = 0; k < 4; ++k) x[k] = cuda::to_float(reinterpret_cast<const T*>(at)[k]);
      }
    };
    float low[4], high[4], worst = 0.0f;
    load(0, low);
    for (int k = 0; k < 4; ++k) high[k] = low[k];
#pragma unroll 8
    for (int t = 0; t < tokens; ++t) {
      float x[4];
      load(t, x);
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        low[k] = fminf(low[k], x[k]);
        high[k] = fmaxf(high[k], x[k]);
        worst = fmaxf(worst, cuda::is_storable(x[k]) ? 0.0f : 1.0f);
      }
    }
    if (worst > 0.0f) {
      for (int t = 0; t < tokens; ++t) {
        float x[4];
        load(t, x);
        for (int k = 0; k < 4; ++k) {
          if (cuda::is_storable(x[k])) continue;
          cuda::report_fault(view, SIKV_FAULT_K, b, h, cuda::position_of(view, row, slot + t),
                             4 * u + k, x[k]);
        }
      }
    }

    constexpr float kTop = static_cast<float>((1 << kBits) - 1);
    float scale[4], zero[4], reciprocal[4];
    uint32_t pairs[4];
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const cuda::Narrowed s =
          cuda::narrow_fp16(add_rn(div_rn(__fsub_rn(high[k], low[k]), kTop), 0.0f));
      const cuda::Narrowed z = cuda::narrow_fp16(add_rn(low[k], 0.0f));
      scale[k] = s.value, zero[k] = z.value, reciprocal[k] = __frcp_rn(s.value);
      pairs[k] = s.bits | z.bits << 16;
    }
    uint8_t* scales = planes.scale.page(page) + int64_t{4} * D * (in_page / group);
    reinterpret_cast<uint4*>(scales)[u] = make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);

    uint8_t* codes = planes.magnitude.page(page) + D * kBits / 8 * in_page;
#pragma unroll 8
    for (int t = 0; t < tokens; ++t) {
      float x[4];
      load(t, x);
      uint32_t word = 0;
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        // A scale of 0 makes the quotient NaN, which fmaxf turns into 0.
        const float position = cuda::divide(__fsub_rn(x[k], zero[k]), scale[k], reciprocal[k]);
        const float clamped = fminf(fmaxf(position, 0.0f), kTop);
        word |= (__float_as_uint(add_rn(clamped, 8388608.0f)) & ((1u << kBits) - 1u))
                << (kBits * k);
      }
      uint8_t* to = codes + D * kBits / 8 * t;
      if constexpr (kBits == 2) {
        to[u] = static_cast<uint8_t>(word);
      } else {
        reinterpret_cast<uint16_t*>(to)[u] = static_cast<uint16_t>(word);
      }
    }
  }
}

template <int D, int kBits>
struct KiviDecode {
  static constexpr int kDim = D;
  KiviPlanes planes;
  int group;

  __device__ float4 decode(int, int64_t page, int token, int g) const {
    const uint32_t codes =
        cuda::load_codes<kBits>(planes.magnitude.page(page) + D * kBits / 8 * token, g);
    const auto* scales =
        reinterpret_cast<const uint4*>(planes.scale.page(page) + int64_t{4} * D * (token / group));
    const uint4 pairs = scales[g];
    const auto value = [&](int i, uint32_t pair) {
      const float2 range = __half22float2(reinterpret_cast<const __half2&>(pair));
      return minmax::value_of(cuda::code_of<kBits>(codes, i), {range.x, range.y});
    };
    return make_float4(value(0, pairs.x), value(1, pairs.y), value(2, pairs.z), value(3, pairs.w));
  }
  __device__ void finish(int, int, float4 (&)[cuda::LaneShape<D>::kPerLane]) const {}
};

class KiviKeysCuda final : public cuda::CudaCodec {
 public:
  explicit KiviKeysCuda(const CreateArgs& args)
      : CudaCodec(args, SIKV_KEY_CODEC, make_kivi_keys_ref(args)),
        params_(kivi::read_params(layout_view())) {}

  void fit(const RowsView& rows, const CacheView& cache, Launch launch) override {
    check_newest(rows.raw(), cache.raw(), launch);
  }

  void encode(const RowsView& view_rows, const int32_t* first_slot, const CacheView& cache,
              Launch launch) override {
    const sikv_rows& rows = view_rows.raw();
    const sikv_cache_view& view = cache.raw();
    if (rows.max_count <= 0) return;
    with_params([&](auto dim, auto bits) {
      cuda::with_dtype(rows.dtype, [&](auto element) {
        const int groups = (rows.max_count + params_.group - 1) / params_.group;
        const dim3 grid((groups * view.num_kv_heads + 3) / 4, view.num_sequences);
        encode_groups<dim.value, bits.value, decltype(element)>
            <<<grid, 128, 0, cuda::stream(launch)>>>(view, rows, first_slot, params_.group, groups,
                                                     cuda::is_aligned(rows), planes(view));
        cuda::check_launch("encode_groups", grid, 128, cuda::stream(launch));
      });
    });
  }

  void decode(const sikv_decode_args& args, const CacheView& cache, void* stream) const override {
    with_params([&](auto dim, auto bits) {
      cuda::launch_decode(args,
                          KiviDecode<dim.value, bits.value>{planes(cache.raw()), params_.group},
                          static_cast<cudaStream_t>(stream));
    });
  }

 private:
  static KiviPlanes planes(const sikv_cache_view& view) {
    return {cuda::plane_of(view.key, SIKV_MAGNITUDE), cuda::plane_of(view.key, SIKV_SCALE)};
  }
  template <typename Body>
  void with_params(const Body& body) const {
    cuda::with_head_dim(head_dim(), [&](auto dim) {
      params_.bits == 2 ? body(dim, std::integral_constant<int, 2>{})
                        : body(dim, std::integral_constant<int, 4>{});
    });
  }

  kivi::Params params_;
};

// ---- values -------------------------------------------------------------------------------------

class KiviValuesCuda final : public cuda::CudaCodec {
 public:
  explicit KiviValuesCuda(const CreateArgs& args)
      : CudaCodec(args, SIKV_VALUE_CODEC, make_kivi_values_ref(args)),
        params_(intq::read_params(layout_view())) {}

  void fit(const RowsView& rows, const CacheView& cache, Launch launch) override {
    check_newest(rows.raw(), cache.raw(), launch);
  }
  void encode(const RowsView& rows, const int32_t* first_slot, const CacheView& cache,
              Launch launch) override {
    with_format(cache.raw(), [&](const auto& format) {
      cuda::launch_encode(cache.raw(), rows.raw(), first_slot, what(), format,
                          cuda::stream(launch));
    });
  }
  void decode(const sikv_decode_args& args, const CacheView& cache, void* stream) const override {
    with_format(cache.raw(), [&](const auto& format) {
      cuda::launch_decode(args, format, static_cast<cudaStream_t>(stream));
    });
  }

 private:
  template <typename Body>
  void with_format(const sikv_cache_view& view, const Body& body) const {
    cuda::with_head_dim(head_dim(), [&](auto dim) {
      cuda::with_minmax_format<dim.value, 2, 4>(
          params_.bits, cuda::plane_of(view.value, SIKV_VALUE_CODE),
          cuda::plane_of(view.value, SIKV_VALUE_SCALE), {params_.scale_group, params_.scale_dtype},
          intq::scale_bytes(params_), body);
    });
  }

  intq::Params params_;
};

std::unique_ptr<Codec> make_kivi_keys_cuda(const CreateArgs& args) {
  return std::make_unique<KiviKeysCuda>(args);
}
std::unique_ptr<Codec> make_kivi_values_cuda(const CreateArgs& args) {
  return std::make_unique<KiviValuesCuda>(args);
}

}  // namespace
}  // namespace sikv

SIKV_PLUGIN(
    "kivi", "1.0.0", SIKV_CUDA, SIKV_KIND_BIT(SIKV_KEY_CODEC) | SIKV_KIND_BIT(SIKV_VALUE_CODEC),
    sikv::key_codec<sikv::make_kivi_keys_cuda, sikv::kKiviKeyOptions, sikv::cuda::probe>("cuda"),
    sikv::value_codec<sikv::make_kivi_values_cuda, sikv::kKiviValueOptions, sikv::cuda::probe>(
        "cuda"))
