// Check, then time: the selection of one layer's step, 8 KV heads of 4 query heads, D = 128.
//
//   self_index_bench [--tokens=N] [--threads=N] [Google Benchmark's own flags]
//
// The caches of two layers are used in turn, so that none finds its planes in the processor's cache
// (at 128K tokens a layer's index planes are 16 MiB, what rerank picks from is 32 MiB more). Time
// is of one layer; CPU adds up all workers, as do the counters, in milliseconds. scans is per row.

#include <benchmark/benchmark.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <iterator>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "framework/base/random.h"
#include "framework/device/device.h"
#include "tests/support/counters.h"
#include "tests/support/plugins.h"
#include "tests/support/test_cache.h"

namespace sikv::testing {
namespace {

constexpr int kHeads = 8, kGroup = 4, kDim = 128, kPinned = 64, kTail = 100;
constexpr int kChunk = 4096;  // tokens encoded at a time

int tokens = 128 * 1024;
int threads = 2;

sikv_shape shape() {
  sikv_shape shape = make_shape(kDim, SIKV_FP16, kHeads, kGroup);
  shape.max_sequences = 1;
  shape.max_tokens = tokens + 256;
  return shape;
}

// One layer of gaussian keys.
class Layer {
 public:
  explicit Layer(uint64_t seed)
      : key_(make_codec(SIKV_KEY_CODEC, "rot_lm", {}, shape())),
        value_(make_codec(SIKV_VALUE_CODEC, "rot_lm", {}, shape())),
        cache_({.num_kv_heads = kHeads,
                .head_dim = kDim,
                .encoded = {tokens},
                .tail = {kTail},
                .pinned = kPinned,
                .seed = seed},
               key_.describe(), value_.describe()) {
    cache_.attach(key_, value_);
    TestRows rows({kChunk}, kHeads, kDim, SIKV_FP16);
    std::vector<uint8_t> workspace(key_.workspace_bytes());
    for (int first = 0; first < tokens; first += kChunk) {
      rows.fill(Pattern::kGaussian, derive_seed(seed, first));
      const RowsPart part = rows.all();
      const std::vector<int32_t> slots(kHeads, first);
      if (first == 0) key_.fit(part.rows, cache_.view(), workspace.data(), nullptr);
      key_.encode(part.rows, slots.data(), cache_.view(), workspace.data(), nullptr);
    }
    zero_exact();
  }

  const sikv_cache_view& view() const { return cache_.view(); }

 private:
  // Pinned copies and tail only take part in the normalisation.
  void zero_exact() {
    const sikv_cache_view& view = cache_.view();
    std::memset(const_cast<void*>(view.tail_k), 0, size_t{2} * view.tail_capacity * kHeads * kDim);
    std::memset(const_cast<void*>(view.pinned_k), 0, size_t{2} * kHeads * kPinned * kDim);
  }

  CodecInstance key_, value_;
  TestCache cache_;
};

const std::vector<std::unique_ptr<Layer>>& layers() {
  static const auto* made = [] {
    auto* layers = new std::vector<std::unique_ptr<Layer>>();
    for (uint64_t seed : {1, 2}) layers->push_back(std::make_unique<Layer>(seed));
    return layers;
  }();
  return *made;
}

// A selector with its workspace and output.
class Stepper {
 public:
  Stepper(std::string_view variant, const Choices& choices, Device& device)
      : selector_(make_instance<SelectorInstance>(
            find_variant(SIKV_SELECTOR, "self_index", variant), choices, two_layers(), device)),
        plan_(selector_.plan()),
        workspace_(device, plan_.workspace_bytes),
        slots_(size_t{kHeads} * plan_.capacity),
        counts_(kHeads) {
    Random random(7);
    for (auto& q : queries_) {
      q.resize(size_t{kHeads} * kGroup * kDim);
      for (uint16_t& x : q) x = sikv_float_to_fp16(static_cast<float>(random.normal()));
    }
  }

