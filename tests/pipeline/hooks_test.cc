// What ABI 1.3 asks of a pipeline: needs met or refused, evictions together, bases made and named.
#include <gtest/gtest.h>

#include <filesystem>
#include <functional>
#include <string>

#include "framework/base/error.h"
#include "framework/config/pipeline_text.h"
#include "framework/experiment/measure.h"
#include "framework/pipeline/pipeline.h"
#include "framework/trace/trace.h"
#include "plugins/sdk/plugin.h"
#include "tests/support/plugins.h"
#include "tests/support/temporary.h"

namespace sikv {
namespace {

using testing::cpu;

constexpr int kHeads = 1, kGroup = 2, kDim = 64, kHidden = 5;

// What the selectors of this file were asked, in order.
std::vector<std::string>& calls() {
  static std::vector<std::string> calls;
  return calls;
}

// Keeps slots 0 .. 9 and writes down what it is given.
class Noting : public ScoringSelector {
 public:
  Plan plan() override { return {300, 0}; }
  void observe(const sikv_observe_args& args, const CacheView& view, Launch) override {
    calls().push_back(fmt::format("observe {}: {} queries, w_o {} x {}", view.layer(),
                                  args.num_queries, args.w_o == nullptr ? 0.0f : args.w_o[1],
                                  args.hidden));
  }
  void observe_page(const sikv_observe_page_args&, const CacheView& view, Launch) override {
    calls().push_back(fmt::format("page {}", view.layer()));
  }
  void run(const sikv_select_args& args, const CacheView& view, Launch) override {
    for (int row = 0; row < view.num_rows(); ++row) SelectionRow(args.selection, row).clear();
  }
  void evict(const sikv_evict_args& args, const CacheView& view, Launch) override {
    calls().push_back(fmt::format("evict {}", view.layer()));
    for (int row = 0; row < view.num_rows(); ++row) {
      args.keep_counts[row] = 10;
      for (int i = 0; i < 10; ++i) args.keep_slots[row * view.raw().max_encoded_len + i] = i;
    }
  }
  void score(const sikv_score_args&, const CacheView&, Launch) override {}
  uint64_t state_bytes() const override { return 1000; }
};

// Selects slot 3 and adds to its logits 1 for query head 0 and 2 for query head 1.
class Weighing : public Selector {
 public:
  Plan plan() override { return {5, 0}; }
  void run(const sikv_select_args& args, const CacheView& view, Launch) override {
    for (int row = 0; row < view.num_rows(); ++row) {
      SelectionRow out(args.selection, row);
      out.clear();
      out.push(3);
    }
    for (int head = 0; head < args.num_query_heads; ++head) {
      args.log_weights[head * args.selection.capacity] = static_cast<float>(1 + head);
    }
  }
};
std::unique_ptr<Selector> make_weighing(const CreateArgs&) { return std::make_unique<Weighing>(); }

std::unique_ptr<ScoringSelector> make_noting(const CreateArgs&) {
  return std::make_unique<Noting>();
}
std::unique_ptr<ScoringSelector> make_passing(const CreateArgs& args) {
  return std::make_unique<WrappingSelector>(args);
}

constexpr sikv_option_spec kWrapperOptions[] = {selector_option("what is wrapped")};

void add(Registry& registry, const char* id, const sikv_plugin_entry& entry) {
  const sikv_plugin_descriptor_t descriptor =
      sdk::descriptor(id, "1.0.0", SIKV_CPU, SIKV_KIND_BIT(SIKV_SELECTOR), "", "");
  const sikv_plugin_tables_t tables = {sizeof tables, 1, &entry};
  registry.add_linked(std::string("linked/") + id, descriptor, &tables);
}

const Registry& registry() {
  static const Registry* all = [] {
    auto* made = new Registry();
    made->add_folder(SIKV_PLUGIN_FOLDER);
    add(*made, "noting", scoring_selector<make_noting, kNoOptions>("ref"));
    add(*made, "needy",
        scoring_selector<make_noting, kNoOptions, probe_ref,
                         SIKV_SELECTOR_NEEDS_ALL_QUERIES | SIKV_SELECTOR_NEEDS_ALL_LAYERS |
                             SIKV_SELECTOR_NEEDS_W_O | SIKV_SELECTOR_EVICTS_TOGETHER>("ref"));
    add(*made, "weighing",
        selector<make_weighing, kNoOptions, probe_ref, SIKV_SELECTOR_WEIGHS>("ref"));
    add(*made, "passing", scoring_selector<make_passing, kWrapperOptions>("ref"));
    return made;
  }();
  return *all;
}

PipelineSpec spec_of(const std::string& selector, const std::string& kernel = "gather_attention") {
  return parse_pipeline("fp16+fp16 > " + selector + " > " + kernel, registry());
}

// Three layers of one sequence with a prompt of `tokens`, and `steps` steps behind it.
void replay(const std::string& selector, int tokens, int queries, int steps, bool with_w_o = true) {
  calls().clear();
  const sikv_shape shape = {
      sizeof(sikv_shape), 3, kHeads * kGroup, kHeads, kDim, SIKV_FP32, 1, 2000, 10000.0};
  Pipeline pipeline(spec_of(selector), registry(), cpu(), shape, steps);
  const std::vector<float> rows(static_cast<size_t>(tokens * kHeads * kDim), 0.5f);
  const std::vector<float> q(static_cast<size_t>(queries * kHeads * kGroup * kDim), 0.25f);
  const std::vector<float> w_o(static_cast<size_t>(kHeads * kGroup * kDim * kHidden), 7.0f);
  const int32_t first = 0, count = tokens;
  const sikv_rows kv{rows.data(), SIKV_FP32, tokens, &first, &count, kHeads * kDim, kDim};
  for (int l = 0; l < 3; ++l) {
    pipeline.prefill(l, kv, kv, q.data(), queries,
                     with_w_o ? OutputProjection{w_o.data(), kHidden} : OutputProjection{});
  }
  std::vector<float> out(kHeads * kGroup * kDim), lse(kHeads * kGroup);
  for (int s = 0; s < steps; ++s) {
    pipeline.begin_step();
    for (int l = 0; l < 3; ++l) {
      pipeline.append(l, rows.data(), rows.data());
      pipeline.attend(l, q.data(), out.data(), lse.data());
    }
  }
}

std::string error_of(const std::function<void()>& body) {
  try {
    body();
  } catch (const Error& error) {
    return error.what();
  }
  return "done";
}

TEST(HooksTest, EvictsLayerByLayer) {
  replay("noting(pinned=0)", 300, 4, 213);  // the tail of 44 is full after 212 steps
  EXPECT_EQ(calls(),
            (std::vector<std::string>{"observe 0: 4 queries, w_o 7 x 5", "evict 0",
                                      "observe 1: 4 queries, w_o 7 x 5", "evict 1",
                                      "observe 2: 4 queries, w_o 7 x 5", "evict 2", "page 0",
                                      "evict 0", "page 1", "evict 1", "page 2", "evict 2"}));
}

TEST(HooksTest, EvictsTogetherAfterTheLastLayer) {
  for (const char* selector : {"needy(pinned=0)", "passing(base=needy,pinned=0)"}) {
    replay(selector, 300, 300, 213);
    EXPECT_EQ(calls(), (std::vector<std::string>{
                           "observe 0: 300 queries, w_o 7 x 5", "observe 1: 300 queries, w_o 7 x 5",
                           "observe 2: 300 queries, w_o 7 x 5", "evict 0", "evict 1", "evict 2",
                           "page 0", "page 1", "page 2", "evict 0", "evict 1", "evict 2"}))
        << selector;
  }
}

TEST(HooksTest, RefusesPromptsThatLackWhatIsNeeded) {
  EXPECT_EQ(
      error_of([] { replay("needy", 300, 299, 0); }),
      "selector 'needy' needs the queries of every prompt position, but the prompt of this "
      "run gives those from position 1 on: use a trace made by datasets/capture with --layers "
      "all --queries all --w-o, as scripts/fetch_full_trace does");
  EXPECT_EQ(error_of([] { replay("passing(base=needy)", 300, 300, 0, false); }),
            "selector 'needy' needs w_o, the output projection of every layer, but the prompt of "
            "this run gives none: use a trace made by datasets/capture with --layers all --queries "
            "all --w-o, as scripts/fetch_full_trace does");
  EXPECT_EQ(error_of([] { replay("noting", 300, 1, 0, false); }), "done");
}

TEST(HooksTest, RefusesPromptsWhoseLengthsDisagree) {
  const sikv_shape shape = {
      sizeof(sikv_shape), 1, kHeads * kGroup, kHeads, kDim, SIKV_FP32, 1, 2000, 10000.0};
  Pipeline pipeline(spec_of("noting(pinned=0)"), registry(), cpu(), shape, 1);
  const std::vector<float> rows(700 * kDim, 0.5f), q(kGroup * kDim, 0.25f);
  const int32_t first = 0, keys = 700, values = 600;
  sikv_rows k{rows.data(), SIKV_FP32, 700, &first, &keys, kDim, kDim}, v = k;
  const auto refusal = [&] { return error_of([&] { pipeline.prefill(0, k, v, q.data(), 1); }); };
  v.count = &values;
  EXPECT_EQ(refusal(), "sequence 0 brings 700 tokens of K and 600 of V: give as many of both");
  v = k;
  v.max_count = 512;
  EXPECT_EQ(refusal(),
            "sequence 0 brings 700 tokens, but its rows promise at most 512: raise max_count");
  v = k;
  EXPECT_EQ(pipeline.cache().pages_in_use(), 0);
  EXPECT_EQ(refusal(), "done");
  EXPECT_EQ(refusal(),
            "sequence 0 brings a prompt of 700 tokens, but layer 0 already holds one: give "
            "every layer its prompt once");
}

// A CPU that has only so much left.
class SmallDevice : public Device {
 public:
  explicit SmallDevice(uint64_t free) : free_(free) { info_ = cpu().info(), host_ = cpu().host(); }
  void* allocate(size_t bytes) override { return cpu().allocate(bytes); }
  void release(void* data, size_t bytes) noexcept override { cpu().release(data, bytes); }
  void copy_in(void* to, const void* from, size_t bytes) override {
    cpu().copy_in(to, from, bytes);
  }
  void copy_out(void* to, const void* from, size_t bytes) override {
    cpu().copy_out(to, from, bytes);
  }
  uint64_t free_bytes() const override { return free_; }
  void mark(int i) override { cpu().mark(i); }
  double seconds(int from, int to) override { return cpu().seconds(from, to); }

