#include "framework/config/test_registry.h"

#include <cstring>
#include <span>
#include <string>

namespace sikv {
namespace {

constexpr sikv_option_spec kSignVq[] = {
    {"magnitude_bits", SIKV_OPTION_INT, 0, 0, 0, "1|2|4|8", "2", "bits of a magnitude"},
    {"scale_group", SIKV_OPTION_INT, 0, 16, 128, nullptr, "32", "channels that share a scale"},
};
constexpr sikv_option_spec kIntq[] = {
    {"bits", SIKV_OPTION_INT, 0, 2, 8, nullptr, "2", "bits of a value"},
};
constexpr sikv_option_spec kRotLm[] = {
    {"bits", SIKV_OPTION_INT, 0, 2, 4, nullptr, "3", "bits of a channel"},
};
constexpr sikv_option_spec kSelfIndex[] = {
    {"budget", SIKV_OPTION_BUDGET, 0, 0, 0, nullptr, "256", "tokens to select"},
    {"rerank", SIKV_OPTION_INT, 0, 0, 16, nullptr, "0", "candidates per selected token"},
    {"threshold", SIKV_OPTION_FLOAT, 0, 0, 1, nullptr, "0.5", "least score"},
    {"schedule", SIKV_OPTION_CHOICE, 0, 0, 0, "auto|1|2", "auto", "steps between scans"},
};
constexpr sikv_option_spec kTopP[] = {
    {"p", SIKV_OPTION_FLOAT, 0, 0, 1, nullptr, "0.9", "mass to keep"},
    {"base", SIKV_OPTION_SELECTOR, 0, 0, 0, nullptr, "", "what is pruned"},
    {"table", SIKV_OPTION_TEXT, 0, 0, 0, nullptr, "", "a file"},
};
constexpr sikv_option_spec kSplit[] = {
    {"base", SIKV_OPTION_SELECTOR, 0, 0, 0, nullptr, "", "whose budget is split"},
};
constexpr sikv_option_spec kSparseFlash[] = {
    {"fast", SIKV_OPTION_BOOL, 0, 0, 1, nullptr, "true", "approximate exponentials"},
};

int32_t probe(const sikv_device*, sikv_message*) { return 1; }
int32_t create(const sikv_create_args*, void**, sikv_message*) { return SIKV_INTERNAL; }
void destroy(void*) {}
// One body for all slots that nobody calls.
template <typename... Args>
int32_t unused(Args...) {
  return SIKV_INTERNAL;
}
uint64_t state_bytes(void*) { return 0; }

constexpr sikv_codec_table kCodec = {
    sizeof(sikv_codec_table), 0, probe, create, destroy, unused, unused, unused, unused, unused};
constexpr sikv_selector_table kSelector = {sizeof(sikv_selector_table),
                                           0,
                                           probe,
                                           create,
                                           destroy,
                                           unused,
                                           unused,
                                           unused,
                                           unused,
                                           unused,
                                           unused,
                                           unused,
                                           state_bytes,
                                           nullptr,
                                           nullptr,
                                           nullptr};
constexpr sikv_kernel_table kKernel = {
    sizeof(sikv_kernel_table), 0, probe, create, destroy, unused, unused, unused, nullptr};

constexpr sikv_plugin_entry kSignVqEntries[] = {
    {SIKV_KEY_CODEC, 0, "ref", kSignVq, std::size(kSignVq), &kCodec}};
constexpr sikv_plugin_entry kIntqEntries[] = {
    {SIKV_VALUE_CODEC, 0, "ref", kIntq, std::size(kIntq), &kCodec}};
constexpr sikv_plugin_entry kRotLmEntries[] = {
    {SIKV_KEY_CODEC, 0, "ref", kRotLm, std::size(kRotLm), &kCodec},
    {SIKV_VALUE_CODEC, 0, "ref", kRotLm, std::size(kRotLm), &kCodec}};
constexpr sikv_plugin_entry kSelfIndexEntries[] = {
    {SIKV_SELECTOR, 0, "ref", kSelfIndex, std::size(kSelfIndex), &kSelector},
    {SIKV_SELECTOR, 0, "cpu", kSelfIndex, std::size(kSelfIndex), &kSelector}};
constexpr sikv_plugin_entry kTopPEntries[] = {
    {SIKV_SELECTOR, 0, "ref", kTopP, std::size(kTopP), &kSelector}};
constexpr sikv_plugin_entry kSplitEntries[] = {
    {SIKV_SELECTOR, 0, "ref", kSplit, std::size(kSplit), &kSelector}};
constexpr sikv_plugin_entry kFullEntries[] = {{SIKV_SELECTOR, 0, "ref", nullptr, 0, &kSelector}};
constexpr sikv_plugin_entry kSparseFlashEntries[] = {
    {SIKV_KERNEL, 0, "ref", kSparseFlash, std::size(kSparseFlash), &kKernel},
    {SIKV_KERNEL, 0, "cpu", kSparseFlash, std::size(kSparseFlash), &kKernel}};

void add(Registry& registry, const char* id, std::span<const sikv_plugin_entry> entries) {
  sikv_plugin_descriptor_t descriptor{};
  std::memcpy(descriptor.magic, SIKV_PLUGIN_MAGIC, sizeof descriptor.magic);
  descriptor.struct_size = sizeof descriptor;
  descriptor.abi_major = SIKV_ABI_MAJOR;
  descriptor.abi_minor = SIKV_ABI_MINOR;
  descriptor.device = SIKV_CPU;
  std::strncpy(descriptor.id, id, sizeof descriptor.id - 1);
  for (const sikv_plugin_entry& entry : entries) descriptor.kinds |= SIKV_KIND_BIT(entry.kind);
  const sikv_plugin_tables_t tables = {sizeof tables, static_cast<uint32_t>(entries.size()),
                                       entries.data()};
  registry.add_linked(std::string("linked/") + id, descriptor, &tables);
}

}  // namespace

Registry test_registry() {
  Registry registry;
  add(registry, "sign_vq", kSignVqEntries);
  add(registry, "intq", kIntqEntries);
  add(registry, "rot_lm", kRotLmEntries);
  add(registry, "self_index", kSelfIndexEntries);
  add(registry, "full", kFullEntries);
  add(registry, "top_p", kTopPEntries);
  add(registry, "split", kSplitEntries);
  add(registry, "sparse_flash", kSparseFlashEntries);
  return registry;
}

}  // namespace sikv
