// Live instances: what a plugin answers comes back as values, Error or InternalError.
#include "framework/registry/instance.h"

#include <gtest/gtest.h>

#include <cstring>
#include <filesystem>
#include <string>

#include "framework/base/error.h"

namespace sikv {
namespace {

const std::filesystem::path kLibraries = SIKV_TOY_LIBRARIES;

class InstanceTest : public testing::Test {
 protected:
  InstanceTest() {
    registry_.add_folder(kLibraries);
    device_.struct_size = sizeof device_;
    shape_.struct_size = sizeof shape_;
    host_.struct_size = sizeof host_;
    host_.context = &log_;
    host_.log = [](void* log, int32_t, const char* text) {
      static_cast<std::vector<std::string>*>(log)->emplace_back(text);
    };
  }
  template <typename T>
  T make(sikv_kind kind, const char* id,
         const std::vector<std::pair<std::string, std::string>>& given = {}) {
    const Variant& variant = registry_.find(kind, id, "ref");
    return T(variant, OptionSet::parse(variant.options, given, id), shape_, device_, host_);
  }

  // `wrapper` (a variant of "wrapping") around the ref variant of `base`.
  SelectorInstance wrap(const char* wrapper, const char* base, const char* note = "") {
    const Variant& variant = registry_.find(SIKV_SELECTOR, "wrapping", wrapper);
    return {variant,
            OptionSet::parse(
                variant.options,
                std::vector<std::pair<std::string, std::string>>{{"base", base}, {"note", note}},
                "wrapping"),
            shape_,
            device_,
            host_,
            std::make_unique<SelectorInstance>(make<SelectorInstance>(SIKV_SELECTOR, base))};
  }

