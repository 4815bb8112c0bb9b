#include "kernels/common/running_eviction.h"
#include "selectors/tova/tova.h"

namespace sikv::tova {
namespace {

class Tova final : public RunningEviction {
 public:
  Tova(const CreateArgs& args, const WindowMath& math)
      : RunningEviction(args, args.options.budget("budget"), math) {}

 private:
  int64_t recent(int64_t) const override { return 0; }

  // All KV heads of a layer rank tokens by the sum over them.
  std::vector<float> score_prompt(const sikv_observe_args& args, const CacheView& view,
                                  int row) const override {
    const int heads = view.num_kv_heads(), b = row / heads;
    std::vector<float> scores(static_cast<size_t>(args.prompt_len[b]), 0.0f);
    for (int h = 0; h < heads; ++h) {
      const auto of_head = window_attention(args, view, b * heads + h, group(), 1, math());
      for (size_t t = 0; t < scores.size(); ++t) scores[t] += of_head[t];
    }
    return scores;
  }

  // Only the last query before a page is encoded decides.
  int64_t score_step(const sikv_select_args& args, const CacheView& view, int row,
                     std::vector<float>& scores) const override {
    const int heads = view.num_kv_heads(), b = row / heads;
    if (view.tail_len(b) != kPageTokens) return 0;
    std::fill(scores.begin(), scores.end(), 0.0f);
    int64_t bytes = 0;
    for (int h = 0; h < heads; ++h) {
      bytes += attend(args, view, b * heads + h, scores.size(),
                      [&](size_t position, float probability) { scores[position] += probability; });
    }
    return bytes / heads;
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
