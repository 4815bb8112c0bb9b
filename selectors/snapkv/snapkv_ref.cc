#include "kernels/common/prompt_eviction.h"
#include "selectors/snapkv/snapkv.h"

namespace sikv::snapkv {
namespace {

class SnapKv final : public PromptEviction {
 public:
  SnapKv(const CreateArgs& args, const WindowMath& math)
      : PromptEviction(args, static_cast<int>(args.options.integer("window"))),
        ranking_(args.options, math),
        budget_(args.options.budget("budget")) {}

 private:
  std::vector<float> score_row(const sikv_observe_args& args, const CacheView& view,
                               int row) const override {
    return ranking_.scores(args, view, row, group(), window());
  }
  int64_t kept(int, int, int64_t prompt, int64_t, int64_t) const override {
    return budget_.tokens(prompt);
  }

  WindowRanking ranking_;
  Budget budget_;
};

}  // namespace

std::unique_ptr<ScoringSelector> make(const CreateArgs& args, const WindowMath& math) {
  return std::make_unique<SnapKv>(args, math);
}

std::unique_ptr<ScoringSelector> make_ref(const CreateArgs& args) {
  return make(args, kRefWindowMath);
}

}  // namespace sikv::snapkv