  // The layers' runs in the order of decoding: run i is of step i / 2.
  void next() {
    const size_t layer = runs_ % layers().size(), number = runs_ / layers().size();
    ++runs_;
    if (layer == 0) selector_.begin_step(static_cast<int64_t>(number));
    sikv_cache_view view = layers()[layer]->view();
    view.layer = static_cast<int32_t>(layer);
    selector_.run({.struct_size = sizeof(sikv_select_args),
                   .num_query_heads = kHeads * kGroup,
                   .view = &view,
                   .q = queries_[number % queries_.size()].data(),
                   .scale = 0.088388f,
                   .reserved = 0,
                   .selection = {slots_.data(), counts_.data(), plan_.capacity, 0},
                   .log_weights = nullptr},
                  workspace_.as(), nullptr);
  }

  std::vector<int32_t> selected() const { return slots_; }
  double counter(const std::string& name) const { return testing::counters_of(selector_).at(name); }

 private:
  static sikv_shape two_layers() {
    sikv_shape shape = testing::shape();
    shape.num_layers = 2;
    return shape;
  }

  SelectorInstance selector_;
  SelectorInstance::Plan plan_;
  DeviceBuffer workspace_;
  std::vector<int32_t> slots_, counts_;
  std::array<std::vector<uint16_t>, 16> queries_;  // [Hq, D] each
  size_t runs_ = 0;
};

// Slots that both chose, as a share.
double overlap(const std::vector<int32_t>& a, const std::vector<int32_t>& b) {
  size_t both = 0;
  for (size_t row = 0, n = a.size() / kHeads; row < kHeads; ++row) {
    std::vector<int32_t> common;
    std::set_intersection(a.begin() + row * n, a.begin() + (row + 1) * n, b.begin() + row * n,
                          b.begin() + (row + 1) * n, std::back_inserter(common));
    both += common.size();
  }
  return static_cast<double>(both) / static_cast<double>(a.size());
}

void run(benchmark::State& state, const Choices& choices) {
  static Device* device = open_cpu_device(threads).release();
  Stepper cpu("cpu", choices, *device);
  {
    Stepper ref("ref", choices, *device);
    ref.next();
    cpu.next();
    // Reranked candidates may change places at the cut where probabilities agree to rounding.
    if (overlap(ref.selected(), cpu.selected()) < 0.9999) {
      state.SkipWithError("cpu and ref select different slots");
      return;
    }
  }
  const char* parts[] = {"table_s", "scan_s", "pack_s", "rerank_s"};
  const double rows_before = cpu.counter("rows"), scans_before = cpu.counter("scans");
  double before[std::size(parts)];
  for (size_t i = 0; i < std::size(parts); ++i) before[i] = cpu.counter(parts[i]);
  for (auto _ : state) cpu.next();
  const double rows = cpu.counter("rows") - rows_before;
  for (size_t i = 0; i < std::size(parts); ++i) {
    state.counters[parts[i]] = 1e3 * kHeads * (cpu.counter(parts[i]) - before[i]) / rows;
  }
  state.counters["scans"] = (cpu.counter("scans") - scans_before) / rows;
}

void register_all() {
  const struct {
    const char* name;
    Choices choices;
  } cases[] = {
      {"scan/6bit", {{"tables", "6bit"}}},
      {"scan/exact", {}},
      {"scan/6bit/norm", {{"tables", "6bit"}, {"weighting", "norm"}}},
      {"rerank4/6bit", {{"tables", "6bit"}, {"rerank", "4"}}},
      {"rerank4/6bit/every4", {{"tables", "6bit"}, {"rerank", "4"}, {"scan_every", "4"}}},
  };
  for (const auto& c : cases) {
    benchmark::RegisterBenchmark(c.name, [=](benchmark::State& state) { run(state, c.choices); })
        ->Unit(benchmark::kMillisecond)
        ->MeasureProcessCPUTime()
        ->UseRealTime();
  }
}

}  // namespace
}  // namespace sikv::testing

int main(int argc, char** argv) {
  benchmark::Initialize(&argc, argv);
  for (int i = 1; i < argc; ++i) {
    const std::string_view flag(argv[i]);
    if (flag.starts_with("--tokens=")) sikv::testing::tokens = std::stoi(argv[i] + 9);
    if (flag.starts_with("--threads=")) sikv::testing::threads = std::stoi(argv[i] + 10);
  }
  sikv::testing::register_all();
  benchmark::RunSpecifiedBenchmarks();
  return 0;
}
