#include "framework/registry/judge.h"

#include <gtest/gtest.h>

#include <array>
#include <cstddef>
#include <cstring>
#include <vector>

#include "framework/base/error.h"

namespace sikv {
namespace {

sikv_plugin_descriptor_t good_descriptor() {
  sikv_plugin_descriptor_t d{};
  std::memcpy(d.magic, SIKV_PLUGIN_MAGIC, sizeof d.magic);
  d.struct_size = sizeof d;
  d.abi_major = SIKV_ABI_MAJOR;
  d.abi_minor = SIKV_ABI_MINOR;
  d.kinds = SIKV_KIND_BIT(SIKV_KERNEL);
  d.device = SIKV_CPU;
  std::strcpy(d.id, "toy");
  return d;
}

template <typename Body>
std::string error_of(Body&& body) {
  try {
    body();
  } catch (const Error& error) {
    return error.what();
  }
  return "passed";
}

std::string descriptor_error(const sikv_plugin_descriptor_t& d) {
  return error_of(
      [&] { judge_descriptor(read_descriptor(std::as_bytes(std::span(&d, 1))), cpu_only); });
}

TEST(JudgeDescriptor, PassesAGoodOne) { EXPECT_EQ(descriptor_error(good_descriptor()), "passed"); }

TEST(JudgeDescriptor, RefusesTextsWithoutEnd) {
  sikv_plugin_descriptor_t d = good_descriptor();
  std::memset(d.version, 'x', sizeof d.version);
  EXPECT_EQ(descriptor_error(d),
            "its descriptor has a text of 16 bytes without an end; rebuild it against ABI 1.5");
}

// One of a plugin built before 1.5 ends ahead of them.
TEST(JudgeDescriptor, ReadsFasterPathsWhereTheyAre) {
  sikv_plugin_descriptor_t d = good_descriptor();
  std::strcpy(d.faster_paths, "sm_90 on: launches overlap");
  const auto read = [&] { return read_descriptor(std::as_bytes(std::span(&d, 1))); };
  EXPECT_STREQ(read().faster_paths, "sm_90 on: launches overlap");
  d.struct_size = offsetof(sikv_plugin_descriptor_t, faster_paths);
  EXPECT_STREQ(read().faster_paths, "");
}

TEST(JudgeDescriptor, RefusesBadIds) {
  sikv_plugin_descriptor_t d = good_descriptor();
  std::strcpy(d.id, "My\x01plugin");
  EXPECT_EQ(descriptor_error(d),
            "its id is 'My?plugin', expected lower-case letters, digits and '_'; rename it");
}

TEST(JudgeDescriptor, RefusesUnknownDevices) {
  sikv_plugin_descriptor_t d = good_descriptor();
  d.device = 7;
  EXPECT_EQ(descriptor_error(d),
            "its device is 7, this sikv knows 0 (cpu) and 1 (cuda); rebuild it against ABI 1.5");
}

TEST(JudgeDescriptor, AsksForTheDevice) {
  sikv_plugin_descriptor_t d = good_descriptor();
  d.device = SIKV_CUDA;
  EXPECT_EQ(descriptor_error(d),
            "it runs on CUDA and this host has no CUDA device; use the plugin's cpu library here");
  EXPECT_EQ(error_of([&] { judge_descriptor(d, [](sikv_device_type) { return ""; }); }), "passed");
}

TEST(ReadDescriptor, LooksAtNoByteBeyondItsEnd) {
  const sikv_plugin_descriptor_t d = good_descriptor();
  const auto bytes = std::as_bytes(std::span(&d, 1));
  constexpr size_t kNeeded = offsetof(sikv_plugin_descriptor_t, faster_paths);  // all of 1.0
  for (size_t size = 0; size <= sizeof d; ++size) {
    const std::vector<std::byte> cut(bytes.begin(), bytes.begin() + static_cast<long>(size));
    EXPECT_EQ(error_of([&] { read_descriptor(cut); }) == "passed", size >= kNeeded) << size;
  }
}

TEST(ReadDescriptor, IgnoresWhatANewerHostWouldRead) {
  std::array<sikv_plugin_descriptor_t, 2> two = {good_descriptor(), good_descriptor()};
  two[0].struct_size = sizeof two;
  EXPECT_EQ(error_of([&] { read_descriptor(std::as_bytes(std::span(two))); }), "passed");
}

// ---- tables -------------------------------------------------------------------------------------

int32_t probe(const sikv_device*, sikv_message*) { return 1; }
int32_t create(const sikv_create_args*, void**, sikv_message*) { return SIKV_OK; }
void destroy(void*) {}
int32_t accepts(void*, const sikv_layout*, const sikv_layout*, sikv_message*) { return SIKV_OK; }
int32_t plan(void*, int32_t, uint64_t*, sikv_message*) { return SIKV_OK; }
int32_t run(void*, const sikv_attend_args*, void*, void*, sikv_message*) { return SIKV_OK; }
int32_t absorbs(void*, const char*, const sikv_option_value*, uint32_t, sikv_message*) {
  return SIKV_OK;
}

class JudgeTables : public testing::Test {
 protected:
  std::string error_with_option(const sikv_option_spec& option) {
    entry_.options = &option;
    entry_.num_options = 1;
    return error();
  }
  std::string error() {
    return error_of([&] { judge_tables(good_descriptor(), &tables_); });
  }

