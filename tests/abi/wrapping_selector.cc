// Wrappers built on the SDK: one that passes everything on (ref) and one without evict (mute).
#include "plugins/sdk/plugin.h"

namespace {

constexpr sikv_option_spec kOptions[] = {
    sikv::selector_option("what is wrapped"),
    sikv::text_option("note", "", "free text"),
};

class Wrapping final : public sikv::WrappingSelector {
 public:
  explicit Wrapping(const sikv::CreateArgs& args)
      : WrappingSelector(args), host_(args.host), note_(args.options.text("note")) {
    if (!args.base) throw sikv::Refused("there is no base");
  }
  ~Wrapping() override { host_.log(host_.context, 0, "wrapper destroyed"); }
  uint64_t state_bytes() const override { return base_.state_bytes() + note_.size(); }

 private:
  const sikv_host& host_;
  std::string note_;
};

class Mute final : public sikv::Selector {
 public:
  Plan plan() override { return {}; }
  void run(const sikv_select_args&, const sikv::CacheView&, sikv::Launch) override {}
};

std::unique_ptr<sikv::ScoringSelector> make(const sikv::CreateArgs& args) {
  return std::make_unique<Wrapping>(args);
}
std::unique_ptr<sikv::Selector> make_mute(const sikv::CreateArgs&) {
  return std::make_unique<Mute>();
}

}  // namespace

SIKV_PLUGIN(
    "wrapping", "1.0.0", SIKV_CPU, SIKV_KIND_BIT(SIKV_SELECTOR),
    (sikv::scoring_selector<make, kOptions, sikv::probe_ref,
                            SIKV_SELECTOR_NEEDS_ALL_QUERIES | SIKV_SELECTOR_SELECTS_ALL>("ref")),
    (sikv::selector<make_mute, kOptions>("mute")))
