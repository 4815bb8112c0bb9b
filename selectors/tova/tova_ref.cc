#include "kernels/common/running_eviction.h"
#include "selectors/tova/tova.h"

namespace sikv::tova {
namespace {

class Tova final : public RunningEviction {
 public:
  Tova(const CreateArgs& args, const WindowMath& math)
      : RunningEviction(args, args.options.budget("budget"), math, Heads::kMean) {}

 private:
  int64_t recent(int64_t) const override { return 0; }

  std::vector<float> score_prompt(const sikv_observe_args& args, const CacheView& view,
                                  int row) const override {
    return window_attention(args, view, row, group(), 1, math());
  }

  // Only the last query before a page is encoded decides.
  int64_t score_step(const sikv_select_args& args, const CacheView& view, int row,
                     std::vector<float>& scores) const override {
    if (view.tail_len(row / view.num_kv_heads()) != kPageTokens) return 0;
    std::fill(scores.begin(), scores.end(), 0.0f);
    return attend(args, view, row, [&](size_t i, float probability) { scores[i] = probability; });
  }
};

}  // namespace

std::unique_ptr<ScoringSelector> make(const CreateArgs& args, const WindowMath& math) {
  return std::make_unique<Tova>(args, math);
}

std::unique_ptr<ScoringSelector> make_ref(const CreateArgs& args) {
  return make(args, kRefWindowMath);
}

}  // namespace sikv::tova