  std::vector<std::string> log_;
  Registry registry_;
  sikv_shape shape_{};
  sikv_device device_{};
  sikv_host host_{};
};

template <typename Exception, typename Body>
std::string thrown(Body&& body) {
  try {
    body();
  } catch (const Exception& exception) {
    return exception.what();
  }
  return "nothing";
}

TEST_F(InstanceTest, AnswersComeBack) {
  auto selector = make<SelectorInstance>(SIKV_SELECTOR, "good", {{"budget", "2K"}});
  EXPECT_EQ(selector.plan().capacity, 2048);
  EXPECT_EQ(selector.plan().workspace_bytes, 128u);
  EXPECT_EQ(selector.state_bytes(), 7u);
  EXPECT_FALSE(selector.evicts());
  const std::vector<sikv_counter> counters = selector.counters();
  ASSERT_EQ(counters.size(), 1u);
  EXPECT_STREQ(counters[0].name, "scans");
  EXPECT_EQ(counters[0].value, 3);
  sikv_layout layout{};
  EXPECT_EQ(selector.refusal(layout), "layout is not toy");
  std::strcpy(layout.family, "toy");
  EXPECT_EQ(selector.refusal(layout), "");

  auto kernel = make<KernelInstance>(SIKV_KERNEL, "toy");
  EXPECT_EQ(kernel.plan(16), 16u);
  EXPECT_FALSE(kernel.attends_all());
}

TEST_F(InstanceTest, AreMovedAndDestroyedOnce) {
  auto first = make<SelectorInstance>(SIKV_SELECTOR, "good");
  SelectorInstance second = std::move(first);
  EXPECT_EQ(first.self(), nullptr);
  EXPECT_EQ(second.plan().capacity, 4);
  second = make<SelectorInstance>(SIKV_SELECTOR, "good", {{"budget", "8"}});
  EXPECT_EQ(second.plan().capacity, 8);
}

TEST_F(InstanceTest, RefusalsAreErrors) {
  EXPECT_EQ(thrown<Error>([&] {
              make<SelectorInstance>(SIKV_SELECTOR, "good", {{"mood", "refuses"}});
            }),
            "selector 'good' (ref): mood is 'refuses'; use 'willing'");
}

TEST_F(InstanceTest, ExceptionsInsideThePluginAreBugsOfIt) {
  EXPECT_EQ(thrown<InternalError>([&] {
              make<SelectorInstance>(SIKV_SELECTOR, "good", {{"mood", "throws"}});
            }),
            "internal error in selector 'good' (ref) 2.0.0: thrown on purpose; please report this "
            "to its author");
  auto selector = make<SelectorInstance>(SIKV_SELECTOR, "good");
  EXPECT_EQ(thrown<InternalError>([&] { selector.begin_step(-1); }),
            "internal error in selector 'good' (ref) 2.0.0: negative step; please report this to "
            "its author");
  EXPECT_NO_THROW(selector.begin_step(0));
}

// A plugin of 1.1 knows neither lines nor scores: what its structs lack is zero.
TEST_F(InstanceTest, ShorterStructsOfAnOlderPluginAreTaken) {
  const sikv_layout layout = make<CodecInstance>(SIKV_KEY_CODEC, "old").describe();
  EXPECT_STREQ(layout.family, "old");
  EXPECT_EQ(layout.planes[0].bytes_per_tile, 128u);
  EXPECT_EQ(layout.line_bytes, 0u);
  for (const uint32_t offset : layout.line_offset) EXPECT_EQ(offset, 0u);

  auto selector = make<SelectorInstance>(SIKV_SELECTOR, "old");
  EXPECT_EQ(selector.plan().capacity, 11);
  EXPECT_FALSE(selector.scores());
  EXPECT_FALSE(selector.evicts());
}

TEST_F(InstanceTest, AWrapperHasTheNeedsAndTheHooksOfItsBase) {
  const SelectorInstance evicting = wrap("ref", "evicting");
  EXPECT_TRUE(evicting.evicts());
  EXPECT_TRUE(evicting.scores());
  // It passes run on: all is selected where the base selects all.
  EXPECT_EQ(evicting.table().flags, SIKV_SELECTOR_NEEDS_ALL_QUERIES | SIKV_SELECTOR_NEEDS_W_O |
                                        SIKV_SELECTOR_EVICTS_TOGETHER | SIKV_SELECTOR_SELECTS_ALL);
  ASSERT_NE(evicting.base(), nullptr);
  EXPECT_EQ(evicting.base()->variant().id, "evicting");

  const SelectorInstance keeping = wrap("ref", "good");
  EXPECT_FALSE(keeping.evicts());
  EXPECT_FALSE(keeping.scores());
  EXPECT_EQ(keeping.table().flags, SIKV_SELECTOR_NEEDS_ALL_QUERIES);
}

TEST_F(InstanceTest, AWrapperReachesItsBase) {
  SelectorInstance wrapper = wrap("ref", "evicting", "four");
  EXPECT_EQ(wrapper.plan().capacity, 9);
  EXPECT_EQ(wrapper.plan().workspace_bytes, 64u);
  EXPECT_EQ(wrapper.state_bytes(), 104u);  // the base's once, and its own
  ASSERT_EQ(wrapper.counters().size(), 1u);
  EXPECT_STREQ(wrapper.counters()[0].name, "scan_bytes");
  EXPECT_EQ(wrapper.counters()[0].value, 12);
  EXPECT_EQ(wrap("ref", "good").refusal(sikv_layout{}), "layout is not toy");
  EXPECT_EQ(wrap("ref", "old").plan().capacity, 11);
}

TEST_F(InstanceTest, ABaseDiesAfterItsWrapper) {
  { SelectorInstance wrapper = wrap("ref", "evicting"); }
  EXPECT_EQ(log_, (std::vector<std::string>{"wrapper destroyed", "base destroyed"}));
  log_.clear();
  SelectorInstance first = wrap("ref", "evicting");
  SelectorInstance second = std::move(first);
  EXPECT_TRUE(log_.empty());
  EXPECT_EQ(second.state_bytes(), 100u);
}

TEST_F(InstanceTest, EvictionsAreNotLostInAWrapper) {
  EXPECT_EQ(
      thrown<Error>([&] { wrap("mute", "evicting"); }),
      "selector 'wrapping' (mute) cannot wrap selector 'evicting' (ref), which evicts tokens: "
      "choose a base that keeps all of them");
  EXPECT_NO_THROW(wrap("mute", "good"));
}

TEST_F(InstanceTest, StatusesThatTheAbiDoesNotHaveAreBugsOfThePlugin) {
  EXPECT_EQ(thrown<InternalError>([&] { make<KernelInstance>(SIKV_KERNEL, "odd_status"); }),
            "internal error in kernel 'odd_status' (ref) 1.2.3: status 5, which the ABI does not "
            "have; please report this to its author");
}

}  // namespace
}  // namespace sikv
