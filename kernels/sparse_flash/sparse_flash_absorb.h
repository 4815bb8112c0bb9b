// The self_index selector within sparse_flash, on a GPU (sparse_flash_absorb.cuh).
#ifndef SIKV_KERNELS_SPARSE_FLASH_SPARSE_FLASH_ABSORB_H_
#define SIKV_KERNELS_SPARSE_FLASH_SPARSE_FLASH_ABSORB_H_

#include <cuda_runtime.h>

#include <cstdint>

#include "kernels/common/block_flash.cuh"
#include "plugins/sdk/plugin.h"
#include "selectors/self_index/self_index_args.cuh"

namespace sikv::sparse_flash {

// What an absorbed selector keeps and how it is launched.
class Absorbed {
 public:
  // Throws Refused with the reason if these options, layouts or the shape need launches of their
  // own.
  Absorbed(const Options& options, const sikv_shape& shape, const sikv_device& device,
           const LayoutView& key_layout, const cuda::RowStore& keys, const cuda::RowStore& values);
  Absorbed(const Absorbed&) = delete;
  Absorbed& operator=(const Absorbed&) = delete;
  ~Absorbed();

  void run(const sikv_attend_args& args, const cuda::Tickets& tickets, void* workspace,
           cudaStream_t stream) const;

 private:
  struct Launch {
    int shares, chunk;  // of a row; tokens of a share
    int selected;       // of a share, at most
    size_t shared;      // bytes of a block
  };
  Launch sized(int rows, int64_t tokens) const;

  Budget budget_;
  sikv_shape shape_;
  bool rotated_;
  int multiprocessors_;
  int shared_ = 0;                          // bytes of a multiprocessor
  self_index::TeamState* teams_ = nullptr;  // [rows]
};

}  // namespace sikv::sparse_flash

#endif  // SIKV_KERNELS_SPARSE_FLASH_SPARSE_FLASH_ABSORB_H_
