// Tokens and queries made on the GPU, in the time of a few copies.
//
// Runs of 32 tokens share one of 64 cluster centres of their head, a few channels have large means,
// the rest is noise; a query looks for one cluster of its head and moves on every 8 steps. So a few
// hundred tokens of a long context hold most of the attention, as in real heads.
#ifndef SIKV_APPS_BENCH_GPU_SYNTH_H_
#define SIKV_APPS_BENCH_GPU_SYNTH_H_

#include <cuda_runtime.h>

#include <cstdint>

namespace sikv::bench {

struct SynthShape {
  int batch, tokens, kv_heads, group, head_dim;
  uint64_t seed;  // one per layer
};

// fp16 [B, T, H, D]. Values are plain noise.
void fill_keys(void* k, const SynthShape& shape, cudaStream_t stream);
void fill_values(void* v, const SynthShape& shape, cudaStream_t stream);
// fp16 [B, positions, Hq, D] of decode steps first_step, first_step + 1, ...
void fill_queries(void* q, const SynthShape& shape, int positions, int first_step,
                  cudaStream_t stream);
// One position of decode step `step`; steps repeat after `period`, 64 at most. At each, a sequence's
// KV head turns to another cluster with probability `share`, else its queries stay where they are.
// The cosine between means of a group, less that of the prompt, is 0.97 where they stay (0.88 with a
// group of one, at least 0.64) and 0.1 after a turn (at most 0.5 with D 96 and more).
void fill_turning_queries(void* q, const SynthShape& shape, double share, int period, int step,
                          cudaStream_t stream);

}  // namespace sikv::bench

#endif  // SIKV_APPS_BENCH_GPU_SYNTH_H_
