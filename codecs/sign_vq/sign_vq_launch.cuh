// Encode and decode of sign_vq, and their launches; included by sign_vq_d<D>.cu, which instantiate
// them for one head_dim.
#ifndef SIKV_CODECS_SIGN_VQ_SIGN_VQ_LAUNCH_CUH_
#define SIKV_CODECS_SIGN_VQ_SIGN_VQ_LAUNCH_CUH_

#include "codecs/sign_vq/sign_vq_cuda.h"
#include "kernels/common/thread_minmax.cuh"
#include "kernels/common/warp_nibbles.cuh"

namespace sikv::cuda {

// ---- encode -------------------------------------------------------------------------------------

// Signs and min-max magnitudes.
//
// |k'| / alpha takes 5 multiply-adds (divide in thread_pack.cuh): k' and alpha are both held 2^60
// times as large, which changes no quotient and no rounding and keeps clear of the small numbers
// that divide does not take. Quotients below 2^-126, which may be off, are far below half of the
// smallest scale: they store as zero and 0 either way. The ceiling of 65504 costs nothing until a
// quotient is above it.
template <int D, int kBits>
struct SignVqFormat {
  using Shape = TokenShape<D>;
  static constexpr int kDim = D;
  static constexpr int kTableFloats = 3 * D + 4;  // -mean, alpha, 1 / alpha, whether alpha is tiny
  static constexpr float kUp = 0x1p60f;

  SignVqPlanes planes;
  MinMaxParams params;
  int scale_bytes;

  __device__ void load_tables(const sikv_cache_view&, int row, int lane, float* tables) const {
    bool tiny = false;
    for (int d = lane; d < D; d += 32) {
      const float alpha = planes.alpha[int64_t{row} * D + d] * kUp;
      // Never -0, so that no difference is.
      tables[d] = add_rn(-planes.mean[int64_t{row} * D + d] * kUp, 0.0f);
      tables[D + d] = alpha;
      tables[2 * D + d] = __frcp_rn(alpha);
      tiny |= alpha < 1.0f;
    }
    tiny = __any_sync(~0u, tiny) != 0;
    if (lane == 0) tables[3 * D] = tiny ? 1.0f : 0.0f;
  }

  __device__ void encode(const Token& token, const float* tables,
                         float (&x)[Shape::kChannels]) const {
#pragma unroll
    for (int i = 0; i < Shape::kChannels; i += 4) {
      const float4 m = *reinterpret_cast<const float4*>(tables + Shape::channel(i, token.part));
      x[i] = __fmaf_rn(x[i], kUp, m.x), x[i + 1] = __fmaf_rn(x[i + 1], kUp, m.y);
      x[i + 2] = __fmaf_rn(x[i + 2], kUp, m.z), x[i + 3] = __fmaf_rn(x[i + 3], kUp, m.w);
    }
    TokenSigns<D> signs;
    signs.set(x);
    signs.store(planes.index.page(token.page), token.slot, token.part, token.valid);
#pragma unroll
    for (int i = 0; i < Shape::kChannels; i += 4) {
      const int channel = Shape::channel(i, token.part);
      const float4 a = *reinterpret_cast<const float4*>(tables + D + channel);
      const float4 r = *reinterpret_cast<const float4*>(tables + 2 * D + channel);
      x[i] = divide(fabsf(x[i]), a.x, r.x), x[i + 1] = divide(fabsf(x[i + 1]), a.y, r.y);
      x[i + 2] = divide(fabsf(x[i + 2]), a.z, r.z), x[i + 3] = divide(fabsf(x[i + 3]), a.w, r.w);
    }
    float low[D / kUnitChannels], high[D / kUnitChannels];
    find_extremes<D>(x, low, high);
    // Over a tiny alpha a quotient may overflow, and then it is NaN; fminf takes the ceiling.
    constexpr float kCeiling = minmax::largest_finite(SIKV_FP16);
    bool above = tables[3 * D] != 0.0f;
#pragma unroll
    for (int u = 0; u < D / kUnitChannels; ++u) above |= high[u] > kCeiling;
    if (__any_sync(~0u, above)) {
#pragma unroll
      for (int i = 0; i < Shape::kChannels; ++i) x[i] = fminf(x[i], kCeiling);
      find_extremes<D>(x, low, high);
    }
    pack_minmax<D, kBits>(
        token, params, x, low, high,
        planes.magnitude.page(token.page) + CodeStream<D, kBits>::kRowBytes * token.slot,
        planes.scale.page(token.page) + scale_bytes * token.slot);
  }

