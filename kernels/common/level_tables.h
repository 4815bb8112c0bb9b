// The levels of rlm4 by code, 16 entries each whatever the bits, for lookups in registers.
#ifndef SIKV_KERNELS_COMMON_LEVEL_TABLES_H_
#define SIKV_KERNELS_COMMON_LEVEL_TABLES_H_

#include <array>

#include "plugins/layouts/rlm4_v1.h"

namespace sikv::level_tables {

using Table = std::array<float, 16>;

// Levels of a magnitude of bits - 1 bits, repeated; the sign is elsewhere.
constexpr Table levels(int bits) {
  Table table{};
  for (int i = 0; i < 16; ++i) {
    table[static_cast<size_t>(i)] = rlm4::level_value(bits, i % rlm4::num_levels(bits));
  }
  return table;
}

// By code = sign << (bits - 1) | level, repeated; sign 1 is positive.
constexpr Table signed_levels(int bits) {
  Table table{};
  for (int i = 0; i < 16; ++i) {
    const int code = i % (1 << bits), count = rlm4::num_levels(bits);
    const float value = rlm4::level_value(bits, code % count);
    table[static_cast<size_t>(i)] = code < count ? -value : value;
  }
  return table;
}

// By bits - 2.
alignas(64) inline constexpr Table kLevels[] = {levels(2), levels(3), levels(4)};
alignas(64) inline constexpr Table kSignedLevels[] = {signed_levels(2), signed_levels(3),
                                                      signed_levels(4)};

}  // namespace sikv::level_tables

#endif  // SIKV_KERNELS_COMMON_LEVEL_TABLES_H_
