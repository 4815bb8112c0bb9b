// PackedKeys of rlm4 keys in vectors. A step that ranks them streams 68 B each (D = 128) where it
// would gather 50 B from three planes of gigabytes, and spends one shift and one permute per vector
// of channels on decoding.
//
//   codes    candidate | word 0 | word 1 | ... |     whole vectors of V 32-bit words, V lanes here
//            nibble j of word V w + i = code of channel (8 w + j) V + i
//            code = sign << (bits - 1) | level, sign 1 = not negative
//   scales   candidate | fp32 |
//
// Lives in memory only, so it is no layout: its order follows the vectors it is made for.
#ifndef SIKV_SELECTORS_SELF_INDEX_SELF_INDEX_PACKED_H_
#define SIKV_SELECTORS_SELF_INDEX_SELF_INDEX_PACKED_H_

#include <cstdint>
#include <span>

#include "kernels/common/simd_rows.h"
#include "selectors/self_index/self_index_engine.h"

namespace sikv::self_index {

// Copies `slots` of `keys`, whose format is kSigned1..3.
void simd_pack(const RowSource& keys, std::span<const int32_t> slots, int head_dim,
               PackedKeys& packed);

// logits [G, stride] = scale * q.k + shift of all candidates; q [PaddedHeads(G), D] in the keys'
// space, 64-byte aligned, shift [G].
void simd_packed_logits(const PackedKeys& packed, int group, const float* q, const float* shift,
                        float* logits, int64_t stride);

}  // namespace sikv::self_index

#endif  // SIKV_SELECTORS_SELF_INDEX_SELF_INDEX_PACKED_H_
