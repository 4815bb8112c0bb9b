#include "kernels/common/flash_rows.h"
#include "kernels/gather_attention/gather_attention.h"

namespace sikv::gather_attention {
namespace {

// Reads through the codecs' own decode.
struct Reader : PlainReader {
  explicit Reader(const CacheView& view) : view(view) {}
  void load(int row, std::span<const int32_t> slots, float* k, float* v) const {
    view.key().decode(row, slots, k);
    view.value().decode(row, slots, v);
  }
  const CacheView& view;
};

class GatherAttention : public Kernel {
 public:
  explicit GatherAttention(const CreateArgs& args) : rows_(args) {}

  uint64_t plan(int32_t) override { return rows_.workspace_bytes(); }
  void run(const sikv_attend_args& args, const CacheView& view, Launch launch) override {
    rows_.run(args, view, launch.workspace, Encoded::kSelected, Reader(view));
  }

 private:
  FlashRows rows_;
};

}  // namespace

std::unique_ptr<Kernel> make_ref(const CreateArgs& args) {
  return std::make_unique<GatherAttention>(args);
}

}  // namespace sikv::gather_attention
