// How much faster a selector's SIMD variant chooses than its reference, as a ratio taken in one run.
//
//   sikv_selector_ratio ID [OPTION=VALUE ...] [tokens=N]
//
// One layer of 2 KV heads with 3 query heads each, D = 128, gaussian keys in fp16, one thread. The
// variants take turns; the least time of each counts. Of selectors that select all that they
// keep, it is the time of observe: what ranks the prompt.
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include "tests/support/selector_session.h"

namespace sikv::testing {
namespace {

constexpr int kGroup = 3, kTurns = 7;

void keep_least(double& best, std::chrono::steady_clock::time_point start) {
  const std::chrono::duration<double, std::micro> time = std::chrono::steady_clock::now() - start;
  best = std::min(best, time.count());
}

int run(const std::string& id, const Choices& choices, int tokens) {
  const CacheSpec spec{.num_kv_heads = 2, .head_dim = 128, .encoded = {tokens}, .pinned = 64};
  const sikv_shape shape = tight_shape(spec, kGroup);
  const FilledCache filled(spec, make_codec(SIKV_KEY_CODEC, "fp16", {}, shape),
                           make_codec(SIKV_VALUE_CODEC, "fp16", {}, shape));
  SelectorSession ref(find_variant(SIKV_SELECTOR, id, "ref"), choices, filled, kGroup);
  SelectorSession cpu(find_variant(SIKV_SELECTOR, id, "cpu"), choices, filled, kGroup);
  double best[2] = {1e30, 1e30};
  const bool by_prompt = (ref.selector().table().flags & SIKV_SELECTOR_SELECTS_ALL) != 0;
  for (int turn = 0; turn < (by_prompt ? kTurns : 1); ++turn) {
    for (SelectorSession* session : {&ref, &cpu}) {
      session->hidden_size = 2 * kGroup * 128;
      const auto start = std::chrono::steady_clock::now();
      session->observe_everything();
      if (by_prompt) keep_least(best[session == &cpu], start);
    }
  }
  for (int step = 0; step < (by_prompt ? 0 : kTurns); ++step) {
    for (SelectorSession* session : {&ref, &cpu}) {
      const std::vector<uint8_t> q = gaussian_queries(spec, kGroup, 1, static_cast<uint64_t>(step));
      session->begin_step(step);
      DeviceCall call(testing::cpu());
      const SelectorSession::Placed placed = session->place(call, q);
      const auto start = std::chrono::steady_clock::now();
      session->run(placed, call);
      keep_least(best[session == &cpu], start);
      call.finish();
      session->collect();
    }
  }
  std::printf("%s, %d tokens: ref %.0f us, cpu %.0f us, ratio %.1f\n", id.c_str(), tokens, best[0],
              best[1], best[0] / best[1]);
  return 0;
}

}  // namespace
}  // namespace sikv::testing

int main(int argc, char** argv) {
  if (argc < 2) {
    std::fprintf(stderr, "sikv_selector_ratio ID [OPTION=VALUE ...] [tokens=N]\n");
    return 2;
  }
  int tokens = 32768;
  sikv::testing::Choices choices;
  for (int i = 2; i < argc; ++i) {
    const std::string argument = argv[i];
    const size_t at = argument.find('=');
    const std::string name = argument.substr(0, at);
    const std::string value = at == std::string::npos ? "" : argument.substr(at + 1);
    if (name == "tokens") {
      tokens = std::atoi(value.c_str());
    } else {
      choices.emplace_back(name, value);
    }
  }
  return sikv::testing::run(argv[1], choices, tokens);
}
