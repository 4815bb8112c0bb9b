#include <algorithm>

#include "kernels/common/prompt_eviction.h"
#include "plugins/sdk/split.h"
#include "selectors/pyramidkv/pyramidkv.h"

namespace sikv::pyramidkv {
namespace {

class PyramidKv final : public PromptEviction {
 public:
  PyramidKv(const CreateArgs& args, const WindowMath& math)
      : PromptEviction(args, static_cast<int>(args.options.integer("window"))),
        ranking_(args.options, math),
        budget_(args.options.budget("budget")),
        beta_(args.options.number("beta")) {}

 private:
  std::vector<float> score_row(const sikv_observe_args& args, const CacheView& view,
                               int row) const override {
    return ranking_.scores(args, view, row, group(), window());
  }
  int64_t kept(int layer, int, int64_t prompt, int64_t competing,
               int64_t in_window) const override {
    const int64_t budget = budget_.tokens(prompt), share = std::max<int64_t>(budget - in_window, 0);
    if (share >= competing || prompt < 2 * share) return budget;
    return in_window +
           layer_shares(shape().num_layers, share, competing, beta_)[static_cast<size_t>(layer)];
  }

  WindowRanking ranking_;
  Budget budget_;
  double beta_;
};

}  // namespace

std::vector<int64_t> layer_shares(int layers, int64_t share, int64_t competing, double beta) {
  const auto mean = static_cast<double>(share), most = static_cast<double>(competing);
  double last = mean / beta, first = 2 * mean - last;
  if (first > most) first = most, last = 2 * mean - first;
  std::vector<double> wanted;
  for (int layer = 0; layer < layers; ++layer) {
    const double down = layers > 1 ? static_cast<double>(layer) / (layers - 1) : 0.5;
    wanted.push_back(first + down * (last - first));
  }
  return split_by_largest_remainder(wanted, int64_t{layers} * share);
}

std::unique_ptr<ScoringSelector> make(const CreateArgs& args, const WindowMath& math) {
  return std::make_unique<PyramidKv>(args, math);
}

std::unique_ptr<ScoringSelector> make_ref(const CreateArgs& args) {
  return make(args, kRefWindowMath);
}

}  // namespace sikv::pyramidkv
