// The layouts sparse_flash reads, and how a token of each is turned into fp32 without undoing what
// can be undone once per query: rotation, centring, key scales.
//
// Every key store has      prepare(row, q, shift)  see PlainReader
//                          load(row, slot, k)
// Every value store has    load(row, slot, v)
//                          restore(row, sum, acc)  see PlainReader
#ifndef SIKV_KERNELS_SPARSE_FLASH_SPARSE_FLASH_LAYOUTS_H_
#define SIKV_KERNELS_SPARSE_FLASH_SPARSE_FLASH_LAYOUTS_H_

#include <string>

#include "kernels/common/flash_rows.h"
#include "plugins/layouts/intq_v1.h"
#include "plugins/layouts/kivi_v1.h"
#include "plugins/layouts/raw_v1.h"
#include "plugins/layouts/rlm4_v1.h"
#include "plugins/layouts/sign4_v1.h"

namespace sikv::sparse_flash {

// A store and where a slot lies in it.
struct Stored {
  Stored(const StoreView& store, int group) : store(store), group(group) {}
  uint8_t* page(sikv_role role, int row, int slot) const {
    return store.page(role, row, slot / kPageTokens);
  }
  // shift[g] = q_g.mean, for keys that are loaded without their mean.
  void shift_by_mean(int row, const float* q, float* shift) const {
    const int dim = store.layout().head_dim();
    for (int g = 0; g < group; ++g) {
      shift[g] = dot(q + g * dim, store.table(SIKV_KEY_MEAN, row), dim);
    }
  }

  const StoreView& store;
  int group;  // G
};

// ---- keys ---------------------------------------------------------------------------------------

struct RawKeys : Stored {
  using Stored::Stored;
  void prepare(int, float*, float*) const {}
  void load(int row, int slot, float* k) const {
    raw::unpack_1(params, page(SIKV_MAGNITUDE, row, slot), slot % kPageTokens, k);
  }
  raw::Params params = raw::read_params(store.layout());
};

struct KiviKeys : Stored {
  using Stored::Stored;
  void prepare(int, float*, float*) const {}
  void load(int row, int slot, float* k) const {
    kivi::unpack_1(params, {page(SIKV_MAGNITUDE, row, slot), page(SIKV_SCALE, row, slot)},
                   slot % kPageTokens, k);
  }
  kivi::Params params = kivi::read_params(store.layout());
};

struct SignKeys : Stored {
  using Stored::Stored;
  void prepare(int row, float* q, float* shift) const { shift_by_mean(row, q, shift); }
  void load(int row, int slot, float* k) const {
    const sign4::Page bytes = {
        page(SIKV_INDEX_CODE, row, slot),
        sign4::has_magnitude(params) ? page(SIKV_MAGNITUDE, row, slot) : nullptr,
        sign4::has_scale(params) ? page(SIKV_SCALE, row, slot) : nullptr};
    const sign4::Tables tables = {store.table(SIKV_CODEBOOK, row), store.table(SIKV_KEY_MEAN, row),
                                  store.table(SIKV_KEY_SCALE, row)};
    sign4::unpack_centred_1(params, bytes, slot % kPageTokens, tables, k);
  }
  sign4::Params params = sign4::read_params(store.layout());
};

struct RotatedKeys : Stored {
  using Stored::Stored;
  void prepare(int row, float* q, float* shift) const {
    shift_by_mean(row, q, shift);
    for (int g = 0; g < group; ++g) rotation::forward(q + g * params.head_dim, params.head_dim);
  }
  void load(int row, int slot, float* k) const {
    rlm4::unpack_rotated_1(
        params,
        rlm4::KeyPage{page(SIKV_INDEX_CODE, row, slot), page(SIKV_MAGNITUDE, row, slot),
                      page(SIKV_SCALE, row, slot), line},
        slot % kPageTokens, k);
  }
  rlm4::Params params = rlm4::read_params(store.layout());
  int line = rlm4::read_line(store.layout());
};

// ---- values -------------------------------------------------------------------------------------

struct RawValues : Stored {
  using Stored::Stored;
  void load(int row, int slot, float* v) const {
    raw::unpack_1(params, page(SIKV_VALUE_CODE, row, slot), slot % kPageTokens, v);
  }
  void restore(int, float, float*) const {}
  raw::Params params = raw::read_params(store.layout());
};

struct MinMaxValues : Stored {
  using Stored::Stored;
  void load(int row, int slot, float* v) const {
    const intq::Page bytes = {
        page(SIKV_VALUE_CODE, row, slot),
        intq::has_scale(params) ? page(SIKV_VALUE_SCALE, row, slot) : nullptr};
    intq::unpack_1(params, bytes, slot % kPageTokens, v);
  }
  void restore(int, float, float*) const {}
  intq::Params params = intq::read_params(store.layout());
};

struct RotatedValues : Stored {
  using Stored::Stored;
  void load(int row, int slot, float* v) const {
    rlm4::unpack_rotated_1(
        params,
        rlm4::ValuePage{page(SIKV_VALUE_CODE, row, slot), page(SIKV_VALUE_SCALE, row, slot), line},
        slot % kPageTokens, v);
  }
  void restore(int row, float sum, float* acc) const {
    rotation::inverse(acc, params.head_dim);
    const float* mean = store.table(SIKV_VALUE_MEAN, row);
    for (int d = 0; d < params.head_dim; ++d) acc[d] += sum * mean[d];
  }
  rlm4::Params params = rlm4::read_params(store.layout());
  int line = rlm4::read_line(store.layout());
};

// ---- which layout is which ----------------------------------------------------------------------

template <typename T>
struct Type {
  using type = T;
};

[[noreturn]] inline void refuse(const LayoutView& layout, const char* what) {
  throw Refused("sparse_flash cannot read " + std::string(what) + " stored as " +
                std::string(layout.family()) + ".v" + std::to_string(layout.version()) +
                ": use kernel gather_attention, which reads every layout");
}

// Calls visit(Type<T>()) with the store type of the layout; Refused if there is none.
template <typename Visit>
void with_keys(const LayoutView& layout, Visit&& visit) {
  if (layout.is(raw::kFamily, raw::kVersion)) return visit(Type<RawKeys>());
  if (layout.is(kivi::kFamily, kivi::kVersion)) return visit(Type<KiviKeys>());
  if (layout.is(sign4::kFamily, sign4::kVersion)) return visit(Type<SignKeys>());
  if (rlm4::is_keys(layout)) return visit(Type<RotatedKeys>());
  refuse(layout, "keys");
}

template <typename Visit>
void with_values(const LayoutView& layout, Visit&& visit) {
  if (layout.is(raw::kFamily, raw::kVersion)) return visit(Type<RawValues>());
  if (layout.is(intq::kFamily, intq::kVersion) || layout.is(intq::kKiviFamily, intq::kVersion)) {
    return visit(Type<MinMaxValues>());
  }
  if (rlm4::is_values(layout)) return visit(Type<RotatedValues>());
  refuse(layout, "values");
}

}  // namespace sikv::sparse_flash

#endif  // SIKV_KERNELS_SPARSE_FLASH_SPARSE_FLASH_LAYOUTS_H_
