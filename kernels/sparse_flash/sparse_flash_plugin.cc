#include "kernels/sparse_flash/sparse_flash.h"

#ifdef SIKV_HAS_SIMD
#include "kernels/common/flash_cpu.h"
#define SPARSE_FLASH_CPU \
  sikv::kernel<sikv::sparse_flash::make_cpu, sikv::kNoOptions, sikv::probe_flash_cpu>("cpu")
#else
#define SPARSE_FLASH_CPU
#endif

SIKV_PLUGIN("sparse_flash", "1.0.0", SIKV_CPU, SIKV_KIND_BIT(SIKV_KERNEL),
            sikv::kernel<sikv::sparse_flash::make_ref, sikv::kNoOptions>("ref"), SPARSE_FLASH_CPU)
