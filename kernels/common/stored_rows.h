// Which layouts simd_rows.h reads where they lie, and where that is.
#ifndef SIKV_KERNELS_COMMON_STORED_ROWS_H_
#define SIKV_KERNELS_COMMON_STORED_ROWS_H_

#include <cstdint>

#include "kernels/common/level_tables.h"
#include "kernels/common/simd_rows.h"
#include "plugins/layouts/intq_v1.h"
#include "plugins/layouts/raw_v1.h"
#include "plugins/layouts/rlm4_v1.h"
#include "plugins/layouts/sign4_v1.h"
#include "plugins/sdk/view.h"

namespace sikv {

constexpr RowFormat exact_format(int32_t dtype) {
  return dtype == SIKV_FP16   ? RowFormat::kFp16
         : dtype == SIKV_BF16 ? RowFormat::kBf16
                              : RowFormat::kFp32;
}

// Rows of the input type, `stride` elements apart.
inline RowSource exact_rows(const void* first, int32_t dtype, int64_t stride) {
  RowSource source{exact_format(dtype)};
  const int64_t bytes = stride * sikv_dtype_bytes(dtype);
  source.code = {static_cast<const uint8_t*>(first), bytes * SIKV_PAGE_TOKENS, bytes};
  return source;
}

namespace stored {

constexpr RowFormat offset(RowFormat first, int i) {
  return static_cast<RowFormat>(static_cast<int>(first) + i);
}

// Keys and values name their planes differently.
struct Roles {
  sikv_role code, scale;
};
inline constexpr Roles kKeyRoles = {SIKV_MAGNITUDE, SIKV_SCALE};
inline constexpr Roles kValueRoles = {SIKV_VALUE_CODE, SIKV_VALUE_SCALE};

// The rows of one (sequence, KV head) in one store of the view. Where nothing in simd_rows.h reads
// the layout the format is kUnpacked, and the caller gives `unpack`.
inline RowSource rows(const sikv_cache_view& view, const sikv_store_view& store, int row,
                      const Roles& roles) {
  const LayoutView layout(*store.layout);
  RowSource source{RowFormat::kUnpacked};
  source.page_table = view.page_table + int64_t{row} * view.max_pages;
  source.row = row;
  const auto plane = [&](sikv_role role) -> RowPlane {
    const int i = layout.plane(role);
    return {static_cast<const uint8_t*>(store.planes[i]), store.page_stride_bytes[i],
            layout.tile_stride(i)};
  };
  const auto coded = [&](RowFormat format) {
    source.format = format;
    source.code = plane(roles.code);
  };
  const auto scaled = [&](RowFormat format) {
    coded(format);
    source.scale = plane(roles.scale);
  };
  const auto grouped = [&](RowFormat format, int group, int32_t dtype) {
    scaled(format);
    source.scale_group = group;
    source.scale_dtype = dtype;
  };
  if (layout.is(raw::kFamily, raw::kVersion)) {
    coded(exact_format(raw::read_params(layout).dtype));
  } else if (rlm4::is_keys(layout)) {
    const int i = rlm4::read_params(layout).bits - 2;
    scaled(offset(RowFormat::kSigned1, i));
    if (rlm4::read_line(layout) > 0) {
      source.own_signs = rlm4::line_signs(layout.head_dim());
    } else {
      source.sign = plane(SIKV_INDEX_CODE);
    }
    source.table = level_tables::kLevels[i].data();
  } else if (rlm4::is_values(layout)) {
    const int i = rlm4::read_params(layout).bits - 2;
    scaled(offset(RowFormat::kCoded2, i));
    source.table = level_tables::kSignedLevels[i].data();
  } else if (layout.is(sign4::kFamily, sign4::kVersion)) {
    const sign4::Params p = sign4::read_params(layout);
    if (p.magnitude_bits == 16) {
      coded(exact_format(p.key_dtype));
    } else if (p.magnitude_bits == 2 && p.scale_group % kUnit == 0) {
      grouped(RowFormat::kSignedMinMax2, p.scale_group, p.scale_dtype);
      source.sign = plane(SIKV_INDEX_CODE);
    }
  } else if (layout.is(intq::kFamily, intq::kVersion) ||
             layout.is(intq::kKiviFamily, intq::kVersion)) {
    const intq::Params p = intq::read_params(layout);
    if (p.bits == 16) {
      coded(exact_format(p.value_dtype));
    } else if (p.bits == 2 && p.scale_group % kUnit == 0) {
      grouped(RowFormat::kMinMax2, p.scale_group, p.scale_dtype);
    }
  }
  return source;
}

}  // namespace stored

inline RowSource stored_keys(const sikv_cache_view& view, int row) {
  return stored::rows(view, view.key, row, stored::kKeyRoles);
}
inline RowSource stored_values(const sikv_cache_view& view, int row) {
  return stored::rows(view, view.value, row, stored::kValueRoles);
}

// What `first` is for row 0, for another row.
inline RowSource at_row(RowSource first, const sikv_cache_view& view, int row) {
  first.page_table += int64_t{row} * view.max_pages;
  first.row = row;
  return first;
}

}  // namespace sikv

#endif  // SIKV_KERNELS_COMMON_STORED_ROWS_H_
