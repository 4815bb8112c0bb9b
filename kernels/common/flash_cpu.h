// Attention of one decode step with SIMD: the fast counterpart of flash_rows.h, for kernels that
// can say where their rows lie and in which format.
//
// A row's encoded tokens are cut into splits; a split, or a row's pinned tokens and tail, is one
// task. Tasks run in any order, each into a FlashState per query head of its own; whoever finishes
// a row's last task merges them in a fixed order. So the result depends neither on the number of
// threads nor on their timing, and there is one join per layer instead of two.
#ifndef SIKV_KERNELS_COMMON_FLASH_CPU_H_
#define SIKV_KERNELS_COMMON_FLASH_CPU_H_

#include <cstddef>
#include <cstdint>

#include "kernels/common/flash_rows.h"
#include "kernels/common/simd_attention.h"
#include "plugins/sdk/plugin.h"

namespace sikv {

// The functions of the processor's best target.
struct FlashSimd {
  void (*attend)(const AttendTask& task);
  // x [n] <- n numbers of `dtype`; n a multiple of 16.
  void (*load)(const void* from, int32_t dtype, size_t n, float* x);
  // x [D] <- R x and R^T x of plugins/layouts/rotation.h.
  void (*rotate)(size_t head_dim, float* x);
  void (*unrotate)(size_t head_dim, float* x);
};

// Null where the processor has no vectors that Highway knows.
const FlashSimd* flash_simd();

// For probe: 10 where flash_simd() has an answer.
int32_t probe_flash_cpu(const sikv_device* device, sikv_message* reason);

// What a kernel tells about its encoded tokens.
class EncodedRows {
 public:
  virtual ~EncodedRows() = default;
  virtual RowSource keys(int row) const = 0;
  virtual RowSource values(int row) const = 0;
  // Turns q [G, D] into the space of the stored keys.
  virtual void prepare(int /*row*/, float* /*q*/) const {}
  // shift [G], zero at the call: what is then missing from q.k of every encoded token alike. q as
  // it came.
  virtual void shift(int /*row*/, const float* /*q*/, float* /*shift*/) const {}
  // Brings acc [D], a sum of stored values whose weights add up to `sum`, to the space of V.
  virtual void restore(int /*row*/, float /*sum*/, float* /*acc*/) const {}
};

class FlashCpu {
 public:
  explicit FlashCpu(const CreateArgs& args);

  uint64_t workspace_bytes() const;
  void run(const sikv_attend_args& args, const CacheView& view, void* workspace, Encoded encoded,
           const EncodedRows& rows) const;

 private:
  // As many as keep the cores of a large server busy with one sequence of 8 heads. Shorter splits
  // would pay for themselves no longer: preparing the query and merging cost as much as 20 tokens.
  static constexpr int kMaxSplits = 16;
  static constexpr int kSplitTokens = 512;
  // A row's states: its splits', and those of its pinned tokens and its tail.
  static constexpr int kStates = kMaxSplits + 2;

  struct Worker;
  class Run;
  size_t worker_bytes() const;
  size_t state_bytes() const;  // of one row

  const sikv_host& host_;
  int group_, dim_, rows_, workers_;
};

}  // namespace sikv

#endif  // SIKV_KERNELS_COMMON_FLASH_CPU_H_
