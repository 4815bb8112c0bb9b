#include "kernels/common/running_eviction.h"
#include "selectors/h2o/h2o.h"

namespace sikv::h2o {
namespace {

class H2o final : public RunningEviction {
 public:
  H2o(const CreateArgs& args, const WindowMath& math)
      : RunningEviction(args, args.options.budget("budget"), math, Heads::kEach),
        recent_(args.options.number("recent")) {}

 private:
  int64_t recent(int64_t budget) const override {
    return static_cast<int64_t>(static_cast<double>(budget) * recent_);
  }
  // Column sums: a query more counts as much, in the prompt and after it.
  std::vector<float> score_prompt(const sikv_observe_args& args, const CacheView& view,
                                  int row) const override {
    const int prompt = args.prompt_len[row / view.num_kv_heads()];
    std::vector<float> scores = window_attention(args, view, row, group(), prompt, math());
    for (float& score : scores) score *= static_cast<float>(prompt);
    return scores;
  }
  int64_t score_step(const sikv_select_args& args, const CacheView& view, int row,
                     std::vector<float>& scores) const override {
    return attend(args, view, row, [&](size_t i, float probability) { scores[i] += probability; });
  }

  double recent_;
};

}  // namespace

std::unique_ptr<ScoringSelector> make(const CreateArgs& args, const WindowMath& math) {
  return std::make_unique<H2o>(args, math);
}

std::unique_ptr<ScoringSelector> make_ref(const CreateArgs& args) {
  return make(args, kRefWindowMath);
}

}  // namespace sikv::h2o
