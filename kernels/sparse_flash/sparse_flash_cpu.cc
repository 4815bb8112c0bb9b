// sparse_flash with SIMD. Codes of 2 bits (sign4 magnitudes, intq and kiviv values), all of rlm4
// and rlm4v, and rows kept in a plain type are read where they lie; the scalar unpacking of `ref`
// stands in for the rest, before the same SIMD attention.
#include <array>

#include "kernels/common/flash_cpu.h"
#include "kernels/sparse_flash/sparse_flash.h"
#include "kernels/sparse_flash/sparse_flash_layouts.h"

namespace sikv::sparse_flash {
namespace {

using Table = std::array<float, 16>;

// Levels of a key's magnitude; the sign is in the index plane.
constexpr Table level_table(int bits) {
  Table table{};
  for (int i = 0; i < 16; ++i) {
    table[static_cast<size_t>(i)] = rlm4::level_value(bits, i % rlm4::num_levels(bits));
  }
  return table;
}

// Values by code = sign << (bits - 1) | level; sign 1 is positive.
constexpr Table code_table(int bits) {
  Table table{};
  for (int i = 0; i < 16; ++i) {
    const int code = i % (1 << bits), levels = rlm4::num_levels(bits);
    const float value = rlm4::level_value(bits, code % levels);
    table[static_cast<size_t>(i)] = code < levels ? -value : value;
  }
  return table;
}

// By bits - 2.
alignas(64) constexpr Table kLevels[] = {level_table(2), level_table(3), level_table(4)};
alignas(64) constexpr Table kCodes[] = {code_table(2), code_table(3), code_table(4)};

constexpr RowFormat offset(RowFormat first, int i) {
  return static_cast<RowFormat>(static_cast<int>(first) + i);
}

// One store of a view, to take planes from.
class Planes {
 public:
  Planes(const sikv_cache_view& view, const sikv_store_view& store, int row)
      : store_(store), page_table_(view.page_table + int64_t{row} * view.max_pages), row_(row) {}

  RowSource source(RowFormat format, sikv_role code) const {
    RowSource source{format};
    source.page_table = page_table_;
    source.code = plane(code);
    return source;
  }
  // The rest: `store` unpacks slots one by one.
  template <typename Store>
  RowSource unpacked(const Store& store) const {
    RowSource source{RowFormat::kUnpacked};
    source.unpack = [](const void* context, int row, const int32_t* slots, int count, float* out) {
      const auto& store = *static_cast<const Store*>(context);
      for (int t = 0; t < count; ++t) {
        store.load(row, slots[t], out + t * store.params.head_dim);
      }
    };
    source.context = &store;
    source.row = row_;
    return source;
  }
  RowPlane plane(sikv_role role) const {
    const int i = LayoutView(*store_.layout).plane(role);
    return {static_cast<const uint8_t*>(store_.planes[i]), store_.page_stride_bytes[i],
            store_.layout->planes[i].bytes_per_tile};
  }

