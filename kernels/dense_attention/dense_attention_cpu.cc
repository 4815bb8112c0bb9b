#include "kernels/common/flash_cpu.h"
#include "kernels/dense_attention/dense_attention.h"
#include "plugins/layouts/raw_v1.h"

namespace sikv::dense_attention {
namespace {

class Rows final : public EncodedRows {
 public:
  explicit Rows(const CacheView& view) : view_(view.raw()) {}

  RowSource keys(int row) const override { return source(view_.key, row); }
  RowSource values(int row) const override { return source(view_.value, row); }

 private:
  // raw.v1 has one plane, on either side.
  RowSource source(const sikv_store_view& store, int row) const {
    const raw::Params params = raw::read_params(LayoutView(*store.layout));
    RowSource source{exact_format(params.dtype)};
    source.page_table = view_.page_table + int64_t{row} * view_.max_pages;
    source.code = {static_cast<const uint8_t*>(store.planes[0]), store.page_stride_bytes[0],
                   raw::row_bytes(params)};
    return source;
  }

  const sikv_cache_view& view_;
};

class DenseAttention : public Kernel {
 public:
  explicit DenseAttention(const CreateArgs& args) : flash_(args) {}

  void accepts(const LayoutView& key_layout, const LayoutView& value_layout) override {
    require_raw(key_layout, "keys");
    require_raw(value_layout, "values");
  }
  uint64_t plan(int32_t) override { return flash_.workspace_bytes(); }
  void run(const sikv_attend_args& args, const CacheView& view, Launch launch) override {
    flash_.run(args, view, launch.workspace, Encoded::kAll, Rows(view));
  }

 private:
  FlashCpu flash_;
};

}  // namespace

std::unique_ptr<Kernel> make_cpu(const CreateArgs& args) {
  return std::make_unique<DenseAttention>(args);
}

}  // namespace sikv::dense_attention