  sikv_kernel_table kernel_ = {sizeof kernel_, 0,    probe, create, destroy,
                               accepts,        plan, run,   absorbs};
  sikv_plugin_entry entry_ = {SIKV_KERNEL, 0, "ref", nullptr, 0, &kernel_};
  sikv_plugin_tables_t tables_ = {sizeof tables_, 1, &entry_};
};

TEST_F(JudgeTables, PassesGoodOnes) {
  EXPECT_EQ(error(), "passed");
  kernel_.absorbs = nullptr;
  EXPECT_EQ(error(), "passed");
}

TEST_F(JudgeTables, RefusesBadFrames) {
  EXPECT_EQ(error_of([&] { judge_tables(good_descriptor(), nullptr); }),
            "sikv_plugin_tables() returned NULL; rebuild it against ABI 1.5");
  tables_.num_entries = 0;
  EXPECT_EQ(error(),
            "it has 0 entries at an address, expected 1 to 64; rebuild it against ABI 1.5");
  tables_.struct_size = 8;
  EXPECT_EQ(error(),
            "its sikv_plugin_tables_t has 8 bytes, ABI 1.5 needs 16; rebuild it against ABI 1.5");
}

TEST_F(JudgeTables, RefusesBadEntries) {
  entry_.variant = "Ref";
  EXPECT_EQ(error(),
            "entry 0 has the variant 'Ref', expected ref, cpu, cuda or another name of lower-case "
            "letters; rename it");
  entry_.variant = "ref";
  entry_.table = nullptr;
  EXPECT_EQ(error(), "its kernel 'toy' (ref) has no table of functions; add it to the entry");
  const sikv_plugin_entry twice[2] = {{SIKV_KERNEL, 0, "ref", nullptr, 0, &kernel_},
                                      {SIKV_KERNEL, 0, "ref", nullptr, 0, &kernel_}};
  tables_.entries = twice;
  tables_.num_entries = 2;
  EXPECT_EQ(error(), "its kernel 'toy' (ref) is there twice; rename one");
}

TEST_F(JudgeTables, RefusesBadOptions) {
  const std::string head = "its kernel 'toy' (ref) has an option ";
  EXPECT_EQ(error_with_option({"Split", SIKV_OPTION_INT, 0, 0, 1, nullptr, "0", "h"}),
            head + "named 'Split', expected lower-case letters, digits and '_'; rename it");
  EXPECT_EQ(error_with_option({nullptr, SIKV_OPTION_INT, 0, 0, 1, nullptr, "0", "h"}),
            head + "named '', expected lower-case letters, digits and '_'; rename it");
  EXPECT_EQ(error_with_option({"kernel", SIKV_OPTION_INT, 0, 0, 1, nullptr, "0", "h"}),
            head + "named 'kernel', which configs use for something else; rename it");
  EXPECT_EQ(error_with_option({"n", 9, 0, 0, 1, nullptr, "0", "h"}),
            head + "'n' of type 9, expected 1 to 7; rebuild it against ABI 1.5");
  EXPECT_EQ(error_with_option({"n", SIKV_OPTION_CHOICE, 0, 0, 1, nullptr, "0", "h"}),
            head + "'n' with nothing to choose from; list its choices");
  EXPECT_EQ(error_with_option({"n", SIKV_OPTION_BOOL, 0, 0, 1, "a|b", "true", "h"}),
            head + "'n' with choices, which go with types int and choice only; remove them");
  EXPECT_EQ(error_with_option({"n", SIKV_OPTION_CHOICE, 0, 0, 1, "a|b,c", "a", "h"}),
            head +
                "'n' with the choice 'b,c'; give every choice a name without spaces, commas and "
                "parentheses");
  EXPECT_EQ(error_with_option({"n", SIKV_OPTION_INT, 0, 2, 1, nullptr, "0", "h"}),
            head + "'n' with the empty range 2 to 1; exchange its bounds");
  EXPECT_EQ(error_with_option({"n", SIKV_OPTION_INT, 0, 0, 1, nullptr, "0", nullptr}),
            head + "'n' without a help text of one line; add it");
  EXPECT_EQ(error_with_option({"n", SIKV_OPTION_INT, 0, 0, 1, nullptr, nullptr, "h"}),
            head + "'n' without a default; add it");
  EXPECT_EQ(error_with_option({"n", SIKV_OPTION_INT, 0, 0, 1, nullptr, "2", "h"}),
            head + "'n' with the default '2', expected an integer from 0 to 1; correct it");
}

TEST_F(JudgeTables, KnowsWhatABaseIs) {
  const std::string head = "its kernel 'toy' (ref) has an option ";
  EXPECT_EQ(error_with_option({"base", SIKV_OPTION_SELECTOR, 0, 0, 0, nullptr, "", "h"}),
            head + "'base' to wrap a selector, which only selectors do");
  EXPECT_EQ(
      error_with_option({"inner", SIKV_OPTION_SELECTOR, 0, 0, 0, nullptr, "", "h"}),
      head +
          "'inner' of type 6, but 'base' is what the option of type 6 is named, and no other; "
          "rename it");
  EXPECT_EQ(error_with_option({"base", SIKV_OPTION_INT, 0, 0, 1, nullptr, "0", "h"}),
            head +
                "'base' of type 1, but 'base' is what the option of type 6 is named, and no other; "
                "rename it");
  EXPECT_EQ(error_with_option({"file", SIKV_OPTION_TEXT, 0, 0, 0, nullptr, "", "h"}), "passed");
  EXPECT_EQ(
      error_with_option({"file", SIKV_OPTION_TEXT, 0, 0, 0, nullptr, "a\"b", "h"}),
      head +
          "'file' with the default 'a\"b', expected a text of one line without double quotes; "
          "correct it");
}

TEST_F(JudgeTables, SlotsBeyondThePluginsTableAreAbsent) {
  // As a plugin of an older minor would have it: its table ends before the last slot.
  kernel_.struct_size = offsetof(sikv_kernel_table, absorbs);
  EXPECT_EQ(full_table(entry_).kernel.absorbs, nullptr);
  EXPECT_EQ(full_table(entry_).kernel.run, run);
}

}  // namespace
}  // namespace sikv
