#include "framework/config/config.h"

#include <gtest/gtest.h>

#include <filesystem>
#include <fstream>

#include "framework/base/error.h"
#include "framework/config/pipeline_text.h"
#include "framework/config/test_registry.h"
#include "tests/support/temporary.h"

namespace sikv {
namespace {

namespace fs = std::filesystem;

constexpr const char* kPipeline = R"(pipeline:
  keys: {codec: sign_vq, magnitude_bits: 2, scale_group: 32}
  values: {codec: intq, bits: 2}
  selector: {name: self_index, budget: 2048, pinned: 64}
  attention: {kernel: sparse_flash}
)";
constexpr const char* kModel =
    "model: {layers: 32, query_heads: 32, kv_heads: 8, head_dim: 128, rope_theta: 500000}\n";
constexpr const char* kSource = "source: {synthetic: {kind: needle, context: 128K}}\n";

class ConfigTest : public testing::Test {
 protected:
  Config parse(const std::string& text, const std::vector<std::string>& sets = {}) {
    return parse_config(text, "c.yaml", sets, registry_);
  }
  // The error of one whole config.
  std::string error_of(const std::string& text, const std::vector<std::string>& sets = {}) {
    try {
      parse(text, sets);
    } catch (const Error& error) {
      return error.what();
    }
    return "parsed";
  }
  // The error of a valid config with `lines` in place of one section, or behind the others.
  std::string error_with(const std::string& lines, const std::vector<std::string>& sets = {}) {
    std::string text;
    for (const char* section : {kModel, kSource, kPipeline}) {
      const std::string key = std::string(section).substr(0, std::string(section).find(':') + 1);
      if (!lines.starts_with(key) && !(key == "pipeline:" && lines.starts_with("pipelines:"))) {
        text += section;
      }
    }
    return error_of(lines + "\n" + text, sets);
  }

  Registry registry_ = test_registry();
};

TEST_F(ConfigTest, ReadsTheWholeForm) {
  const TemporaryFolder folder;
  fs::create_directory(folder / "traces");
  std::ofstream(folder / "traces" / "t.h5") << "x";
  std::ofstream(folder / "c.yaml") << R"(
model: {preset: llama-3.1-8b, layers: 4}
source: {trace: traces/t.h5, prompt: 4064, steps: 31, layers: [0, 14, 29]}
pipelines:
  - keys: {scale_group: 16, codec: sign_vq}
    values: {codec: rot_lm, bits: 2}
    selector: {name: self_index, budget: 0.075, pin: snapkv, keep_generated: true, pinned: 16}
    attention: {kernel: sparse_flash, fast: false}
    device: cpu
    force: {selector: ref, keys: ref}
  - "sign_vq+intq > full > sparse_flash @cuda"
budgets: [256, 64K, 0.5]
measure: {steps: 64, warmup: 8, metrics: [memory, recall, memory]}
threads: 2
)";
  const Config config = load_config(folder / "c.yaml", {}, registry_);
  EXPECT_EQ(config.file, folder / "c.yaml");
  ASSERT_TRUE(config.model);
  EXPECT_EQ(config.model->preset, "llama-3.1-8b");
  EXPECT_EQ(config.model->layers, 4);
  EXPECT_EQ(config.model->kv_heads, 8);
  EXPECT_EQ(config.model->weight_bytes, 16060000000);
  EXPECT_EQ(config.source.trace, folder / "traces" / "t.h5");
  EXPECT_FALSE(config.source.synthetic);
  EXPECT_EQ(config.source.prompt, 4064);
  EXPECT_EQ(config.source.steps, 31);
  EXPECT_EQ(config.source.layers, (std::vector<int>{0, 14, 29}));
  ASSERT_EQ(config.pipelines.size(), 2u);
  EXPECT_EQ(pipeline_text(config.pipelines[0], registry_),
            "sign_vq[ref](scale_group=16)+rot_lm(bits=2) > "
            "self_index[ref](budget=0.075,pinned=16,pin=snapkv,keep_generated=true) > "
            "sparse_flash(fast=false) @cpu");
  EXPECT_EQ(pipeline_text(config.pipelines[1], registry_),
            "sign_vq+intq > full(pinned=64) > sparse_flash @cuda");
  EXPECT_EQ(config.budgets, (std::vector<std::string>{"256", "64K", "0.5"}));
  EXPECT_EQ(config.measure.steps, 64);
  EXPECT_EQ(config.measure.warmup, 8);
  EXPECT_EQ(config.measure.metrics, (std::vector<std::string>{"memory", "recall"}));
  EXPECT_EQ(config.threads, 2);
}

