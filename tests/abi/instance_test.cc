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
  }
  template <typename T>
  T make(sikv_kind kind, const char* id,
         const std::vector<std::pair<std::string, std::string>>& given = {}) {
    const Variant& variant = registry_.find(kind, id, "ref");
    return T(variant, OptionSet::parse(variant.options, given, id), shape_, device_, host_);
  }

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

TEST_F(InstanceTest, StatusesThatTheAbiDoesNotHaveAreBugsOfThePlugin) {
  EXPECT_EQ(thrown<InternalError>([&] { make<KernelInstance>(SIKV_KERNEL, "odd_status"); }),
            "internal error in kernel 'odd_status' (ref) 1.2.3: status 5, which the ABI does not "
            "have; please report this to its author");
}

}  // namespace
}  // namespace sikv
