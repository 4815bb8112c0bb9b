#include "kernels/common/flash_cpu.h"
#include "kernels/common/stored_rows.h"
#include "kernels/dense_attention/dense_attention.h"

namespace sikv::dense_attention {
namespace {

class Rows final : public EncodedRows {
 public:
  explicit Rows(const CacheView& view) : view_(view.raw()) {}

  RowSource keys(int row) const override { return stored_keys(view_, row); }
  RowSource values(int row) const override { return stored_values(view_, row); }

 private:
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