constexpr const char* kWrapped = R"(pipeline:
  keys: {codec: sign_vq}
  values: {codec: intq}
  selector:
    name: top_p
    p: 0.5
    pinned: 8
    base:
      name: self_index
      budget: 1024
  attention: {kernel: sparse_flash}
)";

TEST_F(ConfigTest, ReadsNestedSelectors) {
  const std::string head = std::string(kModel) + kSource;
  const auto text_of = [&](const std::vector<std::string>& sets) {
    return pipeline_text(parse(head + kWrapped, sets).pipelines.at(0), registry_);
  };
  EXPECT_EQ(text_of({}),
            "sign_vq+intq > top_p(p=0.5,base=self_index(budget=1024),pinned=8) > sparse_flash");
  EXPECT_EQ(text_of({"pipeline.selector.base.budget=512", "pipeline.selector.p=0.25"}),
            "sign_vq+intq > top_p(p=0.25,base=self_index(budget=512),pinned=8) > sparse_flash");
  EXPECT_EQ(text_of({"pipeline.selector.base={name: full}"}),
            "sign_vq+intq > top_p(p=0.5,base=full,pinned=8) > sparse_flash");
}

TEST_F(ConfigTest, BudgetsReachWhatIsWrapped) {
  const Config config = parse(std::string(kModel) + kSource + kWrapped + "budgets: [96, 0.5]\n");
  std::vector<std::string> texts;
  for (const PipelineSpec& spec : expand_budgets(config, registry_)) {
    texts.push_back(pipeline_text(spec, registry_));
  }
  EXPECT_EQ(texts, (std::vector<std::string>{
                       "sign_vq+intq > top_p(p=0.5,base=self_index(budget=96),pinned=8) > "
                       "sparse_flash",
                       "sign_vq+intq > top_p(p=0.5,base=self_index(budget=0.5),pinned=8) > "
                       "sparse_flash"}));
}

TEST_F(ConfigTest, PlacesErrorsOfNestedSelectors) {
  const auto error_with_selector = [&](const std::string& selector) {
    return error_of(std::string(kModel) + kSource +
                    "pipeline:\n  keys: {codec: sign_vq}\n  values: {codec: intq}\n"
                    "  attention: {kernel: sparse_flash}\n  selector: " +
                    selector + "\n");
  };
  EXPECT_EQ(error_with_selector("{name: top_p}"),
            "c.yaml:7:13: selector 'top_p' wraps another selector and has none; add base: {name: "
            "...} (what is pruned)");
  EXPECT_EQ(error_with_selector("{name: top_p, base: full}"),
            "c.yaml:7:33: base is 'full', expected a map such as {name: ...}");
  EXPECT_EQ(error_with_selector("{name: top_p, base: {nam: full}}"),
            "c.yaml:7:33: base lacks 'name'; add the id of a selector");
  EXPECT_EQ(error_with_selector("{name: top_p, base: {name: self_indx}}"),
            "c.yaml:7:40: there is no selector 'self_indx'; did you mean 'self_index'?");
  EXPECT_EQ(error_with_selector("{name: top_p, base: {name: self_index, bugdet: 1}}"),
            "c.yaml:7:52: selector 'self_index' has no option 'bugdet'; did you mean 'budget'?");
  EXPECT_EQ(error_with_selector("{name: top_p, base: {name: self_index, pinned: 1}}"),
            "c.yaml:7:52: pinned is an option of the whole pipeline, not of a base; move it to the "
            "outermost selector");
  EXPECT_EQ(error_with_selector("{name: top_p, base: {name: split, base: {name: top_p, base: "
                                "{name: full}}}}"),
            "c.yaml:7:13: selector 'top_p' is wrapped around itself (top_p around split around "
            "top_p around full); name each selector once");
  EXPECT_EQ(error_with_selector("{name: top_p, budget: 96, base: {name: self_index}}"),
            "c.yaml:7:27: selector 'top_p' has no option 'budget': it is one of 'self_index', "
            "which it wraps; write base.budget");
  EXPECT_EQ(error_with_selector("{name: split, base: {name: top_p, base: {name: self_index}}, "
                                "budget: 96}"),
            "c.yaml:7:74: selector 'split' has no option 'budget': it is one of 'self_index', "
            "which it wraps; write base.base.budget");
  EXPECT_EQ(error_with_selector("{name: full, base: {name: self_index}}"),
            "c.yaml:7:26: selector 'full' has no option 'base'; it takes pinned, pin, "
            "keep_generated");
}

