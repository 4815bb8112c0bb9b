// Plugins of the build tree, as tests use them.
#ifndef SIKV_TESTS_SUPPORT_PLUGINS_H_
#define SIKV_TESTS_SUPPORT_PLUGINS_H_

#include <memory>
#include <ostream>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "framework/device/device.h"
#include "framework/registry/instance.h"

namespace sikv::testing {

// Name and text of each option that is not left at its default. Of a wrapper also {"base", id},
// without which it gets the first base it takes, and {"base.<name>", text} for options of its base.
using Choices = std::vector<std::pair<std::string, std::string>>;

// Every library in the build tree's plugin folder.
const Registry& registry();

// A CPU with `threads` workers (1 or 3), shared by all tests of the process.
Device& cpu(int threads = 1);
// GPU 0, shared too; only if nothing is missing.
Device& gpu();
// Empty, or why this machine or build has no GPU to test on.
const std::string& gpu_missing();
// The GPU for CUDA variants, else cpu(threads).
Device& device_of(const Variant& variant, int threads = 1);

// One layer; room for 8 sequences of 1 << 20 tokens.
sikv_shape make_shape(int head_dim, int32_t dtype, int num_kv_heads = 2, int group = 1);

// The only way tests make instances: options are parsed as a config's would be.
template <typename Instance>
Instance make_instance(const Variant& variant, const Choices& choices, const sikv_shape& shape,
                       Device& device) {
  const OptionSet options = OptionSet::parse(variant.options, choices, variant.id);
  return Instance(variant, options, shape, device.info(), device.host());
}
template <typename Instance>
Instance make_instance(const Variant& variant, const Choices& choices, const sikv_shape& shape) {
  return make_instance<Instance>(variant, choices, shape, device_of(variant));
}

// The options of a wrapper itself, with the id of its base; of other plugins `choices` as they are.
Choices own_choices(const Variant& variant, const Choices& choices);
// What a wrapper with these choices is to wrap, its variant chosen by probe; null for others.
std::unique_ptr<SelectorInstance> make_base(const Variant& variant, const Choices& choices,
                                            const sikv_shape& shape, Device& device);
// An instance of a selector with its base.
SelectorInstance make_selector(const Variant& variant, const Choices& choices,
                               const sikv_shape& shape, Device& device);

// By name; `variant` must exist.
const Variant& find_variant(sikv_kind kind, std::string_view id, std::string_view variant = "ref");
// The cuda variant, or null if there is none that runs here.
const Variant* find_gpu_variant(sikv_kind kind, std::string_view id);

// A variant that tests run over; one that cannot run here says why: a CUDA variant without a GPU, a
// wrapper without any selector in this build that it would wrap.
struct Subject {
  sikv_kind kind;
  std::string id, variant;  // `cuda` for a library that was refused
  const Variant* found;     // null if it cannot run
  std::string reason;
  bool wraps_nothing = false;

  friend void PrintTo(const Subject& subject, std::ostream* out) {
    *out << subject.id << ' ' << subject.variant;
  }
};
// Every variant of a kind in the build tree, CUDA libraries that were refused included.
std::vector<Subject> subjects(sikv_kind kind);

inline CodecInstance make_codec(sikv_kind kind, std::string_view id, const Choices& choices,
                                const sikv_shape& shape, Device& device = cpu(),
                                std::string_view variant = "ref") {
  return make_instance<CodecInstance>(find_variant(kind, id, variant), choices, shape, device);
}

// Every combination of the values of the options that have `choices`; other options stay at their
// defaults.
std::vector<Choices> all_choices(const Variant& variant);
// The defaults, then each other value of each of these options alone.
std::vector<Choices> single_choices(const Variant& variant);

// sign_vq(magnitude_bits=2,center=mean), for failure messages and tables.
std::string describe(std::string_view id, const Choices& choices);

}  // namespace sikv::testing

#endif  // SIKV_TESTS_SUPPORT_PLUGINS_H_
