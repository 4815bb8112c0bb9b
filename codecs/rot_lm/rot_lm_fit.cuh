// Codebook sums of rot_lm: a warp to a run of one row. A tile of tokens is rotated in registers,
// then handed over in slices to threads that own groups and add token by token in order.
//
// What limits it is shared memory: the fp64 sums of a run are 16 KB at D = 128, which leaves 9
// warps on an SM, and each read-modify-write waits for the one before. 2.1 ms for 8 x 128K tokens x
// 8 heads on an H100, against 0.7 ms to read them.
#ifndef SIKV_CODECS_ROT_LM_ROT_LM_FIT_CUH_
#define SIKV_CODECS_ROT_LM_ROT_LM_FIT_CUH_

#include "kernels/common/fit.cuh"
#include "kernels/common/thread_rotation.cuh"

namespace sikv::cuda {

// Shared memory of a warp: its tile, a slice of rotated rows, sums by group, the mean.
template <int D>
struct RotatedRunShared {
  static constexpr int kColumns = D / 4 < 32 ? 32 : D / 4;
  static constexpr int kSlices = 4;
  static constexpr int kSliceTokens = TokenShape<D>::kTokens / kSlices;
  static constexpr int kRowFloats = D + 4;  // padding against bank conflicts of the writers
  using Columns = CodebookColumns<D, kColumns>;

  static constexpr int kSliceBytes = kSliceTokens * kRowFloats * 4;
  static constexpr int bytes(int32_t dtype) {
    return Columns::kBytes + kSliceBytes + D * 4 + tile_bytes<D>(dtype);
  }
};

template <int D>
__global__ void __launch_bounds__(32)
    rotated_codebook_runs(const __grid_constant__ sikv_cache_view view,
                          const __grid_constant__ FitCall call) {
  using Shape = TokenShape<D>;
  using Shared = RotatedRunShared<D>;
  constexpr int kGroups = D / 4, kPerLane = kGroups > 32 ? 2 : 1;
  extern __shared__ __align__(16) uint8_t shared[];
  const int lane = static_cast<int>(threadIdx.x);
  const int heads = view.num_kv_heads;
  const int flat = static_cast<int>(blockIdx.x), h = flat % heads, run = flat / heads;
  const int b = static_cast<int>(blockIdx.y), count = call.rows.count[b];
  if (run >= call.runs || count <= 0) return;
  const FitSample sample(count, call.fit_tokens);
  const int first = (call.first_run + run) * kRun;
  if (first >= sample.size) return;
  const int entries = min(kRun, sample.size - first);
  const int64_t row = int64_t{b} * heads + h;

  auto* slice = reinterpret_cast<float*>(shared + Shared::Columns::kBytes);
  auto* mean = slice + Shared::kSliceTokens * Shared::kRowFloats;
  auto* tile = reinterpret_cast<uint8_t*>(mean + D);
  for (int d = lane; d < D; d += 32) mean[d] = flipped_mean(call.mean[row * D + d], d);

  // Entries t .. of the run into the tile.
  const int32_t dtype = call.rows.dtype;
  const auto stage = [&](int t) {
    const int end = min(Shape::kTokens, entries - t);
    const TileSource source{
        row_address(call.rows, call.rows.first[b], sample.all() ? first + t : 0, h),
        call.rows.token_stride * sikv_dtype_bytes(dtype), call.aligned};
    if (sample.all()) {
      stage_tile<D>(dtype, source, 0, end, tile, lane);
    } else {
      const int32_t position = lane < end ? sample.position(first + t + lane) : 0;
      stage_scattered<D>(dtype, source, position, end, tile, lane);
    }
    commit_copies();
  };

  // Columns lane and lane + 32.
  const auto column = [&](int p) { return typename Shared::Columns(shared, lane + 32 * p); };
  for (int p = 0; p < kPerLane; ++p) column(p).clear();
  GroupExtras<false> extras[kPerLane];
  stage(0);
  for (int t = 0; t < entries; t += Shape::kTokens) {
    wait_copies<0>();
    __syncwarp();
    float y[Shape::kChannels];
    const int in_tile = lane / Shape::kParts, part = lane % Shape::kParts;
    load_row<D>(dtype, tile + in_tile * tile_row_bytes(D, dtype), part, y);
    __syncwarp();
    if (t + Shape::kTokens < entries) stage(t + Shape::kTokens);
    rotate_centred<D>(mean, part, y);

    const int tokens = min(Shape::kTokens, entries - t);
    for (int s = 0; s < Shared::kSlices; ++s) {
      const int in_slice = in_tile - s * Shared::kSliceTokens;
      if (in_slice >= 0 && in_slice < Shared::kSliceTokens) {
        float* to = slice + in_slice * Shared::kRowFloats;
#pragma unroll
        for (int i = 0; i < Shape::kChannels; i += 4) {
          *reinterpret_cast<float4*>(to + Shape::channel(i, part)) =
              make_float4(y[i], y[i + 1], y[i + 2], y[i + 3]);
        }
      }
      __syncwarp();
      if (lane < kGroups) {
        const int end = min(Shared::kSliceTokens, tokens - s * Shared::kSliceTokens);
#pragma unroll
        for (int p = 0; p < kPerLane; ++p) {
          auto sums = column(p);
          const auto* from = reinterpret_cast<const float4*>(slice) + lane + 32 * p;
          // All are read before the first sum is written.
          float4 x[Shared::kSliceTokens];
#pragma unroll
          for (int i = 0; i < Shared::kSliceTokens; ++i) {
            x[i] = from[i * (Shared::kRowFloats / 4)];
          }
          const auto add = [&](const float4& v) {
            const double wide[4] = {v.x, v.y, v.z, v.w};
            sums.add(v, wide);
            extras[p].add(v, wide);
          };
          if (end >= Shared::kSliceTokens) {
#pragma unroll
            for (int i = 0; i < Shared::kSliceTokens; ++i) add(x[i]);
          } else {
#pragma unroll
            for (int i = 0; i < Shared::kSliceTokens; ++i) {
              if (i < end) add(x[i]);
            }
          }
        }
      }
      __syncwarp();
    }
  }
  if (lane >= kGroups) return;
  for (int p = 0; p < kPerLane; ++p) {
    store_group<D, Shared::kColumns>(call, row, run, lane + 32 * p, column(p), extras[p]);
  }
}

// A wave of rotated_codebook_runs.
template <int D>
void launch_rotated_codebook(const sikv_cache_view& view, const FitCall& wave,
                             cudaStream_t stream) {
  const int shared = RotatedRunShared<D>::bytes(wave.rows.dtype);
  check(cudaFuncSetAttribute(rotated_codebook_runs<D>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                             RotatedRunShared<D>::bytes(SIKV_FP32)),
        "raising the shared memory of rotated_codebook_runs");
  const dim3 grid(wave.runs * view.num_kv_heads, view.num_sequences);
  rotated_codebook_runs<D><<<grid, 32, shared, stream>>>(view, wave);
  check_launch("rotated_codebook_runs", grid, 32, stream);
}

}  // namespace sikv::cuda

#endif  // SIKV_CODECS_ROT_LM_ROT_LM_FIT_CUH_
