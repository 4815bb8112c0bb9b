#include "selectors/hshare/hshare.h"

namespace sikv::hshare {
namespace {

class ScalarLabels final : public LabelScorer {
 public:
  void score(const Labels& labels, const float* q, float* scores) const override {
    for (int64_t slot = 0; slot < labels.tokens; ++slot) {
      float sum = 0.0f;
      for (int c = 0; c < labels.channels; ++c) {
        sum += q[c] * sikv_load(labels.data, labels.dtype, labels.at(slot, c));
      }
      scores[slot] = sum;
    }
  }
};

}  // namespace

std::unique_ptr<Selector> make_ref(const CreateArgs& args) {
  return make_selector(args, [] {
    return Engine{std::make_unique<ScalarLabels>(), scalar_scorer()};
  });
}

}  // namespace sikv::hshare
