// A selector with needs that evicts and scores, and tells the host's log when it dies.
#include "plugins/sdk/plugin.h"

namespace {

class Evicting final : public sikv::ScoringSelector {
 public:
  explicit Evicting(const sikv::CreateArgs& args) : host_(args.host) {}
  ~Evicting() override { host_.log(host_.context, 0, "base destroyed"); }
  Plan plan() override { return {9, 64}; }
  void run(const sikv_select_args&, const sikv::CacheView&, sikv::Launch) override {}
  void evict(const sikv_evict_args&, const sikv::CacheView&, sikv::Launch) override {}
  void score(const sikv_score_args&, const sikv::CacheView&, sikv::Launch) override {}
  uint64_t state_bytes() const override { return 100; }
  void counters(const std::function<void(std::string_view, double)>& push) const override {
    push("scan_bytes", 12);
  }

 private:
  const sikv_host& host_;
};

std::unique_ptr<sikv::ScoringSelector> make(const sikv::CreateArgs& args) {
  return std::make_unique<Evicting>(args);
}

}  // namespace

SIKV_PLUGIN("evicting", "1.0.0", SIKV_CPU, SIKV_KIND_BIT(SIKV_SELECTOR),
            (sikv::scoring_selector<make, sikv::kNoOptions, sikv::probe_ref,
                                    SIKV_SELECTOR_NEEDS_W_O | SIKV_SELECTOR_EVICTS_TOGETHER |
                                        SIKV_SELECTOR_SELECTS_ALL>("ref")))
