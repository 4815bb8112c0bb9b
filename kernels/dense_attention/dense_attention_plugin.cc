#include "kernels/dense_attention/dense_attention.h"

#ifdef SIKV_HAS_SIMD
#include "kernels/common/flash_cpu.h"
#define DENSE_ATTENTION_CPU                                                              \
  sikv::kernel<sikv::dense_attention::make_cpu, sikv::kNoOptions, sikv::probe_flash_cpu, \
               SIKV_KERNEL_ATTENDS_ALL>("cpu")
#else
#define DENSE_ATTENTION_CPU
#endif

SIKV_PLUGIN("dense_attention", "1.0.0", SIKV_CPU, SIKV_KIND_BIT(SIKV_KERNEL),
            sikv::kernel<sikv::dense_attention::make_ref, sikv::kNoOptions, sikv::probe_ref,
                         SIKV_KERNEL_ATTENDS_ALL>("ref"),
            DENSE_ATTENTION_CPU)