TEST_F(ConfigTest, TextsThatNameFilesAreRelativeToTheConfig) {
  const TemporaryFolder folder;
  std::ofstream(folder / "pca.h5") << "x";
  const auto table_of = [&](const std::string& table) {
    std::ofstream(folder / "c.yaml")
        << kModel << kSource
        << "pipeline:\n  keys: {codec: sign_vq}\n  values: {codec: intq}\n"
           "  attention: {kernel: sparse_flash}\n"
           "  selector: {name: top_p, base: {name: full}, table: "
        << table << "}\n";
    const Config config = load_config(folder / "c.yaml", {}, registry_);
    return config.pipelines.at(0).selector.options.at(0).second;
  };
  EXPECT_EQ(table_of("pca.h5"), (folder / "pca.h5").string());
  EXPECT_EQ(table_of("elsewhere.h5"), "elsewhere.h5");
  EXPECT_EQ(table_of("/tmp"), "/tmp");
}

TEST_F(ConfigTest, ReadsSyntheticSources) {
  const std::string head = std::string(kModel) + kPipeline;
  const SyntheticSpec one =
      *parse(head + "source: {synthetic: {context: 128K, batch: max}}\n").source.synthetic;
  EXPECT_EQ(one.kind, "clustered");
  EXPECT_EQ(one.context, std::vector<int64_t>{131072});
  EXPECT_TRUE(one.batch_max);
  const Config config = parse(head +
                              "source:\n  steps: 16\n  synthetic: {kind: gaussian, context: [1K, "
                              "2048], batch: [1, 8], dtype: bf16, seed: 7}\n");
  const SyntheticSpec many = *config.source.synthetic;
  EXPECT_EQ(many.context, (std::vector<int64_t>{1024, 2048}));
  EXPECT_EQ(many.batch, (std::vector<int>{1, 8}));
  EXPECT_FALSE(many.batch_max);
  EXPECT_EQ(many.dtype, "bf16");
  EXPECT_EQ(many.seed, 7u);
  EXPECT_EQ(config.source.steps, 16);
  EXPECT_TRUE(parse(head + "source: {synthetic: }\n").source.synthetic);
}

TEST_F(ConfigTest, KnowsModelPresets) {
  EXPECT_EQ(model_presets(),
            (std::vector<std::string>{"smollm2-135m", "llama-3.1-8b", "qwen2.5-14b", "qwen3-8b"}));
  const ModelSpec model = model_preset("smollm2-135m");
  EXPECT_EQ(model.layers, 30);
  EXPECT_EQ(model.query_heads, 9);
  EXPECT_EQ(model.kv_heads, 3);
  EXPECT_EQ(model.head_dim, 64);
  EXPECT_EQ(parse(std::string("model: qwen3-8b\n") + kSource + kPipeline).model->layers, 36);
  EXPECT_EQ(error_with("model: llama-3.1-8"),
            "c.yaml:1:8: there is no model preset 'llama-3.1-8'; did you mean 'llama-3.1-8b'?");
  EXPECT_EQ(error_with("model: gpt"),
            "c.yaml:1:8: there is no model preset 'gpt'; there are smollm2-135m, llama-3.1-8b, "
            "qwen2.5-14b, qwen3-8b");
}