 private:
  const sikv_store_view& store_;
  const int32_t* page_table_;
  int row_;
};

// ---- keys ---------------------------------------------------------------------------------------

RowSource source_of(const RawKeys& keys, const Planes& planes) {
  return planes.source(exact_format(keys.params.dtype), SIKV_MAGNITUDE);
}
RowSource source_of(const KiviKeys& keys, const Planes& planes) { return planes.unpacked(keys); }

bool is_fast(const SignKeys& keys) {
  return keys.params.magnitude_bits == 2 && keys.params.scale_group % kUnit == 0;
}
RowSource source_of(const SignKeys& keys, const Planes& planes) {
  if (keys.params.magnitude_bits == 16) {
    return planes.source(exact_format(keys.params.key_dtype), SIKV_MAGNITUDE);
  }
  if (!is_fast(keys)) return planes.unpacked(keys);
  RowSource source = planes.source(RowFormat::kSignedMinMax2, SIKV_MAGNITUDE);
  source.sign = planes.plane(SIKV_INDEX_CODE);
  source.scale = planes.plane(SIKV_SCALE);
  source.scale_group = keys.params.scale_group;
  source.scale_dtype = keys.params.scale_dtype;
  return source;
}

RowSource source_of(const RotatedKeys& keys, const Planes& planes) {
  const int i = keys.params.bits - 2;
  RowSource source = planes.source(offset(RowFormat::kSigned1, i), SIKV_MAGNITUDE);
  source.sign = planes.plane(SIKV_INDEX_CODE);
  source.scale = planes.plane(SIKV_SCALE);
  source.table = kLevels[i].data();
  return source;
}

void prepare_query(const Stored&, int, int, float*) {}
void prepare_query(const SignKeys& keys, int row, int head_dim, float* q) {
  if (!is_fast(keys)) return;
  const float* alpha = keys.store.table(SIKV_KEY_SCALE, row);
  for (int g = 0; g < keys.group; ++g) {
    for (int d = 0; d < head_dim; ++d) q[g * head_dim + d] *= alpha[d];
  }
}
void prepare_query(const RotatedKeys& keys, int, int head_dim, float* q) {
  for (int g = 0; g < keys.group; ++g) {
    flash_simd()->rotate(static_cast<size_t>(head_dim), q + g * head_dim);
  }
}

void shift_query(const Stored&, int, const float*, float*) {}
void shift_query(const SignKeys& keys, int row, const float* q, float* shift) {
  if (keys.params.magnitude_bits != 16) keys.shift_by_mean(row, q, shift);
}
void shift_query(const RotatedKeys& keys, int row, const float* q, float* shift) {
  keys.shift_by_mean(row, q, shift);
}

// ---- values -------------------------------------------------------------------------------------

RowSource source_of(const RawValues& values, const Planes& planes) {
  return planes.source(exact_format(values.params.dtype), SIKV_VALUE_CODE);
}

RowSource source_of(const MinMaxValues& values, const Planes& planes) {
  if (values.params.bits == 16) {
    return planes.source(exact_format(values.params.value_dtype), SIKV_VALUE_CODE);
  }
  if (values.params.bits != 2 || values.params.scale_group % kUnit != 0) {
    return planes.unpacked(values);
  }
  RowSource source = planes.source(RowFormat::kMinMax2, SIKV_VALUE_CODE);
  source.scale = planes.plane(SIKV_VALUE_SCALE);
  source.scale_group = values.params.scale_group;
  source.scale_dtype = values.params.scale_dtype;
  return source;
}

RowSource source_of(const RotatedValues& values, const Planes& planes) {
  const int i = values.params.bits - 2;
  RowSource source = planes.source(offset(RowFormat::kCoded2, i), SIKV_VALUE_CODE);
  source.scale = planes.plane(SIKV_VALUE_SCALE);
  source.table = kCodes[i].data();
  return source;
}

void restore_output(const Stored&, int, int, float, float*) {}
void restore_output(const RotatedValues& values, int row, int head_dim, float sum, float* acc) {
  flash_simd()->unrotate(static_cast<size_t>(head_dim), acc);
  const float* mean = values.store.table(SIKV_VALUE_MEAN, row);
  for (int d = 0; d < head_dim; ++d) acc[d] += sum * mean[d];
}

// ---- the kernel ---------------------------------------------------------------------------------

template <typename Keys, typename Values>
class Rows final : public EncodedRows {
 public:
  Rows(const CacheView& view, int group)
      : view_(view), keys_(view.key(), group), values_(view.value(), group) {}

  RowSource keys(int row) const override {
    return source_of(keys_, Planes(view_.raw(), view_.raw().key, row));
  }
  RowSource values(int row) const override {
    return source_of(values_, Planes(view_.raw(), view_.raw().value, row));
  }
  void prepare(int row, float* q) const override { prepare_query(keys_, row, view_.head_dim(), q); }
  void shift(int row, const float* q, float* shift) const override {
    shift_query(keys_, row, q, shift);
  }
  void restore(int row, float sum, float* acc) const override {
    restore_output(values_, row, view_.head_dim(), sum, acc);
  }

 private:
  const CacheView& view_;
  Keys keys_;
  Values values_;
};

class SparseFlash : public Kernel {
 public:
  explicit SparseFlash(const CreateArgs& args) : flash_(args) {}

  void accepts(const LayoutView& key_layout, const LayoutView& value_layout) override {
    with_keys(key_layout, [](auto) {});
    with_values(value_layout, [](auto) {});
  }
  uint64_t plan(int32_t) override { return flash_.workspace_bytes(); }
  void run(const sikv_attend_args& args, const CacheView& view, Launch launch) override {
    const int group = args.num_query_heads / view.num_kv_heads();
    with_keys(view.key().layout(), [&](auto keys) {
      with_values(view.value().layout(), [&](auto values) {
        const Rows<typename decltype(keys)::type, typename decltype(values)::type> rows(view,
                                                                                        group);
        flash_.run(args, view, launch.workspace, Encoded::kSelected, rows);
      });
    });
  }

 private:
  FlashCpu flash_;
};

}  // namespace

std::unique_ptr<Kernel> make_cpu(const CreateArgs& args) {
  return std::make_unique<SparseFlash>(args);
}

}  // namespace sikv::sparse_flash
