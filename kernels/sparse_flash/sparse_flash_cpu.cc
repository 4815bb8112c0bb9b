// sparse_flash with SIMD. Codes of 2 bits (sign4 magnitudes, intq and kiviv values), all of rlm4
// and rlm4v, and rows kept in a plain type are read where they lie; the scalar unpacking of `ref`
// stands in for the rest, before the same SIMD attention.
#include "kernels/common/flash_cpu.h"
#include "kernels/common/stored_rows.h"
#include "kernels/sparse_flash/sparse_flash.h"
#include "kernels/sparse_flash/sparse_flash_layouts.h"

namespace sikv::sparse_flash {
namespace {

// `source`; where it is not read in place `store` unpacks slots one by one.
template <typename Store>
RowSource with_unpack(RowSource source, const Store& store) {
  source.unpack = [](const void* context, int row, const int32_t* slots, int count, float* out) {
    const auto& store = *static_cast<const Store*>(context);
    for (int t = 0; t < count; ++t) {
      store.load(row, slots[t], out + t * store.params.head_dim);
    }
  };
  source.context = &store;
  return source;
}

// ---- keys: q into their space -------------------------------------------------------------------

void prepare_query(const Stored&, const RowSource&, int, float*) {}
// Rows read in place come without alpha.
void prepare_query(const SignKeys& keys, const RowSource& source, int head_dim, float* q) {
  if (source.format != RowFormat::kSignedMinMax2) return;
  const float* alpha = keys.store.table(SIKV_KEY_SCALE, source.row);
  for (int g = 0; g < keys.group; ++g) {
    for (int d = 0; d < head_dim; ++d) q[g * head_dim + d] *= alpha[d];
  }
}
void prepare_query(const RotatedKeys& keys, const RowSource&, int head_dim, float* q) {
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

// ---- values: sums back to theirs ----------------------------------------------------------------

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
      : view_(view),
        keys_(view.key(), group),
        values_(view.value(), group),
        key_rows_(with_unpack(stored_keys(view.raw(), 0), keys_)),
        value_rows_(with_unpack(stored_values(view.raw(), 0), values_)) {}

  RowSource keys(int row) const override { return at_row(key_rows_, view_.raw(), row); }
  RowSource values(int row) const override { return at_row(value_rows_, view_.raw(), row); }
  void prepare(int row, float* q) const override {
    prepare_query(keys_, keys(row), view_.head_dim(), q);
  }
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
  RowSource key_rows_, value_rows_;  // of row 0: reading a layout's parameters takes a while
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
