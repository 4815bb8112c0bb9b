// A good selector, written on the SDK, whose instances can be asked to fail.
#include <stdexcept>

#include "plugins/sdk/plugin.h"

namespace {

constexpr sikv_option_spec kOptions[] = {
    sikv::budget_option("budget", "4", "tokens to select"),
    sikv::choice_option("mood", "willing", "willing|refuses|throws", "what create does"),
};

class GoodSelector final : public sikv::Selector {
 public:
  explicit GoodSelector(const sikv::CreateArgs& args) : budget_(args.options.budget("budget")) {
    const std::string_view mood = args.options.choice("mood");
    if (mood == "refuses") throw sikv::Refused("mood is 'refuses'; use 'willing'");
    if (mood == "throws") throw std::runtime_error("thrown on purpose");
  }
  void accepts(const sikv::LayoutView& key_layout) override {
    if (key_layout.family() != "toy") throw sikv::Refused("layout is not toy");
  }
  Plan plan() override { return {static_cast<int32_t>(budget_.tokens(0)), 128}; }
  void begin_step(int64_t step) override {
    if (step < 0) throw std::runtime_error("negative step");
  }
  void run(const sikv_select_args&, const sikv::CacheView&, sikv::Launch) override {}
  uint64_t state_bytes() const override { return 7; }
  void counters(const std::function<void(std::string_view, double)>& push) const override {
    push("scans", 3);
  }

 private:
  const sikv::Budget budget_;
};

std::unique_ptr<sikv::Selector> make(const sikv::CreateArgs& args) {
  return std::make_unique<GoodSelector>(args);
}

int32_t probe_fast(const sikv_device*, sikv_message*) { return 10; }

int32_t probe_many_threads(const sikv_device* device, sikv_message* reason) {
  if (device->num_threads >= 1000) return 20;
  sikv::sdk::write_message(reason, "it needs 1000 threads");
  return 0;
}

}  // namespace

SIKV_PLUGIN("good", "2.0.0", SIKV_CPU, SIKV_KIND_BIT(SIKV_SELECTOR),
            (sikv::selector<make, kOptions>("ref")),
            (sikv::selector<make, kOptions, probe_fast>("cpu")),
            (sikv::selector<make, kOptions, probe_many_threads>("huge")))