TEST_F(ConfigTest, RefusesUnknownAndMissingKeys) {
  EXPECT_EQ(error_with("sorce: {}"),
            "c.yaml:1:1: config has no key 'sorce'; did you mean 'source'?");
  EXPECT_EQ(error_with("zzzz: 1"),
            "c.yaml:1:1: config has no key 'zzzz'; it takes model, source, sources, "
            "pipeline, pipelines, budgets, group_by, measure, threads, plugin_path");
  EXPECT_EQ(error_of(""), "c.yaml: config is empty, expected a map with keys such as model");
  EXPECT_EQ(error_of(std::string(kModel) + kPipeline),
            "c.yaml:1:1: config lacks 'source'; add a trace or synthetic:");
  EXPECT_EQ(error_of(std::string(kModel) + kSource),
            "c.yaml:1:1: config has neither pipeline nor pipelines, expected one of them");
  EXPECT_EQ(error_of(std::string(kSource) + kPipeline),
            "c.yaml:1:1: a synthetic source takes its shape from model, which config lacks; add "
            "a preset such as model: llama-3.1-8b");
  EXPECT_EQ(error_with("model: {layers: 2}"),
            "c.yaml:1:8: model lacks 'query_heads'; add it or a preset such as preset: "
            "llama-3.1-8b");
  EXPECT_EQ(error_with("source: {}"),
            "c.yaml:1:9: source has neither trace nor synthetic, expected one of them");
  EXPECT_EQ(error_with("pipeline: {keys: {codec: sign_vq}}"),
            "c.yaml:1:11: pipeline lacks 'values'; add values: {codec: ...}");
  EXPECT_EQ(error_with("pipeline: {keys: {bits: 2}}"),
            "c.yaml:1:18: keys lacks 'codec'; add the id of a key codec");
  EXPECT_EQ(error_with("threads: 1\nthreads: 2"),
            "c.yaml:2:1: 'threads' is given twice; remove one of them");
}

TEST_F(ConfigTest, RefusesWrongTypesAndRanges) {
  EXPECT_EQ(error_with("threads: many"),
            "c.yaml:1:10: config: threads is 'many', expected an integer from 0 to 4096");
  EXPECT_EQ(error_with("threads: [1]"),
            "c.yaml:1:10: config: threads is a list, expected an integer from 0 to 4096");
  EXPECT_EQ(error_with("threads:"),
            "c.yaml:1:1: config: threads is empty, expected an integer from 0 to 4096");
  EXPECT_EQ(error_with("model: {layers: 1, query_heads: 9, kv_heads: 2, head_dim: 64}"),
            "c.yaml:1:8: model: query_heads is 9, expected a multiple of kv_heads, which is 2");
  EXPECT_EQ(error_with("model: {layers: 1, query_heads: 8, kv_heads: 2, head_dim: 80}"),
            "c.yaml:1:59: model: head_dim is '80', expected one of 64, 96, 128, 256");
  EXPECT_EQ(error_with("model: {layers: 0, query_heads: 8, kv_heads: 2, head_dim: 64}"),
            "c.yaml:1:17: model: layers is '0', expected an integer from 1 to 4096");
  EXPECT_EQ(error_with("model: [1]"),
            "c.yaml:1:8: model is a list, expected a map with keys such as preset");
  EXPECT_EQ(error_with("source: {trace: a.h5, synthetic: {}}"),
            "c.yaml:1:9: source has both trace and synthetic, expected one of them");
  EXPECT_EQ(error_with("source: {trace: no/such.h5}"),
            "c.yaml:1:17: source: trace is 'no/such.h5', and there is no such file in the working "
            "folder; correct the path");
  EXPECT_EQ(error_with("source: {synthetic: {}, prompt: 5}"),
            "c.yaml:1:25: source: prompt goes with a trace only; remove it");
  EXPECT_EQ(error_with("source: {synthetic: {kind: cluster}}"),
            "c.yaml:1:28: synthetic: kind is 'cluster', expected one of gaussian, clustered, "
            "needle");
  EXPECT_EQ(error_with("source: {synthetic: {context: []}}"),
            "c.yaml:1:31: synthetic: context is an empty list, expected at least one value");
  EXPECT_EQ(error_with("source: {synthetic: {context: [1K, 3G]}}"),
            "c.yaml:1:36: synthetic: context is '3G', expected an integer from 1 to 2147483647");
  EXPECT_EQ(error_with("budgets: [0.5, 1.5]"),
            "c.yaml:1:16: config: budgets is '1.5', expected a count of tokens (2048, 64K) or "
            "a fraction between 0 and 1");
  EXPECT_EQ(error_with("measure: {metrics: [recal]}"),
            "c.yaml:1:21: measure: metrics is 'recal', expected one of memory, latency, recall, "
            "dropped_mass, selection_error, output_error, kv_error");
  EXPECT_EQ(error_with("pipelines: []"),
            "c.yaml:1:12: pipelines is empty, expected a list of pipelines");
  EXPECT_EQ(error_with("pipelines: {}"),
            "c.yaml:1:12: pipelines is a map, expected a list of pipelines");
  EXPECT_EQ(error_with("pipelines: [{label: a, pipline: sign_vq+intq > full > sparse_flash}]"),
            "c.yaml:1:24: an entry of pipelines has no key 'pipline'; did you mean 'pipeline'? (it "
            "takes label, pipeline, source, fitted, reconstruction, budgets, keys, values, "
            "selector, attention, device, force)");
  EXPECT_EQ(error_with("plugin_path: no/such/folder"),
            "c.yaml:1:14: the plugin folder 'no/such/folder' cannot be read: No such file or "
            "directory; correct the path");
}

