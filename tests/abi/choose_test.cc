// Which variant runs: probes, forcing, and what is said about plugins that were refused.
#include <gtest/gtest.h>

#include <algorithm>
#include <cstdlib>
#include <filesystem>
#include <string>

#include "framework/base/error.h"
#include "framework/config/config.h"
#include "framework/config/test_registry.h"
#include "framework/registry/registry.h"

namespace sikv {
namespace {

const std::filesystem::path kLibraries = SIKV_TOY_LIBRARIES;

sikv_device cpu_device(int threads = 2) {
  sikv_device device{};
  device.struct_size = sizeof device;
  device.type = SIKV_CPU;
  device.num_threads = threads;
  return device;
}

class ChooseTest : public testing::Test {
 protected:
  ChooseTest() {
    registry_.add_library(kLibraries / "libsikv-selector-good-cpu.so");
    registry_.add_library(kLibraries / "libsikv-kernel-toy-cpu.so");
    registry_.add_library(wrong_major_);
  }
  std::string error_of(sikv_kind kind, const std::string& id, const sikv_device& device,
                       const std::string& forced = {}) {
    try {
      return "chose " + registry_.choose(kind, id, device, forced).variant;
    } catch (const Error& error) {
      return error.what();
    }
  }

  const std::filesystem::path wrong_major_ = kLibraries / "libsikv-kernel-wrong_major-cpu.so";
  const std::string refusal_ =
      "kernel 'wrong_major' cannot be used; '" + wrong_major_.string() +
      "' was refused: it was built against ABI 2.3, this sikv speaks ABI 1.5; rebuild it against "
      "ABI 1.5";
  Registry registry_;
};

TEST_F(ChooseTest, TheHighestScoreWins) {
  EXPECT_EQ(registry_.choose(SIKV_SELECTOR, "good", cpu_device()).variant, "cpu");
  EXPECT_EQ(registry_.choose(SIKV_SELECTOR, "good", cpu_device(1000)).variant, "huge");
  EXPECT_EQ(registry_.choose(SIKV_SELECTOR, "good", cpu_device(), "ref").variant, "ref");
  EXPECT_EQ(registry_.choose(SIKV_SELECTOR, "good", cpu_device()).version, "2.0.0");
}

TEST_F(ChooseTest, CandidatesComeBestFirst) {
  const std::vector<Candidate> found = registry_.candidates(SIKV_SELECTOR, "good", cpu_device());
  ASSERT_EQ(found.size(), 3u);
  EXPECT_EQ(found[0].variant->variant, "cpu");
  EXPECT_EQ(found[0].score, 10);
  EXPECT_EQ(found[1].variant->variant, "ref");
  EXPECT_EQ(found[1].score, 1);
  EXPECT_EQ(found[2].variant->variant, "huge");
  EXPECT_EQ(found[2].score, 0);
  EXPECT_EQ(found[2].reason, "it needs 1000 threads");
}

TEST_F(ChooseTest, AForcedVariantMustRun) {
  EXPECT_EQ(error_of(SIKV_SELECTOR, "good", cpu_device(), "huge"),
            "selector 'good' (huge) is forced but cannot run: it needs 1000 threads");
  EXPECT_EQ(error_of(SIKV_SELECTOR, "good", cpu_device(), "cuda"),
            "selector 'good' has no variant 'cuda'; it has ref, cpu, huge");
  EXPECT_EQ(error_of(SIKV_SELECTOR, "goood", cpu_device(), "ref"),
            "there is no selector 'goood'; did you mean 'good'?");
}

TEST_F(ChooseTest, AVariantRunsOnItsOwnDeviceOnly) {
  sikv_device device = cpu_device();
  device.type = SIKV_CUDA;
  EXPECT_EQ(error_of(SIKV_KERNEL, "toy", device),
            "no variant of kernel 'toy' can run here: ref: it runs on the CPU, the pipeline on "
            "CUDA");
  EXPECT_EQ(error_of(SIKV_KERNEL, "toy", device, "ref"),
            "kernel 'toy' (ref) is forced but cannot run: it runs on the CPU, the pipeline on "
            "CUDA");
}

TEST_F(ChooseTest, RepeatsTheSentenceOfARefusal) {
  EXPECT_EQ(error_of(SIKV_KERNEL, "wrong_major", cpu_device()), refusal_);
  // The file name says kernel, so a selector of that name is just unknown.
  EXPECT_EQ(error_of(SIKV_SELECTOR, "wrong_major", cpu_device()),
            "there is no selector 'wrong_major'; there are good; --plugin-path DIR adds those of a "
            "folder");
  EXPECT_EQ(error_of(SIKV_KEY_CODEC, "sign_vq", cpu_device()),
            "there is no key codec 'sign_vq', nor any other: add the folder of the plugins to "
            "SIKV_PLUGIN_PATH");
}

TEST_F(ChooseTest, AConfigThatNamesARefusedPluginRepeatsTheSentence) {
  Registry registry = test_registry();
  registry.add_library(wrong_major_);
  try {
    parse_config(
        "source: {synthetic: }\nmodel: qwen3-8b\n"
        "pipeline: sign_vq+intq > full > wrong_major\n",
        "c.yaml", {}, registry);
    FAIL();
  } catch (const Error& error) {
    EXPECT_EQ(error.what(), "c.yaml:3:11: column 23: " + refusal_);
  }
}

TEST(Standard, ReadsThePluginPath) {
  ASSERT_EQ(setenv("SIKV_PLUGIN_PATH", (":" + kLibraries.string() + "::").c_str(), 1), 0);
  const Registry registry = Registry::standard();
  unsetenv("SIKV_PLUGIN_PATH");
  const std::vector<std::string> ids = registry.ids(SIKV_SELECTOR);
  EXPECT_NE(std::find(ids.begin(), ids.end(), "good"), ids.end());

  const std::vector<std::filesystem::path> extra = {"no/such/folder"};
  EXPECT_THROW(Registry::standard(extra), Error);
}

}  // namespace
}  // namespace sikv
