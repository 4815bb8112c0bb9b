// A registry of made-up plugins, linked in, for tests and fuzzers of everything that reads ids and
// options but runs no plugin.
#ifndef SIKV_FRAMEWORK_CONFIG_TEST_REGISTRY_H_
#define SIKV_FRAMEWORK_CONFIG_TEST_REGISTRY_H_

#include "framework/registry/registry.h"

namespace sikv {

//   sign_vq        key codec     ref       magnitude_bits 1|2|4|8, scale_group 16..128
//   intq           value codec   ref       bits 2..8
//   rot_lm         both          ref       bits 2..4
//   self_index     selector      ref, cpu  budget, rerank 0..16, threshold 0..1, schedule auto|1|2
//   full           selector      ref       -
//   sparse_flash   kernel        ref, cpu  fast true|false
Registry test_registry();

}  // namespace sikv

#endif  // SIKV_FRAMEWORK_CONFIG_TEST_REGISTRY_H_