 private:
  uint64_t free_;
};

TEST(HooksTest, ACacheThatDoesNotFitNamesWhatWould) {
  const auto refusal = [&](int batch, int tokens, uint64_t free) {
    return error_of([&] {
      const sikv_shape shape = {sizeof(sikv_shape), 2,     2,      1,      kDim,
                                SIKV_FP16,          batch, tokens, 10000.0};
      SmallDevice device(free);
      const Pipeline pipeline(spec_of("full(pinned=0)", "dense_attention"), registry(), device,
                              shape, 1);
    });
  };
  // A page takes 64 KiB a layer, and so does the tail.
  EXPECT_EQ(refusal(4, 4096, 5 << 20),
            "the cache needs 8.59 MiB for batch 4 at 4096 tokens, but 5.00 MiB are free: the "
            "largest batch that fits is 2; lower the batch, the context or the number of layers");
  EXPECT_EQ(refusal(1, 4096, 1 << 20),
            "the cache needs 2.19 MiB for batch 1 at 4096 tokens, but 1.00 MiB are free: not one "
            "sequence of that length fits; the longest context that does is 1536");
  EXPECT_EQ(refusal(1, 1536, 1 << 20), "done");
  EXPECT_NE(refusal(1, 1792, 1 << 20), "done");
  EXPECT_EQ(refusal(1, 4096, 100 << 10),
            "the cache needs 2.19 MiB for batch 1 at 4096 tokens, but 100.00 KiB are free: not one "
            "sequence fits, not even of a single page (256 tokens): give it more memory or "
            "fewer layers");
}

TEST(HooksTest, RefusesTracesThatLackWhatIsNeeded) {
  const sikv_shape shape = {sizeof(sikv_shape), 6, 9, 3, kDim, SIKV_FP16, 1, 2000, 10000.0};
  const Composition composition(spec_of("passing(base=needy)"), registry(), cpu(), shape);
  EXPECT_EQ(needs_of(composition.selector()),
            (std::vector<std::string>{"every layer", "the queries of the whole prompt", "w_o"}));
  Offer offer{"t.h5", 6, 30, 3936, false};
  const auto refusal = [&] {
    return error_of([&] { check_needs(composition.selector(), offer); });
  };
  EXPECT_EQ(refusal(),
            "selector 'needy' needs every layer of the model, but t.h5 gives 6 of 30: use a trace "
            "made by datasets/capture with --layers all --queries all --w-o, as "
            "scripts/fetch_full_trace does, and no source.layers");
  offer.layers = 30;
  EXPECT_EQ(
      refusal(),
      "selector 'needy' needs the queries of every prompt position, but t.h5 gives those from "
      "position 3936 on: use a trace made by datasets/capture with --layers all --queries all "
      "--w-o, as scripts/fetch_full_trace does");
  offer.first_query = 0;
  EXPECT_EQ(
      refusal(),
      "selector 'needy' needs w_o, the output projection of every layer, but t.h5 gives none: "
      "use a trace made by datasets/capture with --layers all --queries all --w-o, as "
      "scripts/fetch_full_trace does");
  offer.remedy = "run it on device cpu";
  EXPECT_EQ(refusal(),
            "selector 'needy' needs w_o, the output projection of every layer, but t.h5 gives "
            "none: run it on device cpu");
  offer.w_o = true;
  EXPECT_EQ(refusal(), "done");
}

TEST(HooksTest, TheShippedTraceOffersSomeLayersAndQueries) {
  Config config;
  config.source.trace = SIKV_SOURCE_DIR "/datasets/smollm2-135m-4k.h5";
  const Offer offer = source_offer(config);
  EXPECT_EQ(offer.layers, 6);
  EXPECT_EQ(offer.model_layers, 30);
  EXPECT_EQ(offer.first_query, 3936);
  EXPECT_FALSE(offer.w_o);
}

// Both layers of a model, all queries and w_o, read back through a trace.
TEST(HooksTest, ATraceGivesWhatIsAskedAndNoMore) {
  const TemporaryFolder folder;
  const std::filesystem::path path = folder / "all.h5";
  constexpr int kTokens = 302, kQueryWidth = kHeads * kGroup * kDim;
  TraceMeta meta;
  meta.num_layers = 2;
  meta.num_query_heads = kHeads * kGroup;
  meta.num_kv_heads = kHeads;
  meta.head_dim = kDim;
  TraceWriter writer(path, meta, std::vector<int32_t>(kTokens, 1));
  for (int l = 0; l < 2; ++l) {
    TraceLayer layer;
    layer.layer = l;
    layer.num_tokens = layer.num_queries = kTokens;
    const auto halves = [](int count) {  // 0.5 in fp16
      std::vector<std::byte> bytes(static_cast<size_t>(count) * 2, std::byte{0});
      for (size_t i = 1; i < bytes.size(); i += 2) bytes[i] = std::byte{0x38};
      return bytes;
    };
    layer.k = layer.v = halves(kTokens * kHeads * kDim);
    layer.q = halves(kTokens * kQueryWidth);
    layer.w_o.assign(static_cast<size_t>(kQueryWidth * kHidden), 1.5f);
    writer.write_layer(layer);
  }
  writer.finish();

  Config config;
  config.source.trace = path;
  config.source.prompt = 300;
  const Source source = load_source(config);
  ExactReference exact(source, cpu());
  const auto observed = [&](const std::string& selector) {
    calls().clear();
    measure_pipeline(spec_of(selector), registry(), cpu(), source, exact, {});
    return std::vector<std::string>(calls().begin(), calls().begin() + 2);
  };
  EXPECT_EQ(observed("needy"), (std::vector<std::string>{"observe 0: 300 queries, w_o 1.5 x 5",
                                                         "observe 1: 300 queries, w_o 1.5 x 5"}));
  // Others get as many as a trace without them all would give.
  EXPECT_EQ(observed("noting"),
            (std::vector<std::string>{"observe 0: 128 queries, w_o 1.5 x 5", "evict 0"}));
  config.source.layers = {1};
  EXPECT_EQ(error_of([&] {
              const Source one = load_source(config);
              ExactReference truth(one, cpu());
              measure_pipeline(spec_of("needy"), registry(), cpu(), one, truth, {});
            }),
            "selector 'needy' needs every layer of the model, but " + path.string() +
                " gives 1 of 2: use a trace made by datasets/capture with --layers all --queries "
                "all --w-o, as scripts/fetch_full_trace does, and no source.layers");
}

TEST(HooksTest, ABaseIsAPartAndItsBudgetThePipelines) {
  const sikv_shape shape = {sizeof(sikv_shape), 1, 2, 1, kDim, SIKV_FP16, 1, 4096, 10000.0};
  const Composition composition(spec_of("passing(base=quest[ref](budget=0.25))"), registry(), cpu(),
                                shape);
  std::vector<std::string> parts;
  for (const ChosenPart& part : composition.parts()) {
    parts.push_back(fmt::format("{} {} {}{}", part.role, part.variant->id, part.variant->variant,
                                part.forced ? ", forced" : ""));
  }
  EXPECT_EQ(parts[2], "selector passing ref");
  EXPECT_EQ(parts[3], "base quest ref, forced");
  EXPECT_EQ(composition.budget(1000), 250);
  EXPECT_EQ(composition.capacity(), 1024);
}

TEST(HooksTest, StateOfABaseIsCountedOnce) {
  const sikv_shape shape = {sizeof(sikv_shape), 1, 2, 1, kDim, SIKV_FP16, 1, 512, 10000.0};
  const Pipeline pipeline(spec_of("passing(base=noting)"), registry(), cpu(), shape, 1);
  EXPECT_EQ(pipeline.ledger().bytes("selector_state"), 1000u);
}

// One encoded token per head is attended to, and no other: its logit, 16 * 0.5 / 8, and its weight.
TEST(HooksTest, WeightsReachTheKernel) {
  const sikv_shape shape = {
      sizeof(sikv_shape), 1, kHeads * kGroup, kHeads, kDim, SIKV_FP32, 1, 2000, 10000.0};
  Pipeline pipeline(spec_of("weighing(pinned=0)"), registry(), cpu(), shape, 1);
  EXPECT_EQ(pipeline.ledger().bytes("selection"),
            sizeof(int32_t) * (5 + 1) + sizeof(float) * kGroup * 5);
  const std::vector<float> rows(256 * kDim, 0.5f), q(kGroup * kDim, 0.25f);
  const int32_t first = 0, count = 256;
  const sikv_rows kv{rows.data(), SIKV_FP32, 256, &first, &count, kDim, kDim};
  pipeline.prefill(0, kv, kv, q.data(), 1, {});
  std::vector<float> out(kGroup * kDim), lse(kGroup);
  pipeline.begin_step();
  pipeline.attend(0, q.data(), out.data(), lse.data());
  for (int g = 0; g < kGroup; ++g) {
    EXPECT_FLOAT_EQ(lse[static_cast<size_t>(g)],
                    kDim * 0.25f * 0.5f / 8.0f + 1.0f + static_cast<float>(g));
  }
  EXPECT_FLOAT_EQ(out[0], 0.5f);
}

TEST(HooksTest, RefusesWeightsThatNobodyWouldApply) {
  const sikv_shape shape = {sizeof(sikv_shape), 1, 2, 1, kDim, SIKV_FP16, 1, 512, 10000.0};
  const auto refusal = [&](const PipelineSpec& spec) {
    return error_of([&] { const Composition composition(spec, registry(), cpu(), shape); });
  };
  EXPECT_EQ(refusal(spec_of("weighing", "sparse_flash[ref]")),
            "selector weighing gives its tokens weights, which attention kernel sparse_flash (ref) "
            "does not apply: use gather_attention on the CPU");
  EXPECT_EQ(refusal(spec_of("passing(base=weighing)")),
            "selector 'passing' (ref) cannot wrap selector 'weighing' (ref), whose tokens carry "
            "weights: use the latter by itself");
}

}  // namespace
}  // namespace sikv