TEST_F(ConfigTest, RefusesWhatThePluginsDoNotTake) {
  const auto error_in = [&](const std::string& selector) {
    return error_with("pipeline:\n  keys: {codec: sign_vq}\n  values: {codec: intq}\n  selector: " +
                      selector + "\n  attention: {kernel: sparse_flash}");
  };
  EXPECT_EQ(error_in("{name: self_indx}"),
            "c.yaml:4:20: there is no selector 'self_indx'; did you mean 'self_index'?");
  EXPECT_EQ(error_in("{name: self_index, budgt: 1}"),
            "c.yaml:4:32: selector 'self_index' has no option 'budgt'; did you mean 'budget'?");
  EXPECT_EQ(error_in("{name: self_index, pined: 1}"),
            "c.yaml:4:32: selector 'self_index' has no option 'pined'; did you mean 'pinned'?");
  EXPECT_EQ(error_in("{name: self_index, rerank: 99}"),
            "c.yaml:4:40: selector 'self_index': rerank is '99', expected an integer from 0 to 16");
  EXPECT_EQ(error_in("{name: self_index, rerank: {}}"),
            "c.yaml:4:40: selector 'self_index': rerank is a map, expected an integer from 0 to "
            "16");
  EXPECT_EQ(error_in("{name: self_index, pinned: -1}"),
            "c.yaml:4:40: selector 'self_index': pinned is '-1', expected an integer from 0 to "
            "65536");
  EXPECT_EQ(error_in("self_index"),
            "c.yaml:4:13: selector is 'self_index', expected a map such as {name: ...}");
  EXPECT_EQ(error_in("{name: full}\n  force: {selector: cuda}"),
            "c.yaml:5:21: selector 'full' has no variant 'cuda'; it has ref");
  EXPECT_EQ(error_in("{name: full}\n  force: {selectors: ref}"),
            "c.yaml:5:11: force has no key 'selectors'; did you mean 'selector'?");
  EXPECT_EQ(error_in("{name: full}\n  device: cdua"),
            "c.yaml:5:11: device is 'cdua'; did you mean 'cuda'?");
  EXPECT_EQ(error_with("pipeline: sign_vq+intq > fll > sparse_flash"),
            "c.yaml:1:11: column 16: there is no selector 'fll'; did you mean 'full'?");
}

TEST_F(ConfigTest, SetsOverrideAnyKey) {
  const std::string text = std::string(kModel) + kSource + kPipeline;
  Config config = parse(text, {"pipeline.selector.budget=512", "source.synthetic.batch=[2, 4]",
                               "pipeline.force.selector=ref", "model=qwen3-8b"});
  EXPECT_EQ(pipeline_text(config.pipelines[0], registry_),
            "sign_vq(magnitude_bits=2,scale_group=32)+intq(bits=2) > "
            "self_index[ref](budget=512,pinned=64) > sparse_flash");
  EXPECT_EQ(config.source.synthetic->batch, (std::vector<int>{2, 4}));
  EXPECT_EQ(config.model->layers, 36);

  const std::string several = std::string(kModel) + kSource +
                              "pipelines: [rot_lm+intq > full > sparse_flash, {keys: {codec: "
                              "sign_vq}, values: {codec: intq}, selector: {name: full}, "
                              "attention: {kernel: sparse_flash}}]\n";
  config = parse(several, {"pipelines.1.values.bits=4"});
  EXPECT_EQ(pipeline_text(config.pipelines[1], registry_),
            "sign_vq+intq(bits=4) > full(pinned=64) > sparse_flash");

  EXPECT_EQ(error_of(several, {"pipelines.2.keys.bits=2"}),
            "--set pipelines.2.keys.bits=2: 'pipelines' is a list of 2, expected an index below "
            "that instead of '2'");
  EXPECT_EQ(error_of(several, {"pipelines.0.keys.bits=2"}),
            "--set pipelines.0.keys.bits=2: 'pipelines.0' is 'rot_lm+intq > full > sparse_flash', "
            "not a map, so 'keys' cannot be set in it; write it as a map");
  EXPECT_EQ(error_of(text, {"pipeline.selector.budget=many"}),
            "--set pipeline.selector.budget=many: selector 'self_index': budget is 'many', "
            "expected a count of tokens (2048, 64K) or a fraction between 0 and 1");
  EXPECT_EQ(error_of(text, {"pipeline.selectr.budget=5"}),
            "--set pipeline.selectr.budget=5: pipeline has no key 'selectr'; did you mean "
            "'selector'?");
  EXPECT_EQ(error_of(text, {"threads"}),
            "--set threads: expected key=value, such as pipeline.selector.budget=512");
  EXPECT_EQ(error_of(text, {"a..b=1"}), "--set a..b=1: the key 'a..b' has an empty part");
}

