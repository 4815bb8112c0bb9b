// Libraries built bad on purpose: the test is the sentence they are refused with.
#include <gtest/gtest.h>

#include <filesystem>
#include <fstream>
#include <iterator>
#include <string>

#include "framework/base/error.h"
#include "framework/registry/registry.h"
#include "tests/support/temporary.h"

namespace sikv {
namespace {

namespace fs = std::filesystem;

const fs::path kLibraries = SIKV_TOY_LIBRARIES;

fs::path toy(const std::string& id) { return kLibraries / ("libsikv-kernel-" + id + "-cpu.so"); }

// The one refusal of a registry that was given `path` alone.
RefusedLibrary refusal(const fs::path& path) {
  Registry registry;
  registry.add_library(path);
  EXPECT_TRUE(registry.variants().empty());
  EXPECT_EQ(registry.refused().size(), 1u);
  if (registry.refused().empty()) return {};
  EXPECT_EQ(registry.refused()[0].path, path);
  return registry.refused()[0];
}
std::string reason(const std::string& id) {
  const RefusedLibrary refused = refusal(toy(id));
  EXPECT_EQ(refused.id, id);
  return refused.reason;
}

class FolderTest : public testing::Test {
 protected:
  TemporaryFolder folder_;
};

TEST(Refusal, OfADescriptor) {
  EXPECT_EQ(reason("wrong_magic"),
            "its descriptor starts with 'ELSEWHER', expected 'SIKVPLUG'; rebuild it against ABI "
            "1.5");
  EXPECT_EQ(reason("wrong_major"),
            "it was built against ABI 2.3, this sikv speaks ABI 1.5; rebuild it against ABI 1.5");
  EXPECT_EQ(
      reason("newer_minor"),
      "it was built against ABI 1.99, this sikv speaks ABI 1.5; rebuild it against ABI 1.5 or "
      "use a newer sikv");
  EXPECT_EQ(reason("short_descriptor"),
            "its descriptor has 196 bytes, ABI 1.5 needs 200; rebuild it against ABI 1.5");
  EXPECT_EQ(reason("unknown_kind"),
            "its descriptor names the kinds 0x40, this sikv knows 0x1e (key codec, value codec, "
            "selector, kernel); rebuild it against ABI 1.5");
  EXPECT_EQ(reason("no_kind"),
            "its descriptor names the kinds 0x0, this sikv knows 0x1e (key codec, value codec, "
            "selector, kernel); rebuild it against ABI 1.5");
  EXPECT_EQ(reason("for_cuda"),
            "it runs on CUDA and this host has no CUDA device; use the plugin's cpu library here");
}

TEST(Refusal, OfMissingSymbols) {
  EXPECT_EQ(reason("no_descriptor"),
            "it does not export 'sikv_plugin_descriptor'; register the plugin with SIKV_PLUGIN and "
            "rebuild it against ABI 1.5");
  EXPECT_EQ(reason("no_tables"),
            "it does not export 'sikv_plugin_tables'; register the plugin with SIKV_PLUGIN and "
            "rebuild it against ABI 1.5");
  const std::string text = reason("unresolved");
  EXPECT_TRUE(text.starts_with("it cannot be opened: ")) << text;
  EXPECT_NE(text.find("undefined symbol: function_that_nobody_has; install what it needs or "
                      "rebuild it here"),
            std::string::npos)
      << text;
}

TEST(Refusal, OfTables) {
  EXPECT_EQ(reason("foreign_entry"),
            "entry 0 is of kind selector, its descriptor names only kernel; add the kind there");
  EXPECT_EQ(reason("unknown_entry"),
            "entry 0 is of kind 77, its descriptor names only kernel; add the kind there");
  EXPECT_EQ(reason("promised_kind"),
            "its descriptor names selector, for which it has no entry; remove the kind there");
  EXPECT_EQ(reason("short_table"),
            "its kernel 'short_table' (ref) has a table of 56 bytes, ABI 1.5 needs 64; rebuild it "
            "against ABI 1.5");
  EXPECT_EQ(reason("null_slot"), "its kernel 'null_slot' (ref) leaves 'run' NULL; implement it");
  EXPECT_EQ(reason("bad_default"),
            "its kernel 'bad_default' (ref) has an option 'split' with the empty range 1 to 0; "
            "exchange its bounds");
}

TEST_F(FolderTest, OfWhatIsNoLibrary) {
  const fs::path text = folder_ / "libsikv-selector-notes-cpu.so";
  std::ofstream(text) << "not a library\n";
  EXPECT_EQ(refusal(text).reason,
            "it is not a shared library: the file does not start with the ELF signature; remove it "
            "from the plugin folder");
  EXPECT_EQ(refusal(text).id, "notes");
  EXPECT_EQ(refusal(folder_ / "libmissing.so").reason, "it cannot be read; check its permissions");
}

TEST_F(FolderTest, OfTruncatedLibrariesOfAnyLength) {
  std::ifstream stream(toy("toy"), std::ios::binary);
  const std::string bytes{std::istreambuf_iterator<char>(stream), std::istreambuf_iterator<char>()};
  ASSERT_GT(bytes.size(), 1000u);
  for (const size_t size : {size_t{0}, size_t{3}, size_t{4}, size_t{63}, size_t{64}, size_t{500},
                            bytes.size() / 2, bytes.size() - 1}) {
    const fs::path path = folder_ / ("libcut" + std::to_string(size) + ".so");
    std::ofstream(path, std::ios::binary).write(bytes.data(), static_cast<std::streamsize>(size));
    const std::string text = refusal(path).reason;
    EXPECT_EQ(text, size < 4
                        ? "it is not a shared library: the file does not start with the ELF "
                          "signature; remove it from the plugin folder"
                        : "it is truncated or damaged: its tables point past the " +
                              std::to_string(size) + " bytes of the file; copy or build it again");
  }
}

TEST_F(FolderTest, OfTheSamePluginTwice) {
  const fs::path copy = folder_ / "libcopy.so";
  fs::copy_file(toy("toy"), copy);
  Registry registry;
  registry.add_library(toy("toy"));
  registry.add_library(copy);
  registry.add_library(kLibraries / "other" / "libother_options.so");
  EXPECT_EQ(registry.variants().size(), 1u);
  ASSERT_EQ(registry.refused().size(), 2u);
  EXPECT_EQ(registry.refused()[0].reason, "its kernel 'toy' (ref) is already there, from '" +
                                              toy("toy").string() + "'; remove '" + copy.string() +
                                              "' or the other");
  EXPECT_EQ(registry.refused()[1].reason,
            "its kernel 'toy' (other) takes other options than variant 'ref' in '" +
                toy("toy").string() + "'; build both from the same version");
}

TEST_F(FolderTest, AFileIsReadOnce) {
  fs::create_symlink(toy("toy"), folder_ / "liblink.so");
  fs::create_symlink(toy("null_slot"), folder_ / "libnull.so");
  Registry registry;
  registry.add_library(toy("toy"));
  registry.add_library(toy("null_slot"));
  registry.add_folder(folder_);
  registry.add_folder(folder_);
  EXPECT_EQ(registry.variants().size(), 1u);
  EXPECT_EQ(registry.refused().size(), 1u);
}

TEST(Refusal, TheProcessLivesOn) {
  Registry registry;
  registry.add_folder(kLibraries);
  EXPECT_EQ(registry.ids(SIKV_KERNEL), (std::vector<std::string>{"odd_status", "toy"}));
  EXPECT_EQ(registry.ids(SIKV_SELECTOR),
            (std::vector<std::string>{"evicting", "good", "old", "wrapping"}));
  EXPECT_EQ(registry.refused().size(), 16u);
  for (const RefusedLibrary& refused : registry.refused()) EXPECT_FALSE(refused.reason.empty());
}

TEST(Refusal, OfAMissingFolderIsAnError) {
  Registry registry;
  try {
    registry.add_folder("no/such/folder");
    FAIL();
  } catch (const Error& error) {
    EXPECT_STREQ(error.what(),
                 "the plugin folder 'no/such/folder' cannot be read: No such file or directory; "
                 "correct the path");
  }
}

}  // namespace
}  // namespace sikv
