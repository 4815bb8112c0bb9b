#include "kernels/sparse_flash/sparse_flash.h"
#include "kernels/sparse_flash/sparse_flash_layouts.h"

namespace sikv::sparse_flash {
namespace {

template <typename Keys, typename Values>
struct Reader {
  void prepare(int row, float* q, float* shift) const { keys.prepare(row, q, shift); }
  void load(int row, std::span<const int32_t> slots, float* k, float* v) const {
    for (int32_t slot : slots) {
      keys.load(row, slot, k);
      values.load(row, slot, v);
      k += head_dim;
      v += head_dim;
    }
  }
  void restore(int row, float sum, float* acc) const { values.restore(row, sum, acc); }

  Keys keys;
  Values values;
  int head_dim;
};

class SparseFlash : public Kernel {
 public:
  explicit SparseFlash(const CreateArgs& args) : rows_(args) {}

  void accepts(const LayoutView& key_layout, const LayoutView& value_layout) override {
    with_keys(key_layout, [](auto) {});
    with_values(value_layout, [](auto) {});
  }
  uint64_t plan(int32_t) override { return rows_.workspace_bytes(); }
  void run(const sikv_attend_args& args, const CacheView& view, Launch launch) override {
    const int group = args.num_query_heads / view.num_kv_heads();
    with_keys(view.key().layout(), [&](auto keys) {
      with_values(view.value().layout(), [&](auto values) {
        using Keys = typename decltype(keys)::type;
        using Values = typename decltype(values)::type;
        const Reader<Keys, Values> reader{Keys(view.key(), group), Values(view.value(), group),
                                          view.head_dim()};
        rows_.run(args, view, launch.workspace, Encoded::kSelected, reader);
      });
    });
  }

 private:
  FlashRows rows_;
};

}  // namespace

std::unique_ptr<Kernel> make_ref(const CreateArgs& args) {
  return std::make_unique<SparseFlash>(args);
}

}  // namespace sikv::sparse_flash