TEST_F(ConfigTest, RefusesWhatIsNoYaml) {
  EXPECT_EQ(error_of("model: {layers: 1"),
            "c.yaml:1:1: not valid YAML: end of map flow not found; check quotes, brackets and "
            "indentation there");
  EXPECT_EQ(error_of("a: &x [*x]"),
            "c.yaml:1:4: the document is nested deeper than 32 levels or has more than 100000 "
            "values, which no config has; simplify it");
  EXPECT_EQ(error_of("[1]: 2"), "c.yaml:1:1: a key is a list, expected a name");
}

TEST_F(ConfigTest, RefusesUnreadableFiles) {
  try {
    load_config("no/such.yaml", {}, registry_);
    FAIL();
  } catch (const Error& error) {
    EXPECT_STREQ(error.what(),
                 "the config 'no/such.yaml' cannot be read: No such file or directory; correct the "
                 "path");
  }
}

TEST_F(ConfigTest, ExpandsBudgetsWhereASelectorHasOne) {
  const Config config = parse(std::string(kModel) + kSource +
                              "pipelines: [sign_vq+intq > self_index(rerank=2) > sparse_flash, "
                              "sign_vq+intq > full > sparse_flash]\nbudgets: [64, 0.1]\n");
  std::vector<std::string> texts;
  for (const PipelineSpec& spec : expand_budgets(config, registry_)) {
    texts.push_back(pipeline_text(spec, registry_));
  }
  EXPECT_EQ(texts, (std::vector<std::string>{
                       "sign_vq+intq > self_index(budget=64,rerank=2,pinned=64) > sparse_flash",
                       "sign_vq+intq > self_index(budget=0.1,rerank=2,pinned=64) > sparse_flash",
                       "sign_vq+intq > full(pinned=64) > sparse_flash"}));
}

constexpr const char* kSeveral =
    "sources:\n"
    "  full: {trace: no/such.h5, prompt: 64, layers: [0, 1, 2], judge: [0, 2], make: capture}\n"
    "pipelines:\n"
    "  - {label: all, source: full, pipeline: sign_vq+intq > full > sparse_flash}\n"
    "  - label: index\n"
    "    fitted: this prompt\n"
    "    reconstruction: its weights\n"
    "    budgets: [32]\n"
    "    keys: {codec: sign_vq}\n"
    "    values: {codec: intq}\n"
    "    selector: {name: self_index, budget: 8}\n"
    "    attention: {kernel: sparse_flash}\n"
    "budgets: [64, 128]\n"
    "group_by: memory\n";

TEST_F(ConfigTest, EntriesNameTheirSourceAndSayWhatTheyRestOn) {
  const std::string head = std::string(kModel) + kSource;
  const Config config = parse(head + kSeveral);
  EXPECT_EQ(config.group_by, GroupBy::kMemory);
  const auto& [all, index] = std::pair(config.pipelines[0], config.pipelines[1]);
  EXPECT_EQ(all.entry.label, "all");
  const SourceSpec& full = source_of(config, all);
  EXPECT_TRUE(full.missing);
  EXPECT_EQ(full.make, "capture");
  EXPECT_EQ(full.prompt, 64);
  EXPECT_EQ(full.judge, (std::vector<int>{0, 2}));
  EXPECT_EQ(&source_of(config, index), &config.source);
  EXPECT_THROW(on_source_of(config, all), Error);
  EXPECT_TRUE(on_source_of(config, index).source.synthetic);
  EXPECT_EQ(index.entry.fitted, "this prompt");
  EXPECT_EQ(index.entry.reconstruction, "its weights");
  const auto specs = expand_budgets(config, registry_);
  ASSERT_EQ(specs.size(), 2u);
  EXPECT_EQ(pipeline_text(specs[1], registry_),
            "sign_vq+intq > self_index(budget=32,pinned=64) > sparse_flash");
  EXPECT_EQ(overridden_budgets(config, registry_),
            (std::vector<std::string>{"budget=8 of self_index"}));
}

