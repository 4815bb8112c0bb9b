#include <string>

#include "kernels/common/flash_rows.h"
#include "kernels/dense_attention/dense_attention.h"
#include "plugins/layouts/raw_v1.h"

namespace sikv::dense_attention {

void require_raw(const LayoutView& layout, const char* what) {
  if (layout.is(raw::kFamily, raw::kVersion)) return;
  throw Refused("dense_attention reads layout raw.v1 alone and the " + std::string(what) +
                " are stored as " + std::string(layout.family()) + ".v" +
                std::to_string(layout.version()) +
                ": use kernel gather_attention with selector full");
}

namespace {

struct Reader : PlainReader {
  explicit Reader(const CacheView& view)
      : key(view.key()),
        value(view.value()),
        key_params(raw::read_params(key.layout())),
        value_params(raw::read_params(value.layout())) {}
  void load(int row, std::span<const int32_t> slots, float* k, float* v) const {
    for (int32_t slot : slots) {
      const int page = slot / kPageTokens, token = slot % kPageTokens;
      raw::unpack_1(key_params, key.page(SIKV_MAGNITUDE, row, page), token, k);
      raw::unpack_1(value_params, value.page(SIKV_VALUE_CODE, row, page), token, v);
      k += key_params.head_dim;
      v += value_params.head_dim;
    }
  }
  const StoreView& key;
  const StoreView& value;
  raw::Params key_params, value_params;
};

class DenseAttention : public Kernel {
 public:
  explicit DenseAttention(const CreateArgs& args) : rows_(args) {}

  void accepts(const LayoutView& key_layout, const LayoutView& value_layout) override {
    require_raw(key_layout, "keys");
    require_raw(value_layout, "values");
  }
  uint64_t plan(int32_t) override { return rows_.workspace_bytes(); }
  // Pinned tokens are attended where they are stored: their copies hold the same bytes.
  void run(const sikv_attend_args& args, const CacheView& view, Launch launch) override {
    rows_.run(args, view, launch.workspace, Encoded::kAll, Reader(view));
  }

 private:
  FlashRows rows_;
};

}  // namespace

std::unique_ptr<Kernel> make_ref(const CreateArgs& args) {
  return std::make_unique<DenseAttention>(args);
}

}  // namespace sikv::dense_attention