  __device__ float4 decode(int row, int64_t page, int token, int g) const {
    const float4 v = unpack_minmax<kBits>(planes.magnitude.page(page) + D * kBits / 8 * token,
                                          planes.scale.page(page) + scale_bytes * token, params, g);
    const float4 a = reinterpret_cast<const float4*>(planes.alpha + int64_t{row} * D)[g];
    const float4 magnitude =
        make_float4(mul_rn(v.x, a.x), mul_rn(v.y, a.y), mul_rn(v.z, a.z), mul_rn(v.w, a.w));
    const uint32_t nibble = load_nibble<D>(planes.index.page(page), token, g);
    return add_each(apply_nibble(magnitude, nibble),
                    reinterpret_cast<const float4*>(planes.mean + int64_t{row} * D)[g]);
  }
  __device__ void finish(int, int, float4 (&)[LaneShape<D>::kPerLane]) const {}
};

// Signs alone, or beside keys as they came.
template <int D>
struct SignsFormat {
  using Shape = TokenShape<D>;
  static constexpr int kDim = D;
  static constexpr int kTableFloats = D;

  SignVqPlanes planes;
  int32_t key_dtype;

  __device__ void load_tables(const sikv_cache_view&, int row, int lane, float* tables) const {
    for (int d = lane; d < D; d += 32) tables[d] = planes.mean[int64_t{row} * D + d];
  }

  __device__ void encode(const Token& token, const float* mean,
                         float (&x)[Shape::kChannels]) const {
#pragma unroll
    for (int i = 0; i < Shape::kChannels; i += 4) {
      const float4 m = *reinterpret_cast<const float4*>(mean + Shape::channel(i, token.part));
      const float means[4] = {m.x, m.y, m.z, m.w};
#pragma unroll
      for (int k = 0; k < 4; ++k) x[i + k] = add_rn(add_rn(x[i + k], -means[k]), 0.0f);  // no -0
    }
    TokenSigns<D> signs;
    signs.set(x);
    signs.store(planes.index.page(token.page), token.slot, token.part, token.valid);
    if (planes.magnitude.base != nullptr) {
      copy_tile<D>(token, key_dtype, planes.magnitude.page(token.page));
    }
  }

  __device__ float4 decode(int row, int64_t page, int token, int g) const {
    if (planes.magnitude.base != nullptr) {
      const int row_bytes = D * sikv_dtype_bytes(key_dtype);
      return load_channels(planes.magnitude.page(page) + row_bytes * token, key_dtype, g);
    }
    const uint32_t nibble = load_nibble<D>(planes.index.page(page), token, g);
    const auto* codebook = reinterpret_cast<const float4*>(planes.codebook + int64_t{row} * 16 * D);
    return add_each(codebook[g * 16 + nibble],
                    reinterpret_cast<const float4*>(planes.mean + int64_t{row} * D)[g]);
  }
  __device__ void finish(int, int, float4 (&)[LaneShape<D>::kPerLane]) const {}
};

// ---- launches -----------------------------------------------------------------------------------

template <int D, typename Body>
void with_sign_vq_format(const sign4::Params& params, const SignVqPlanes& planes,
                         const Body& body) {
  const auto of_bits = [&](auto bits) {
    body(SignVqFormat<D, bits.value>{
        planes, {params.scale_group, params.scale_dtype}, sign4::scale_bytes(params)});
  };
  switch (params.magnitude_bits) {
    case 2:
      return of_bits(std::integral_constant<int, 2>{});
    case 3:
      return of_bits(std::integral_constant<int, 3>{});
    case 4:
      return of_bits(std::integral_constant<int, 4>{});
    case 8:
      return of_bits(std::integral_constant<int, 8>{});
    default:
      return body(SignsFormat<D>{planes, params.key_dtype});
  }
}

template <int D>
void SignVqLaunches<D>::encode(const sign4::Params& params, const sikv_cache_view& view,
                               const sikv_rows& rows, const int32_t* first_slot,
                               const SignVqPlanes& planes, cudaStream_t stream) {
  with_sign_vq_format<D>(params, planes, [&](const auto& format) {
    launch_encode(view, rows, first_slot, SIKV_FAULT_K, format, stream);
  });
}

template <int D>
void SignVqLaunches<D>::decode(const sign4::Params& params, const sikv_decode_args& args,
                               const SignVqPlanes& planes, cudaStream_t stream) {
  with_sign_vq_format<D>(params, planes,
                         [&](const auto& format) { launch_decode(args, format, stream); });
}

template <int D>
void SignVqLaunches<D>::codebook(const sikv_cache_view& view, const FitCall& wave,
                                 cudaStream_t stream) {
  launch_centred_codebook<D>(view, wave, stream);
}

}  // namespace sikv::cuda

#endif  // SIKV_CODECS_SIGN_VQ_SIGN_VQ_LAUNCH_CUH_