TEST_F(ConfigTest, TheOneSourceMayBeMadeAndJudgedInPart) {
  const Config config = parse(
      std::string("source: {trace: no/such.h5, layers: [0, 1, 2], judge: [2], make: capture}\n") +
      kPipeline);
  EXPECT_TRUE(config.source.missing);
  EXPECT_EQ(config.source.make, "capture");
  EXPECT_EQ(config.source.judge, (std::vector<int>{2}));
  try {
    on_source_of(config, config.pipelines[0]);
    FAIL();
  } catch (const Error& error) {
    EXPECT_NE(std::string(error.what()).find("no/such.h5' is not there: capture makes it"),
              std::string::npos)
        << error.what();
  }
  for (const char* key : {"judge: [0]", "make: capture"}) {
    EXPECT_NE(error_of(std::string(kModel) + "source: {synthetic: {context: 64}, " + key + "}\n" +
                       kPipeline)
                  .find("goes with a trace only; remove it"),
              std::string::npos)
        << key;
  }
}

TEST_F(ConfigTest, RefusesEntriesAndSourcesThatDoNotFit) {
  const std::string head = std::string(kModel) + kSource;
  const auto error_of_source = [&](const std::string& source) {
    return error_of(head + kPipeline + "sources: " + source);
  };
  EXPECT_NE(error_of_source("{full: {trace: no/such.h5}}").find("there is no such file"),
            std::string::npos);
  EXPECT_NE(error_of_source("{full: {make: capture}}").find("source 'full' lacks 'trace'"),
            std::string::npos);
  EXPECT_NE(error_of_source("{full: {trace: t.h5, make: capture, layers: [0], judge: [1]}}")
                .find("judge has layer 1, which layers lacks"),
            std::string::npos);
  EXPECT_NE(error_of_source("[t.h5]").find("sources is a list, expected a map"), std::string::npos);
  const auto error_of_entry = [&](const std::string& entry) {
    return error_of(head + "sources: {full: {trace: t.h5, make: capture}}\npipelines: [" + entry +
                    "]");
  };
  const std::string line = "pipeline: sign_vq+intq > full > sparse_flash";
  EXPECT_NE(error_of_entry("{" + line + ", source: ful}")
                .find("there is no source 'ful'; did you mean 'full'?"),
            std::string::npos);
  EXPECT_NE(
      error_of_entry("{" + line + ", keys: {codec: fp16}}").find("'keys' stands beside pipeline"),
      std::string::npos);
  EXPECT_NE(error_of_entry("{pipeline: {}}").find("expected the one-line form"), std::string::npos);
  EXPECT_NE(error_of(head + kPipeline + "group_by: size").find("expected one of budget, memory"),
            std::string::npos);
}

TEST_F(ConfigTest, SaysWhatToSetWhereThereAreSeveralPipelines) {
  const std::string head = std::string(kModel) + kSource;
  const std::string several = head +
                              "pipelines: [sign_vq+intq > full > sparse_flash, sign_vq+intq "
                              "> full > sparse_flash]\n";
  EXPECT_EQ(error_of(several, {"pipeline.selector.budget=5"}),
            "--set pipeline.selector.budget=5: the config has a list of pipelines: name one of "
            "them, as in pipelines.0.selector, up to pipelines.1, or set budgets for all");
  EXPECT_EQ(error_of(head + kPipeline, {"pipelines.0.selector.budget=5"}),
            "--set pipelines.0.selector.budget=5: the config has one pipeline: set pipeline in "
            "place of pipelines.0");
  EXPECT_EQ(error_of(several + kPipeline),
            "c.yaml:1:1: config has both pipeline and pipelines, expected one of them");
}

}  // namespace
}  // namespace sikv
