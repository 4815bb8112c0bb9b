// Time of one step's selection of selectors that keep something of every key, ref against cpu: 16384
// encoded tokens of 2 KV heads with 4 query heads each, D = 128, fp16, one thread, 384 to select.
//
//   key_selector_bench [Google Benchmark's flags, such as --benchmark_enable_random_interleaving]

#include <benchmark/benchmark.h>

#include <memory>
#include <string>

#include "tests/support/selector_session.h"

namespace sikv::testing {
namespace {

constexpr int kGroup = 4;

void select_step(benchmark::State& state, const std::string& id, const std::string& variant) {
  static const CacheSpec spec{.head_dim = 128, .encoded = {16384}, .tail = {100}, .pinned = 16};
  static const sikv_shape shape = tight_shape(spec, kGroup);
  static const FilledCache filled(spec, make_codec(SIKV_KEY_CODEC, "fp16", {}, shape),
                                  make_codec(SIKV_VALUE_CODEC, "fp16", {}, shape));
  SelectorSession session(find_variant(SIKV_SELECTOR, id, variant), {{"budget", "384"}}, filled,
                          kGroup);
  session.observe_everything();
  const std::vector<uint8_t> q = gaussian_queries(spec, kGroup, 1, 7);
  session.begin_step(0);
  DeviceCall call(cpu());
  const SelectorSession::Placed placed = session.place(call, q);
  for (auto _ : state) session.run(placed, call);
  call.finish();
}

}  // namespace
}  // namespace sikv::testing

int main(int argc, char** argv) {
  benchmark::Initialize(&argc, argv);
  for (const std::string id : {"loki", "double_sparsity", "sparq", "pqcache"}) {
    for (const std::string variant : {"ref", "cpu"}) {
      benchmark::RegisterBenchmark((id + "/" + variant).c_str(), [=](benchmark::State& state) {
        sikv::testing::select_step(state, id, variant);
      })->Unit(benchmark::kMicrosecond);
    }
  }
  benchmark::RunSpecifiedBenchmarks();
}
