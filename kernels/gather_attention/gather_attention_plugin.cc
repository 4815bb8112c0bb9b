#include "kernels/gather_attention/gather_attention.h"

SIKV_PLUGIN("gather_attention", "1.0.0", SIKV_CPU, SIKV_KIND_BIT(SIKV_KERNEL),
            sikv::kernel<sikv::gather_attention::make_ref, sikv::kNoOptions, sikv::probe_ref,
                         SIKV_KERNEL_WEIGHS>("ref"))
