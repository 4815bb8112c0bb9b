// The program as its users meet it: spawned, with files, exit codes and signals.
#include <fcntl.h>
#include <fmt/format.h>
#include <gtest/gtest.h>
#include <signal.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <map>
#include <nlohmann/json.hpp>
#include <set>
#include <sstream>
#include <string>
#include <thread>
#include <vector>

namespace sikv {
namespace {

namespace fs = std::filesystem;

using Words = std::vector<std::string>;

std::string read_text(const fs::path& path) {
  std::ifstream stream(path);
  return {std::istreambuf_iterator<char>(stream), {}};
}

nlohmann::json read_json(const fs::path& path) {
  return nlohmann::json::parse(read_text(path), nullptr, false);
}

void write_file(const fs::path& path, const std::string& text) { std::ofstream(path) << text; }

bool contains(const std::string& text, const std::string& part) {
  return text.find(part) != std::string::npos;
}

struct Result {
  int code = -1;  // -1: ended by a signal
  std::string out, err;
};

// A folder of its own for each test, and sikv running in it; without a GPU, which `device: auto`
// would take where there is one.
class Cli : public testing::Test {
 protected:
  Cli()
      : folder_(fs::path(testing::TempDir()) /
                fmt::format("sikv_cli_{}_{}", getpid(),
                            testing::UnitTest::GetInstance()->current_test_info()->name())) {
    fs::create_directories(folder_);
    setenv("CUDA_VISIBLE_DEVICES", "", 1);
  }
  ~Cli() override { fs::remove_all(folder_); }

  fs::path path(const std::string& name) const { return folder_ / name; }

  // A config with a source that takes milliseconds, and `rest` after it.
  std::string tiny(const std::string& name, const std::string& rest,
                   const std::string& source = "context: 600") const {
    write_file(path(name),
               fmt::format("model: {{layers: 2, query_heads: 2, kv_heads: 1, head_dim: 64}}\n"
                           "source:\n  synthetic: {{{}}}\n  steps: 3\n{}",
                           source, rest));
    return name;
  }
  std::string tiny_quest() const {
    return tiny("quest.yaml", "pipeline: fp16+fp16 > quest(budget=32) > gather_attention\n");
  }

  pid_t start(const Words& words, const std::string& stdout_path = "out",
              rlim_t largest_file = RLIM_INFINITY) const {
    const pid_t child = fork();
    if (child != 0) return child;
    if (chdir(folder_.c_str()) != 0) _exit(126);
    const auto redirect = [](const std::string& to, int number) {
      const int file = open(to.c_str(), O_CREAT | O_TRUNC | O_WRONLY, 0666);
      dup2(file, number);
    };
    redirect(stdout_path, STDOUT_FILENO);
    redirect("err", STDERR_FILENO);
    const rlimit limit = {largest_file, largest_file};
    setrlimit(RLIMIT_FSIZE, &limit);
    std::vector<char*> argv = {const_cast<char*>("sikv")};
    for (const std::string& word : words) argv.push_back(const_cast<char*>(word.c_str()));
    argv.push_back(nullptr);
    execv(SIKV_BINARY, argv.data());
    _exit(127);
  }

  Result wait_for(pid_t child) const {
    int status = 0;
    waitpid(child, &status, 0);
    return {WIFEXITED(status) ? WEXITSTATUS(status) : -1, read_text(path("out")),
            read_text(path("err"))};
  }

  Result sikv(const Words& words) const { return wait_for(start(words)); }

  // Runs `words`, which must fail as the caller's fault with one line that has every part.
  void refused(const Words& words, const Words& parts) const {
    const Result result = sikv(words);
    EXPECT_EQ(result.code, 2) << result.err;
    EXPECT_EQ(std::count(result.err.begin(), result.err.end(), '\n'), 1) << result.err;
    for (const std::string& part : parts) EXPECT_TRUE(contains(result.err, part)) << result.err;
  }

  // Sends SIGINT once `ready` holds.
  template <typename Ready>
  Result interrupted(const Words& words, Ready&& ready) const {
    const pid_t child = start(words);
    for (int i = 0; i < 6000 && !ready(); ++i) {
      std::this_thread::sleep_for(std::chrono::milliseconds(10));
    }
    kill(child, SIGINT);
    return wait_for(child);
  }

 private:
  fs::path folder_;
};

// ---- help and mistakes --------------------------------------------------------------------------

TEST_F(Cli, EveryCommandHasHelpWithExamples) {
  const std::vector<Words> commands = {{},
                                       {"run"},
                                       {"compare"},
                                       {"throughput"},
                                       {"explain"},
                                       {"plugins"},
                                       {"plugins", "list"},
                                       {"plugins", "show"},
                                       {"dataset"},
                                       {"dataset", "info"},
                                       {"dataset", "synth"},
                                       {"dataset", "check"},
                                       {"dataset", "pca"},
                                       {"schema"},
                                       {"new-plugin"}};
  for (Words command : commands) {
    std::string name = "sikv";
    for (const std::string& word : command) name += " " + word;
    command.push_back("--help");
    const Result result = sikv(command);
    EXPECT_EQ(result.code, 0) << name;
    EXPECT_TRUE(contains(result.out, "Examples:\n  " + name)) << result.out;
    EXPECT_EQ(result.err, "");
  }
}

TEST_F(Cli, VersionNamesTheCommit) {
  const Result result = sikv({"--version"});
  EXPECT_EQ(result.code, 0);
  EXPECT_TRUE(result.out.starts_with("sikv 0.")) << result.out;
  EXPECT_TRUE(contains(result.out, "(")) << result.out;
}

TEST_F(Cli, TyposGetTheNearestName) {
  refused({"compre"}, {"no command 'compre'", "did you mean 'compare'?"});
  refused({"plugins", "shw"}, {"sikv plugins", "did you mean 'show'?"});
  refused({"run", tiny_quest(), "--jsn", "x"}, {"'--jsn'", "did you mean '--json'?"});
  refused({"plugins", "show", "qest"}, {"did you mean 'quest'?"});
  refused({"plugins", "show", "selectr/quest"}, {"did you mean 'selector'?"});
  refused({}, {"sikv --help"});
  refused({"run"}, {"CONFIG", "sikv run --help"});
}

TEST_F(Cli, BadConfigsAreOneLine) {
  refused({"run", "missing.yaml"}, {"missing.yaml"});
  refused({"run", tiny("a.yaml", "pipeline: fp16+fp16 > qest > gather_attention\n")},
          {"a.yaml:5", "qest", "did you mean 'quest'?"});
  refused({"run", tiny_quest(), "--set", "pipeline.selector.budgt=5"}, {"--set"});
  refused({"run", tiny("b.yaml", "pipeline: fp16+fp16 > self_index > gather_attention\n")},
          {"self_index", "sign_vq"});
  refused({"run", tiny("c.yaml",
                       "pipelines: [fp16+fp16 > full > dense_attention,\n"
                       "            fp16+fp16 > quest > gather_attention]\n")},
          {"c.yaml", "2 pipelines", "sikv compare"});
  refused({"throughput", tiny("d.yaml", "pipeline: fp16+fp16 > full > dense_attention\n"), "--set",
           "source={trace: " SIKV_SOURCE_DIR "/datasets/smollm2-135m-4k.h5}"},
          {"d.yaml", "synthetic"});
}

TEST_F(Cli, ForceAndDeviceAreChecked) {
  const std::string config = tiny_quest();
  refused({"run", config, "--force", "selector"}, {"ROLE=VARIANT"});
  refused({"run", config, "--force", "selecter=ref"}, {"did you mean 'selector'?"});
  refused({"run", config, "--force", "selector.oracle=ref"}, {"quest.yaml", "oracle", "quest"});
  refused({"run", config, "--force", "selector=none"}, {"--force", "none", "ref"});
  refused({"run", config, "--device", "gpu"}, {"gpu"});
  refused({"run", config, "--threads", "-1"}, {"-1"});
}

TEST_F(Cli, SelectorsWrapSelectors) {
  const std::string config = tiny("wrapped.yaml",
                                  "pipeline:\n"
                                  "  keys: {codec: fp16}\n"
                                  "  values: {codec: fp16}\n"
                                  "  selector: {name: twilight, base: {name: quest, budget: 32}}\n"
                                  "  attention: {kernel: gather_attention}\n");
  const Result run = sikv({"run", config, "--json", "row.json", "--set",
                           "pipeline.selector.base.budget=48", "--force", "selector.quest=ref"});
  ASSERT_EQ(run.code, 0) << run.err;
  const nlohmann::json row = read_json(path("row.json"))["rows"][0];
  EXPECT_TRUE(contains(row["pipeline"], "twilight(base=quest[ref](budget=48),pinned=64)")) << row;
  EXPECT_EQ(row["variants"]["base"], "ref");
  EXPECT_EQ(row["budget"], 48);

  const Result compared = sikv({"compare", config, "--set", "budgets=[16, 64]"});
  ASSERT_EQ(compared.code, 0) << compared.err;
  for (const char* part : {"budget 16", "base=quest(budget=64)", "oracle(budget=16,"}) {
    EXPECT_TRUE(contains(compared.out, part)) << part << "\n" << compared.out;
  }
  EXPECT_TRUE(contains(sikv({"explain", config}).out, "base       quest"));
  const Result shown = sikv({"plugins", "show", "twilight"});
  for (const char* part : {"wraps another selector", "none: required", "gives tokens back"}) {
    EXPECT_TRUE(contains(shown.out, part)) << part << "\n" << shown.out;
  }

  const auto with = [&](const char* selector) {
    return Words{"run", config, "--set", std::string("pipeline.selector=") + selector};
  };
  refused({"run", config, "--set", "pipeline.selector.budget=48"},
          {"--set pipeline.selector.budget=48", "one of 'quest'", "write base.budget"});
  refused(with("{name: twilight}"), {"'twilight' wraps another selector and has none; add base"});
  refused(with("{name: twilight, base: {name: twilight, base: {name: quest}}}"),
          {"'twilight' is wrapped around itself"});
  refused(with("{name: twilight, base: {name: qest}}"), {"did you mean 'quest'?"});
  refused(with("{name: adakv, base: {name: quest}}"), {"'adakv'", "wrap snapkv"});
}

// What a plugin refuses when it is made, and what parts refuse of each other.
TEST_F(Cli, RefusalsOfPluginsHaveAPlace) {
  const auto config = [&](const char* keys, const char* selector) {
    return tiny("placed.yaml", std::string("pipeline:\n"
                                           "  keys: {codec: ") +
                                   keys +
                                   "}\n"
                                   "  values: {codec: fp16}\n"
                                   "  selector: {name: " +
                                   selector +
                                   "}\n"
                                   "  attention: {kernel: gather_attention}\n");
  };
  for (const char* command : {"run", "compare", "explain"}) {
    refused({command, config("turboquant, form: prod, bits: 1", "full")},
            {"placed.yaml:6:9: ", "use 2 bits or more"});
    refused({command, config("fp16", "adakv, base: {name: snapkv, kernel_size: 4}")},
            {"placed.yaml:8:33: ", "give an odd number"});
    refused({command, config("fp16", "adakv, base: {name: quest}")},
            {"placed.yaml:8:13: ", "wrap snapkv"});
    refused({command, config("fp16", "self_index")}, {"placed.yaml:8:13: ", "sign_vq"});
    refused(
        {command, config("kivi", "snapkv, budget: 64")},
        {"placed.yaml:8:13: selector snapkv", "key codec kivi writes kivi(", "32 tokens share"});
    refused({command, config("kivi", "criticalkv, base: {name: snapkv, budget: 64}")},
            {"placed.yaml:8:13: selector criticalkv", "key codec kivi"});
    refused({command, tiny("line.yaml",
                           "pipeline: turboquant(form=prod,bits=1)+fp16 > full > "
                           "gather_attention\n")},
            {"line.yaml:5:11: ", "use 2 bits or more"});
  }
}

// What is found only once the source is known.
TEST_F(Cli, NeedsOfSelectorsHaveAPlace) {
  const std::string config = tiny("needs.yaml",
                                  "pipeline:\n"
                                  "  keys: {codec: fp16}\n"
                                  "  values: {codec: fp16}\n"
                                  "  selector: {name: adakv, base: {name: h2o, budget: 32}}\n"
                                  "  attention: {kernel: gather_attention}\n");
  for (const char* command : {"run", "compare", "explain"}) {
    refused({command, config}, {"needs.yaml:8:33: selector 'h2o' needs the queries of every"});
  }
}

TEST_F(Cli, ChannelsAboveThoseOfAHeadAreRefused) {
  for (const std::string selector : {"sparq", "loki", "double_sparsity", "hshare"}) {
    refused({"explain", tiny("channels.yaml", "pipeline: fp16+fp16 > " + selector +
                                                  "(channels=65) > gather_attention\n")},
            {"channels.yaml:5:11: selector '" + selector + "'",
             "channels is 65, but a head has 64; give at most as many"});
  }
}

// Whole pages leave, where tokens share bytes.
TEST_F(Cli, StreamingEvictsFromSharedScales) {
  const Result run = sikv({"run", tiny("s.yaml",
                                       "pipeline: kivi+kivi > streaming(budget=64,evict=true) > "
                                       "gather_attention\n",
                                       "context: 1500")});
  EXPECT_EQ(run.code, 0) << run.err;
}

TEST_F(Cli, UnwritableOutputIsFoundBeforeTheWork) {
  const std::string config = tiny_quest();
  refused({"run", config, "--json", "/dev/full"}, {"/dev/full"});
  refused({"run", config, "--json", "no/such/folder/x.json"}, {"no/such/folder"});
  refused({"run", config, "--json", ""}, {"--json", "the name of a file"});
  refused({"compare", config, "--csv", "/dev/full"}, {"/dev/full"});
  refused({"throughput", config, "--json", "/dev/full"}, {"/dev/full"});
  EXPECT_EQ(sikv({"run", config, "--json", "/dev/full"}).out, "");
}

TEST_F(Cli, OnlyResultsAreReplacedByResults) {
  const std::string config = tiny_quest();
  const std::string text = read_text(path(config));
  refused({"run", config, "--json", config}, {config, "is not a result of sikv"});
  refused({"compare", config, "--csv", config}, {config, "is not a result of sikv"});
  EXPECT_EQ(read_text(path(config)), text);
  for (int time = 0; time < 2; ++time) {
    EXPECT_EQ(sikv({"compare", config, "--json", "c.json", "--csv", "c.csv"}).code, 0);
  }
  refused({"run", config, "--json", "c.csv/x"}, {"c.csv/x"});
  refused({"compare", config, "--json", "x", "--csv", "x"}, {"--json and --csv"});
  refused({"schema", "--out", config}, {config, "is not a JSON schema"});
  refused({"dataset", "synth", "--out", config}, {config, "is not a trace"});
  write_file(path("sweep.json"), R"({"environment": {}, "rows": [{"setup": {}}]})");
  refused({"run", config, "--json", "sweep.json"},
          {"sweep.json", "holds 1 row that a comparison, a sweep or an evaluation goes on from"});
  refused({"run", config, "--json", "c.json"},
          {"'c.json' exists and holds 3 rows that 'sikv compare quest.yaml --json c.json --csv "
           "c.csv' goes on from"});
  EXPECT_EQ(read_text(path(config)), text);
}

TEST_F(Cli, NotesWhatOneMayNotExpect) {
  const Result short_prompt =
      sikv({"run",
            tiny("short.yaml", "pipeline: fp16+fp16 > full > gather_attention\n", "context: 100")});
  EXPECT_EQ(short_prompt.code, 0) << short_prompt.err;
  EXPECT_TRUE(contains(short_prompt.err, "fills no page of 256")) << short_prompt.err;
  const Result large = sikv({"run", tiny("large.yaml",
                                         "pipeline: fp16+fp16 > quest(budget=1M) > "
                                         "gather_attention\n")});
  EXPECT_EQ(large.code, 0) << large.err;
  EXPECT_TRUE(contains(large.err, "everything is selected")) << large.err;
  const Words all_pinned = {"--set", "pipeline=fp16+fp16 > quest(pinned=512) > gather_attention"};
  for (const char* command : {"run", "compare", "explain"}) {
    Words words = {command, tiny_quest()};
    words.insert(words.end(), all_pinned.begin(), all_pinned.end());
    const Result pinned = sikv(words);
    EXPECT_EQ(pinned.code, 0) << pinned.err;
    EXPECT_TRUE(contains(pinned.err, "a prompt of 600 tokens has 512 that can be pinned"))
        << pinned.err;
  }
}

TEST_F(Cli, OneOfASweepIsMeasuredAndTheRestNamed) {
  const std::string one = "pipeline: fp16+fp16 > full > dense_attention\n";
  const std::string config = tiny("sweep.yaml", one, "context: [300, 400], batch: [1, 2, 3]");
  for (const char* command : {"run", "compare"}) {
    const Result result = sikv({command, config});
    EXPECT_EQ(result.code, 0) << result.err;
    EXPECT_TRUE(contains(result.err,
                         "sweep.yaml: measured at context 300, batch 1, without context 400 and "
                         "batch 2, 3: sikv throughput measures all of them\n"))
        << result.err;
  }
  const Result max = sikv({"run", tiny("max.yaml", one, "context: 300, batch: max")});
  EXPECT_TRUE(contains(max.err, "batch 1, without batch max: ")) << max.err;
  refused({"run", SIKV_SOURCE_DIR "/configs/throughput.yaml"},
          {"use sikv compare, or sikv throughput, which takes context 8192 and batch 4, too"});
}

TEST_F(Cli, AFullDiskIsAnErrorAndLeavesNoHalfFile) {
  const std::string config = tiny_quest();
  const Result result = wait_for(start({"run", config, "--json", "x.json"}, "/dev/null", 512));
  EXPECT_EQ(result.code, 2) << result.err;
  EXPECT_TRUE(contains(result.err, "x.json")) << result.err;
  EXPECT_FALSE(fs::exists(path("x.json")));
  for (const auto& entry : fs::directory_iterator(path("."))) {
    EXPECT_NE(entry.path().extension(), ".partial") << entry.path();
  }
  EXPECT_EQ(wait_for(start({"plugins"}, "/dev/full")).code, 2);
}

// ---- run and compare ----------------------------------------------------------------------------

TEST_F(Cli, RunShowsAndWritesOneRow) {
  const Result result =
      sikv({"run", tiny_quest(), "--json", "row.json", "--force", "selector=ref"});
  ASSERT_EQ(result.code, 0) << result.err;
  EXPECT_EQ(result.err, "");
  for (const char* part : {"recall", "dropped mass", "output error", "bytes/token", "step: attend",
                           "prefill: encode", "smaller than fp16"}) {
    EXPECT_TRUE(contains(result.out, part)) << part << "\n" << result.out;
  }
  const auto json = read_json(path("row.json"));
  ASSERT_EQ(json["rows"].size(), 1u);
  const auto& row = json["rows"][0];
  EXPECT_EQ(row["pipeline"], "fp16+fp16 > quest[ref](budget=32,pinned=64) > gather_attention");
  EXPECT_EQ(row["budget"], 32);
  EXPECT_EQ(row["metrics"]["bytes_per_token"], 256);
  for (const char* metric : {"recall", "dropped_mass", "output_error"}) {
    for (const char* what : {"mean", "p95", "p99"}) {
      EXPECT_TRUE(row["metrics"][metric][what].is_number()) << metric << " " << what;
    }
  }
  EXPECT_TRUE(row["memory"]["total"].is_number());
  EXPECT_TRUE(row["latency_us"]["attend"]["median"].is_number());
  EXPECT_EQ(row["variants"]["selector"], "ref");
  EXPECT_TRUE(contains(json["environment"]["command"].get<std::string>(), "sikv run"));
  EXPECT_TRUE(contains(json["source"].get<std::string>(), "synthetic"));
}

// By what was encoded, not by what is left: evicting lowers it.
TEST_F(Cli, EvictingLowersBytesPerToken) {
  const Result result =
      sikv({"compare",
            tiny("e.yaml",
                 "pipelines:\n"
                 "  - fp16+fp16 > streaming(budget=192,evict=true,pinned=0) > gather_attention\n"
                 "  - fp16+fp16 > streaming(budget=192,pinned=0) > gather_attention\n",
                 "context: 1100"),
            "--json", "e.json"});
  ASSERT_EQ(result.code, 0) << result.err;
  EXPECT_TRUE(contains(result.out, "bytes/token: pages in use, per encoded token")) << result.out;
  const auto json = read_json(path("e.json"));
  const auto &evicting = json["rows"][0]["metrics"], &keeping = json["rows"][1]["metrics"];
  EXPECT_EQ(keeping["bytes_per_token"], 256);
  EXPECT_EQ(evicting["bytes_per_token"], 64);  // one page of four
  EXPECT_GT(evicting["compression_total"], keeping["compression_total"]);
}

TEST_F(Cli, CompareAddsTheBoundsAndGroupsByBudget) {
  const std::string config = tiny("c.yaml",
                                  "pipelines:\n"
                                  "  - rot_lm+rot_lm > self_index > sparse_flash\n"
                                  "  - fp16+fp16 > quest > gather_attention\n"
                                  "  - fp16+fp16 > full > dense_attention\n"
                                  "budgets: [16, 64]\n");
  const Result result = sikv({"compare", config, "--json", "c.json", "--csv", "c.csv"});
  ASSERT_EQ(result.code, 0) << result.err;
  EXPECT_EQ(result.err, "");
  const std::string csv = read_text(path("c.csv"));
  EXPECT_EQ(std::count(csv.begin(), csv.end(), '\n'), 10);
  const auto rows = read_json(path("c.json"))["rows"];
  ASSERT_EQ(rows.size(), 9u);  // 2 x 2 with a budget, 1 without, 2 x 2 bounds
  int oracles = 0;
  for (const auto& row : rows) {
    const std::string pipeline = row["pipeline"];
    if (contains(pipeline, "> oracle(")) {
      ++oracles;
      EXPECT_TRUE(pipeline.starts_with("rot_lm+rot_lm >")) << pipeline;
      EXPECT_EQ(row["metrics"]["recall"]["mean"], 1.0);
    }
    if (contains(pipeline, "> random(")) {
      EXPECT_TRUE(pipeline.starts_with("fp16+fp16 >")) << pipeline;
    }
  }
  EXPECT_EQ(oracles, 2);
  for (const char* part : {"budget 16\n", "budget 64\n", "no budget\n", "*"}) {
    EXPECT_TRUE(contains(result.out, part)) << result.out;
  }
}

TEST_F(Cli, LabelsNameRowsInEveryTable) {
  const std::string config =
      tiny("labels.yaml",
           "pipelines:\n"
           "  - {label: my pick, pipeline: fp16+fp16 > full > gather_attention}\n"
           "  - fp16+fp16 > quest > gather_attention\n");
  const Result result = sikv({"compare", config, "--json", "l.json"});
  ASSERT_EQ(result.code, 0) << result.err;
  EXPECT_TRUE(contains(result.out, "  my pick\n")) << result.out;
  EXPECT_TRUE(contains(result.out, "quest")) << result.out;
  const auto json = read_json(path("l.json"));
  ASSERT_GT(json["rows"].size(), 2u);
  for (const auto& row : json["rows"]) {
    const bool named = row["pipeline"] == "fp16+fp16 > full(pinned=64) > gather_attention";
    EXPECT_EQ(row.value("label", "") == "my pick", named) << row;
  }
}

TEST_F(Cli, CompareTakesSeveralConfigsOfOneSource) {
  const std::string oracle =
      tiny("o.yaml",
           "pipelines: [fp16+fp16 > oracle(budget=32) > gather_attention,\n"
           "            fp16+fp16 > random(budget=32) > gather_attention]\n");
  const Result result = sikv({"compare", tiny_quest(), oracle, "--json", "c.json"});
  ASSERT_EQ(result.code, 0) << result.err;
  EXPECT_EQ(read_json(path("c.json"))["rows"].size(), 3u);
  const std::string other =
      tiny("other.yaml", "pipeline: fp16+fp16 > full > dense_attention\n", "context: 700");
  refused({"compare", tiny_quest(), other},
          {"quest.yaml and other.yaml differ in source.synthetic.context,"});
  const std::string full = "pipeline: fp16+fp16 > full > dense_attention\n";
  refused({"compare", tiny_quest(), tiny("steps.yaml", full + "measure: {steps: 2}\n")},
          {"differ in measure.steps,"});
  refused({"compare", tiny_quest(), tiny("seed.yaml", full, "context: 600, seed: 2")},
          {"differ in source.synthetic.seed,"});
}

TEST_F(Cli, CompareHasBothBoundsAtEveryBudget) {
  // The oracle stands at one budget; quest's is its default.
  const std::string config = tiny("c.yaml",
                                  "pipelines:\n"
                                  "  - fp16+fp16 > oracle(budget=32) > gather_attention\n"
                                  "  - fp16+fp16 > streaming(budget=16) > gather_attention\n"
                                  "  - fp16+fp16 > quest > gather_attention\n");
  const Result result = sikv({"compare", config, "--json", "c.json"});
  ASSERT_EQ(result.code, 0) << result.err;
  std::map<std::string, std::set<int>> budgets;
  const auto json = read_json(path("c.json"));
  for (const auto& row : json["rows"]) {
    for (const char* bound : {"> oracle(", "> random("}) {
      if (!contains(row["pipeline"], bound)) continue;
      EXPECT_TRUE(budgets[bound].insert(row["budget"].get<int>()).second) << row["pipeline"];
    }
  }
  EXPECT_EQ(budgets["> oracle("].size(), 3u);
  EXPECT_EQ(budgets["> oracle("], budgets["> random("]);
}

TEST_F(Cli, CompareGoesOnAfterCtrlC) {
  std::string config = "pipelines:\n";
  for (int seed = 1; seed <= 60; ++seed) {
    config += fmt::format("  - fp16+fp16 > random(budget=16,seed={}) > gather_attention\n", seed);
  }
  const Words words = {
      "compare", tiny("many.yaml", config, "context: 2048"), "--json", "c.json", "--csv", "c.csv"};
  const Result stopped = interrupted(words, [&] { return fs::exists(path("c.json")); });
  EXPECT_EQ(stopped.code, 130) << stopped.err;
  EXPECT_TRUE(contains(stopped.err, "interrupted")) << stopped.err;
  EXPECT_TRUE(contains(stopped.err, "of 61 rows; the same command goes on")) << stopped.err;
  EXPECT_TRUE(contains(stopped.out, "random(budget=16,seed=1")) << stopped.out;
  const auto partial = read_json(path("c.json"));
  const size_t first_rows = partial["rows"].size();
  EXPECT_GE(first_rows, 1u);
  ASSERT_LT(first_rows, 61u);
  EXPECT_EQ(partial["partial"], fmt::format("{} of 61 rows", first_rows));
  EXPECT_TRUE(fs::exists(path("c.csv.partial")));
  EXPECT_FALSE(fs::exists(path("c.csv")));

  const Result finished = sikv(words);
  ASSERT_EQ(finished.code, 0) << finished.err;
  EXPECT_TRUE(contains(finished.err, fmt::format("{} of 61 rows are those of c.json", first_rows)))
      << finished.err;
  const auto whole = read_json(path("c.json"));
  EXPECT_FALSE(whole.contains("partial"));
  ASSERT_EQ(whole["rows"].size(), 61u);
  for (size_t i = 0; i < first_rows; ++i) EXPECT_EQ(whole["rows"][i], partial["rows"][i]);
  EXPECT_FALSE(fs::exists(path("c.csv.partial")));
  const std::string csv = read_text(path("c.csv"));
  EXPECT_EQ(std::count(csv.begin(), csv.end(), '\n'), 62);
}

// What is there of a fuller comparison stays until the new one is whole.
TEST_F(Cli, CompareKeepsAFullerResultUntilItIsDone) {
  const Words full = {"compare", tiny_quest(), "--set", "budgets=[16, 32]", "--json", "c.json"};
  ASSERT_EQ(sikv(full).code, 0);
  ASSERT_EQ(read_json(path("c.json"))["rows"].size(), 6u);
  const Result fewer = sikv({"compare", tiny_quest(), "--json", "c.json"});
  EXPECT_EQ(fewer.code, 0) << fewer.err;
  EXPECT_TRUE(contains(fewer.err, "3 of 3 rows are those of c.json")) << fewer.err;
  EXPECT_TRUE(contains(fewer.err, "c.json keeps 3 rows of other pipelines")) << fewer.err;
  const std::string kept = read_text(path("c.json"));
  EXPECT_EQ(read_json(path("c.json"))["rows"].size(), 6u);

  const auto other = [](const char* set) {
    return Words{"compare", "quest.yaml", "--json", "c.json", "--set", set};
  };
  refused(other("measure.steps=2"),
          {"c.json holds 6 rows measured otherwise (measure.steps is 0 there and 2 here): name "
           "another file, or remove it"});
  refused(other("measure.metrics=[recall]"), {"6 rows", "measure.metrics", "[\"recall\"] here"});
  refused(other("source.synthetic.context=700"), {"6 rows", "(source is '", "600"});
  EXPECT_EQ(read_text(path("c.json")), kept);

  write_file(path("old.json"), R"({"environment": {}, "rows": [{"pipeline": "a"}]})");
  refused({"compare", tiny_quest(), "--json", "old.json"}, {"old.json", "holds no comparison"});
}

TEST_F(Cli, BudgetsThatNothingTakesAreTheBounds) {
  const Result result = sikv({"compare",
                              tiny("b.yaml",
                                   "pipelines: [rot_lm+rot_lm > full > gather_attention,\n"
                                   "            fp16+fp16 > magicpig > gather_attention]\n"
                                   "budgets: [16, 64]\n"),
                              "--json", "b.json"});
  ASSERT_EQ(result.code, 0) << result.err;
  EXPECT_EQ(result.err,
            "note: b.yaml: budgets do not apply to magicpig, full, which have no budget to set\n");
  EXPECT_TRUE(
      contains(result.out,
               "oracle, random: bounds that compare adds; oracle over rot_lm+rot_lm, as the "
               "first pipeline, random over fp16+fp16\n"))
      << result.out;
  std::multiset<int> budgets;
  const auto json = read_json(path("b.json"));
  for (const auto& row : json["rows"]) {
    if (row["budget"].is_number()) budgets.insert(row["budget"].get<int>());
  }
  EXPECT_EQ(budgets, (std::multiset<int>{16, 16, 64, 64}));
}

TEST_F(Cli, BudgetsSayWhatTheyStandInFor) {
  const Result result = sikv({"compare", tiny_quest(), "--set", "budgets=[16, 64]"});
  EXPECT_EQ(result.code, 0) << result.err;
  EXPECT_TRUE(contains(result.err, "quest.yaml: budgets [16, 64] stand in for budget=32 of quest"))
      << result.err;
  refused({"compare", tiny("s.yaml", "pipelines: [fp16+fp16 > full > gather_attention]\n"), "--set",
           "pipeline.device=cpu"},
          {"--set pipeline.device=cpu", "a list of pipelines", "pipelines.0.device"});
}

TEST_F(Cli, ABudgetBelowTheWindowThatIsKeptIsTold) {
  const auto err_of = [&](const std::string& selector) {
    return sikv({"explain",
                 tiny("w.yaml", "pipeline: fp16+fp16 > " + selector + " > gather_attention\n")})
        .err;
  };
  EXPECT_TRUE(contains(err_of("snapkv(budget=16,window=24)"),
                       "budget=16 of snapkv is below its window=24, which is kept whatever"));
  EXPECT_TRUE(contains(err_of("adakv(base=laprox(budget=16))"), "is below its window=32"));
  EXPECT_EQ(err_of("snapkv(budget=24,window=24)"), "");
  // Its window is of queries.
  EXPECT_FALSE(contains(err_of("self_index(budget=16)"), "window"));
}

TEST_F(Cli, ABudgetOfNothingHasNoRecall) {
  const Result result = sikv({"compare", tiny_quest(), "--set", "budgets=[0]"});
  ASSERT_EQ(result.code, 0) << result.err;
  EXPECT_TRUE(contains(result.err, "budget=0 of quest selects nothing")) << result.err;
  EXPECT_TRUE(contains(result.out, "budget 0\n")) << result.out;
  EXPECT_FALSE(contains(result.out, "1.000")) << result.out;
}

// A table by memory class with a second source, and the same without its trace.
TEST_F(Cli, CompareByMemoryMarksWhatRowsRestOn) {
  ASSERT_EQ(sikv({"dataset", "synth", "--out", "full.h5", "--context", "600", "--steps", "3",
                  "--layers", "3", "--query-heads", "2", "--kv-heads", "1"})
                .code,
            0);
  const std::string config =
      tiny("league.yaml",
           "sources:\n"
           "  full: {trace: full.h5, make: a script, prompt: 600, steps: 3, judge: [0, 2]}\n"
           "  other: {trace: gone.h5, make: another script}\n"
           "pipelines:\n"
           "  - {label: dense, pipeline: fp16+fp16 > full > gather_attention}\n"
           "  - {label: Quest, source: full, fitted: nothing much,\n"
           "     pipeline: fp16+fp16 > quest > gather_attention}\n"
           "  - {label: index, reconstruction: all of it,\n"
           "     pipeline: rot_lm+rot_lm > self_index > sparse_flash}\n"
           "  - {label: lost, source: other, pipeline: rot_lm+rot_lm > full > sparse_flash}\n"
           "budgets: [16, 64]\n"
           "group_by: memory\n"
           "measure: {metrics: [recall, dropped_mass, output_error]}\n");
  const Result result = sikv({"compare", config, "--json", "l.json", "--svg", "l.svg"});
  ASSERT_EQ(result.code, 0) << result.err;
  EXPECT_TRUE(contains(result.err,
                       "left out: lost: they run on gone.h5, which is not there; another "
                       "script makes it"))
      << result.err;
  for (const char* part :
       {"as fp16 or larger", "times smaller than fp16", "Quest [full] +\n", "index ~\n",
        "nothing much", "all of it", "3 layers, 2 of them judged", " PP ",
        "      Quest: could run on the first source", "left out are pinned tokens"}) {
    EXPECT_TRUE(contains(result.out, part)) << part << "\n" << result.out;
  }
  const auto json = read_json(path("l.json"));
  const Result explained = sikv({"explain", config});
  EXPECT_EQ(explained.code, 0) << explained.err;
  EXPECT_TRUE(contains(explained.out, "gone.h5 is not there; another script makes it"))
      << explained.out;
  EXPECT_EQ(json["left_out"][0]["labels"], (std::vector<std::string>{"lost"}));
  ASSERT_EQ(json["rows"].size(), 5u + 4u);  // and both bounds at both budgets
  for (const auto& row : json["rows"]) {
    EXPECT_TRUE(row["bytes_read"]["scan"].is_number()) << row;
    EXPECT_TRUE(row["bytes_read"]["attended"].is_number()) << row;
    EXPECT_GE(row["metrics"]["memory_per_token"], row["metrics"]["bytes_per_token"]) << row;
  }
  EXPECT_EQ(json["rows"][1]["label"], "Quest");
  EXPECT_EQ(json["rows"][1]["source_name"], "full");
  // 600 tokens are 512 encoded ones: 32 summaries of 2 x 64 channels in fp16.
  EXPECT_EQ(json["rows"][1]["bytes_read"]["scan"], 32 * 2 * 64 * 2);
  EXPECT_TRUE(contains(read_text(path("l.svg")), ">Quest<"));
  refused({"compare", config, "--svg", config}, {config, "is not a figure"});
  // Two outputs in one file, however it is spelt.
  for (const auto& [first, second] :
       {std::pair("--json", "--csv"), {"--json", "--svg"}, {"--csv", "--svg"}}) {
    refused({"compare", config, first, "same", second, "./same"},
            {first, second, "both name ./same: give each its own file"});
    refused({"compare", config, second, "same", first, "same"}, {"both name same"});
    EXPECT_FALSE(fs::exists(path("same")));
  }
}

// Recall is of the best `budget` tokens, of which a top-p leaves most out.
TEST_F(Cli, CompareByMemoryTellsTokensSelected) {
  const std::string config = tiny("few.yaml",
                                  "pipelines:\n"
                                  "  - {label: nucleus, pipeline: 'fp16+fp16 > "
                                  "twilight(p=0.8,base=quest(budget=256),pinned=0) > "
                                  "gather_attention'}\n"
                                  "group_by: memory\n",
                                  "context: 1500");
  const Result result = sikv({"compare", config, "--json", "few.json"});
  ASSERT_EQ(result.code, 0) << result.err;
  EXPECT_TRUE(contains(result.out, "Recall is of the best `budget` tokens")) << result.out;
  const auto rows = read_json(path("few.json"))["rows"];
  const double selected = rows[0]["tokens_selected"];
  EXPECT_GT(selected, 0);
  EXPECT_LT(selected, 200);
  EXPECT_LE(rows[0]["metrics"]["recall"]["mean"], selected / 256);
  EXPECT_TRUE(contains(result.out, fmt::format("   256  {:8.0f}  ", selected))) << result.out;
  EXPECT_EQ(rows[1]["tokens_selected"], 256);  // the oracle
}

// ---- throughput ---------------------------------------------------------------------------------

constexpr const char* kSweep =
    "pipelines:\n"
    "  - rot_lm+rot_lm > self_index(budget=64,tables=6bit) > sparse_flash\n"
    "  - fp16+fp16 > full(pinned=0) > dense_attention\n"
    "measure: {steps: 2, warmup: 1}\n";

TEST_F(Cli, ThroughputMeasuresAndResumes) {
  const std::string config = tiny("t.yaml", kSweep, "context: 1024, batch: [1, 3]");
  const Result first = sikv({"throughput", config, "--json", "t.json"});
  ASSERT_EQ(first.code, 0) << first.err;
  EXPECT_EQ(first.err, "");
  EXPECT_TRUE(contains(first.out, "context 1024, batch 3")) << first.out;
  const auto json = read_json(path("t.json"));
  ASSERT_EQ(json["rows"].size(), 4u);
  for (const auto& row : json["rows"]) {
    EXPECT_EQ(row["context"], 1024);
    EXPECT_GT(row["memory"]["total"], 0);
    EXPECT_GT(row["attention_tokens_per_s"], 0);
    EXPECT_GT(row["ratio_to_dense"], 0);
    const double us = row["latency_us"]["select"]["mean"].get<double>() +
                      row["latency_us"]["attend"]["mean"].get<double>();
    EXPECT_NEAR(row["attention_tokens_per_s"], row["batch"].get<double>() / us * 1e6, 1e-3 / us);
    EXPECT_EQ(row["latency_us"]["prefill"].size(), 3u);
    for (const char* stage : {"append", "select", "attend"}) {
      EXPECT_TRUE(row["latency_us"][stage]["median"].is_number()) << stage;
    }
    if (!row["dense"].is_null()) {
      EXPECT_EQ(row["dense"]["same_batch"], true);
      EXPECT_EQ(row["dense"]["batch"], row["batch"]);
    }
  }
  const Result again = sikv({"throughput", config, "--json", "t.json"});
  EXPECT_EQ(again.code, 0);
  EXPECT_TRUE(contains(again.err, "4 of 4 rows were there already")) << again.err;
  EXPECT_EQ(read_json(path("t.json")), json);
  // Another setup is another row, and takes nothing away.
  const Result other = sikv({"throughput", config, "--json", "t.json", "--set", "measure.steps=3",
                             "--set", "source.synthetic.batch=1"});
  EXPECT_EQ(other.code, 0) << other.err;
  EXPECT_EQ(read_json(path("t.json"))["rows"].size(), 6u);
}

TEST_F(Cli, ThroughputRowsOfAnotherMachineKeepTheirEnvironment) {
  const std::string config = tiny("t.yaml", kSweep, "context: 512, batch: 1");
  ASSERT_EQ(sikv({"throughput", config, "--json", "t.json"}).code, 0);
  // In order: a setup with its keys sorted is not recognised.
  const auto whole = nlohmann::ordered_json::parse(read_text(path("t.json")));
  ASSERT_EQ(whole["rows"].size(), 2u);  // dense, sparse
  for (const size_t lost : {0, 1}) {
    auto json = whole;
    json["environment"]["cpu"] = "another";
    json["rows"].erase(lost);
    write_file(path("t.json"), json.dump());
    const Result result = sikv({"throughput", config, "--json", "t.json"});
    ASSERT_EQ(result.code, 0) << result.err;
    json = nlohmann::ordered_json::parse(read_text(path("t.json")));
    EXPECT_NE(json["environment"]["cpu"], "another");
    // A sparse row needs dense attention of its own machine beside it.
    ASSERT_EQ(json["rows"].size(), 2u + lost);
    EXPECT_EQ(json["rows"][0]["environment"]["cpu"], "another");
    for (size_t i = 1; i < json["rows"].size(); ++i) {
      EXPECT_FALSE(json["rows"][i].contains("environment"));
    }
    if (lost == 1) {
      EXPECT_EQ(json["rows"][2]["dense"]["attention_tokens_per_s"],
                json["rows"][1]["attention_tokens_per_s"]);
    }
  }
}

TEST_F(Cli, ThroughputFillsTheMemoryItIsGiven) {
  const std::string config = tiny("t.yaml", kSweep, "context: 1024, batch: max");
  const Result result = sikv({"throughput", config, "--json", "t.json", "--memory", "4MiB"});
  ASSERT_EQ(result.code, 0) << result.err;
  int largest = 0, dense = 0;
  const auto json = read_json(path("t.json"));
  for (const auto& row : json["rows"]) {
    EXPECT_LE(row["memory"]["total"], 4 << 20) << row["pipeline"];
    const bool is_dense = contains(row["pipeline"], "dense_attention");
    if (row["batch_asked"] == "max") (is_dense ? dense : largest) = row["batch"];
    if (!is_dense) {
      EXPECT_EQ(row["dense"]["same_batch"], false);
      EXPECT_LT(row["dense"]["batch"], row["batch"]);
    }
  }
  EXPECT_GE(dense, 2);
  EXPECT_GT(largest, dense);
  EXPECT_TRUE(contains(result.out, "(dense at ")) << result.out;
}

TEST_F(Cli, ThroughputKnowsThatAPoolDoesNotGrow) {
  // The pool holds 2048 candidates at any length: at this one it takes little of what pages take.
  const std::string config =
      tiny("t.yaml",
           "pipeline: rot_lm+rot_lm > self_index(budget=512,rerank=4,scan_every=4) > sparse_flash\n"
           "measure: {steps: 1, warmup: 0}\n",
           "context: 16384, batch: max");
  constexpr double kRoom = 32 << 20;
  const Result result = sikv({"throughput", config, "--json", "t.json", "--memory", "32MiB"});
  ASSERT_EQ(result.code, 0) << result.err;
  const auto row = read_json(path("t.json"))["rows"].back();
  const double total = row["memory"]["total"], batch = row["batch"];
  EXPECT_LE(total, kRoom);
  EXPECT_GT(total * (batch + 1) / batch, kRoom) << "one more sequence would fit";
}

TEST_F(Cli, ThroughputSaysWhatFits) {
  const std::string config = tiny("t.yaml", kSweep, "context: 4096, batch: 64");
  refused({"throughput", config, "--memory", "20MiB"}, {"4096", "64", "largest batch that fits"});
  refused({"throughput", config, "--memory", "600KiB"}, {"the longest context that does is"});
  refused({"throughput", config, "--memory", "1KiB"}, {"not even of a single page (256 tokens)"});
}

TEST_F(Cli, ThroughputDoesNotOverwriteOtherFiles) {
  const std::string config = tiny("t.yaml", kSweep, "context: 512, batch: 1");
  write_file(path("notes.json"), "{\"mine\": 1}");
  refused({"throughput", config, "--json", "notes.json"}, {"notes.json", "name another file"});
  write_file(path("text"), "not json");
  refused({"throughput", config, "--json", "text"}, {"text", "name another file"});
}

TEST_F(Cli, ThroughputKeepsFinishedRowsAfterCtrlC) {
  std::string batches = "1";
  for (int batch = 2; batch <= 60; ++batch) batches += fmt::format(", {}", batch);
  const std::string config =
      tiny("t.yaml", kSweep, fmt::format("context: 4096, batch: [{}]", batches));
  const Result result = interrupted({"throughput", config, "--json", "t.json"},
                                    [&] { return fs::exists(path("t.json")); });
  EXPECT_EQ(result.code, 130) << result.err;
  const auto json = read_json(path("t.json"));
  ASSERT_FALSE(json.is_discarded());
  const size_t kept = json["rows"].size();
  EXPECT_GE(kept, 1u);
  EXPECT_LT(kept, 120u);
  for (const auto& entry : fs::directory_iterator(path("."))) {
    EXPECT_NE(entry.path().extension(), ".partial") << entry.path();
  }
  // It goes on from there: the first batch is not measured again.
  const Result again =
      sikv({"throughput", config, "--json", "t.json", "--set", "source.synthetic.batch=1"});
  EXPECT_EQ(again.code, 0) << again.err;
  EXPECT_TRUE(contains(again.err, "of 2 rows were there already")) << again.err;
}

// ---- the rest -----------------------------------------------------------------------------------

TEST_F(Cli, ExplainTellsChoicesAndMemory) {
  const Result result = sikv({"explain", tiny_quest()});
  ASSERT_EQ(result.code, 0) << result.err;
  for (const char* part : {"raw(dtype=fp16).v1", "runs: highest score", "bytes/token", "dense fp16",
                           "largest batch", "nothing was run"}) {
    EXPECT_TRUE(contains(result.out, part)) << part << "\n" << result.out;
  }
  const Result forced = sikv({"explain", tiny_quest(), "--force", "selector=ref"});
  EXPECT_TRUE(contains(forced.out, "runs: forced")) << forced.out;
}

TEST_F(Cli, ExplainPlansWhatRunWouldRun) {
  const std::string config = SIKV_SOURCE_DIR "/configs/self_index.yaml";
  EXPECT_TRUE(contains(sikv({"explain", config}).out, "  6 layers, batch 1, 4095 tokens each"));
  for (const char* wrong : {"source.layers=[8]", "source.prompt=5000", "source.steps=200"}) {
    const Result explained = sikv({"explain", config, "--set", wrong});
    EXPECT_EQ(explained.code, 2) << wrong;
    EXPECT_EQ(explained.err, sikv({"run", config, "--set", wrong}).err);
  }
}

// As many bytes as run finds there, and not those of the prompt.
TEST_F(Cli, ExplainShowsWhatIsHeldAfterEvictions) {
  const std::string config =
      tiny("evicts.yaml", "pipeline: fp16+fp16 > snapkv(budget=192) > gather_attention\n",
           "context: 1500");
  const auto total_of = [](const std::string& text) {
    const size_t at = text.find("\n  total ");
    return text.substr(at, text.find('\n', at + 1) - at);
  };
  const Result explained = sikv({"explain", config});
  ASSERT_EQ(explained.code, 0) << explained.err;
  EXPECT_EQ(total_of(explained.out), total_of(sikv({"run", config}).out)) << explained.out;
  EXPECT_TRUE(contains(explained.out, "held after the prompt's evictions: 256 encoded tokens"))
      << explained.out;
  EXPECT_TRUE(contains(explained.out, "before anything is evicted: ")) << explained.out;
  EXPECT_FALSE(contains(sikv({"explain", tiny_quest()}).out, "evict"));
}

TEST_F(Cli, EveryShippedConfigIsValid) {
  int configs = 0;
  for (const auto& entry : fs::directory_iterator(SIKV_SOURCE_DIR "/configs")) {
    if (entry.path().extension() != ".yaml") continue;
    ++configs;
    const Result result = sikv({"explain", entry.path().string()});
    const bool needs_gpu = entry.path().stem().string().ends_with("_cuda");
    // Selectors that the shipped trace does not suffice for say what would.
    EXPECT_TRUE(result.code == 0 || (needs_gpu && contains(result.err, "device cuda: ")) ||
                contains(result.err, "use a trace made by datasets/capture with "))
        << result.err;
    EXPECT_TRUE(read_text(entry.path()).starts_with("# ")) << entry.path();
  }
  EXPECT_GE(configs, 9);
}

TEST_F(Cli, PluginsAreListedAndShown) {
  const Result list = sikv({"plugins"});
  ASSERT_EQ(list.code, 0) << list.err;
  for (const char* part : {"key_codec", "rot_lm", "selector", "quest", "gather_attention"}) {
    EXPECT_TRUE(contains(list.out, part)) << part << "\n" << list.out;
  }
  EXPECT_EQ(sikv({"plugins", "list"}).out, list.out);
  const Result quest = sikv({"plugins", "show", "selector/quest"});
  for (const char* part : {"budget", "page_tokens", "pinned", "default", "rlm4"}) {
    EXPECT_TRUE(contains(quest.out, part)) << part << "\n" << quest.out;
  }
  const Result codec = sikv({"plugins", "show", "rot_lm"});
  EXPECT_TRUE(contains(codec.out, "key codec rot_lm")) << codec.out;
  EXPECT_TRUE(contains(codec.out, "value codec rot_lm")) << codec.out;
}

TEST_F(Cli, FasterPathsOfAPluginAreShown) {
  fs::create_directories(path("toys"));
  fs::copy(SIKV_TOY_LIBRARY, path("toys"));
  const Result shown = sikv({"plugins", "show", "kernel/toy", "--plugin-path", "toys"});
  ASSERT_EQ(shown.code, 0) << shown.err;
  EXPECT_TRUE(contains(shown.out, "    chosen at run time: sm_90 on: plays faster\n")) << shown.out;
}

TEST_F(Cli, EveryPluginCanBeShown) {
  for (const char* kind : {"key_codec", "value_codec", "selector", "kernel"}) {
    const Result refusal = sikv({"plugins", "show", std::string(kind) + "/?"});
    ASSERT_EQ(refusal.code, 2);
    const size_t from = refusal.err.find("there are ");
    ASSERT_NE(from, std::string::npos) << refusal.err;
    const size_t end = refusal.err.find(';', from);
    ASSERT_NE(end, std::string::npos) << refusal.err;
    std::istringstream names(refusal.err.substr(from + 10, end - from - 10));
    for (std::string id; std::getline(names >> std::ws, id, ',');) {
      const Result result = sikv({"plugins", "show", std::string(kind) + "/" + id});
      EXPECT_EQ(result.code, 0) << id << ": " << result.err;
    }
  }
}

TEST_F(Cli, RefusedLibrariesAreToldWithTheReason) {
  fs::create_directories(path("more"));
  write_file(path("more/libsikv-selector-broken-cpu.so"), "this is no library");
  const Result list = sikv({"plugins", "list", "--plugin-path", "more"});
  EXPECT_EQ(list.code, 0) << list.err;
  EXPECT_TRUE(contains(list.out, "Refused")) << list.out;
  EXPECT_TRUE(contains(list.out, "libsikv-selector-broken-cpu.so: it ")) << list.out;
  const std::string config = tiny("b.yaml", "pipeline: fp16+fp16 > broken > gather_attention\n");
  refused({"run", config, "--plugin-path", "more"}, {"broken", "refused"});
  refused({"plugins", "--plugin-path", "nowhere"}, {"nowhere"});
}

TEST_F(Cli, FoldersWithoutPluginsAreRefused) {
  fs::create_directories(path("empty"));
  fs::create_directories(path("built/lib/sikv/plugins"));
  refused({"plugins", "--plugin-path", "empty"},
          {"--plugin-path: the plugin folder 'empty' holds no plugin library (lib*.so)"});
  refused({"plugins", "--plugin-path", "built"}, {"did you mean built/lib/sikv/plugins?"});
  refused({"run",
           tiny("p.yaml", "plugin_path: [empty]\npipeline: fp16+fp16 > full > gather_attention\n")},
          {"p.yaml:5:", "the plugin folder 'empty' holds no plugin library"});
  for (const char* folder : {"empty", "gone"}) {
    setenv("SIKV_PLUGIN_PATH", folder, 1);
    refused({"plugins"}, {"SIKV_PLUGIN_PATH: the plugin folder '" + std::string(folder) + "' "});
  }
  unsetenv("SIKV_PLUGIN_PATH");
}

TEST_F(Cli, DatasetsAreMadeReadAndChecked) {
  const Words synth = {"dataset", "synth", "--kind",  "needle", "--context", "600",
                       "--steps", "4",     "--dtype", "bf16",   "--out",     "needle.h5"};
  ASSERT_EQ(sikv(synth).code, 0);
  const Result info = sikv({"dataset", "info", "needle.h5"});
  for (const char* part : {"synthetic-needle", "bf16", "604", "536"}) {
    EXPECT_TRUE(contains(info.out, part)) << part << "\n" << info.out;
  }
  EXPECT_TRUE(contains(sikv({"dataset", "check", "needle.h5"}).out, "sound"));
  write_file(path("bad.h5"), "not hdf5");
  refused({"dataset", "check", "bad.h5"}, {"bad.h5"});
  refused({"dataset", "info", "none.h5"}, {"none.h5"});
  refused({"dataset", "synth", "--kind", "needl", "--out", "x.h5"}, {"needl", "needle"});
  refused({"dataset", "synth", "--out", "/dev/full"}, {"/dev/full"});
  // What was made can be run.
  write_file(path("n.yaml"),
             "source: {trace: needle.h5, prompt: 600, steps: 4}\n"
             "pipeline: rot_lm+rot_lm > self_index(budget=32) > sparse_flash\n");
  EXPECT_EQ(sikv({"run", "n.yaml"}).code, 0);
}

TEST_F(Cli, DatasetPcaWritesWhatLokiReads) {
  ASSERT_EQ(sikv({"dataset", "synth", "--out", "t.h5", "--context", "600", "--steps", "3",
                  "--layers", "2", "--query-heads", "2", "--kv-heads", "1"})
                .code,
            0);
  const Result written = sikv({"dataset", "pca", "t.h5", "-o", "t.pca", "--tokens", "500"});
  ASSERT_EQ(written.code, 0) << written.err;
  const std::string file = read_text(path("t.pca"));
  EXPECT_TRUE(file.starts_with("SIKVPCA1"));
  EXPECT_EQ(file.size(), 8u + 16 + 2 * 4 + 2 * (64 + 64 + 64 * 64) * 4);
  write_file(path("loki.yaml"),
             "source: {trace: t.h5, prompt: 600, steps: 3}\n"
             "pipeline:\n  keys: {codec: fp16}\n  values: {codec: fp16}\n"
             "  selector: {name: loki, budget: 32, pca: t.pca}\n"
             "  attention: {kernel: gather_attention}\n");
  EXPECT_EQ(sikv({"run", "loki.yaml"}).code, 0);
  ASSERT_EQ(sikv({"dataset", "pca", "t.h5", "-o", "t.pca", "--layers", "1"}).code, 0);
  refused({"run", "loki.yaml"}, {"t.pca", "1 layers"});
  ASSERT_EQ(sikv({"dataset", "pca", "t.h5", "-o", "t.pca", "--layers", "1,0"}).code, 0);
  refused({"run", "loki.yaml"}, {"t.pca", "layers 1,0", "0,1"});
  EXPECT_EQ(sikv({"run", "loki.yaml", "--set", "source.layers=[1, 0]"}).code, 0);
  refused({"dataset", "pca", "t.h5", "-o", "t.pca", "--layers", "7"}, {"t.h5", "layer 7"});
  refused({"dataset", "pca", "t.h5", "-o", "t.pca", "--tokens", "1000"}, {"--tokens", "603"});
  refused({"dataset", "pca", "t.h5", "-o", "t.h5"}, {"t.h5", "is not a PCA file"});
}

TEST_F(Cli, SchemaIsJson) {
  const Result result = sikv({"schema"});
  ASSERT_EQ(result.code, 0);
  const auto schema = nlohmann::json::parse(result.out, nullptr, false);
  EXPECT_TRUE(schema.contains("properties"));
  EXPECT_TRUE(contains(result.out, "page_tokens"));
  ASSERT_EQ(sikv({"schema", "--out", "schema.json"}).code, 0);
  EXPECT_EQ(read_json(path("schema.json")), schema);
}

TEST_F(Cli, NewPluginsAreNamedThroughout) {
  for (const char* kind : {"key_codec", "value_codec", "selector", "kernel"}) {
    const std::string name = std::string("fresh_") + kind;
    const Result result = sikv({"new-plugin", kind, name});
    ASSERT_EQ(result.code, 0) << result.err;
    for (const char* file : {"CMakeLists.txt", "README.md"}) {
      EXPECT_TRUE(contains(read_text(path(name) / file), name)) << kind << " " << file;
    }
    const std::string source = read_text(path(name) / (name + ".cc"));
    EXPECT_TRUE(contains(source, "SIKV_PLUGIN(\"" + name + "\"")) << source;
    EXPECT_FALSE(contains(source, "my_")) << source;
  }
  ASSERT_EQ(sikv({"new-plugin", "kernel", "other", "--out", "deep/folder"}).code, 0);
  EXPECT_TRUE(fs::exists(path("deep/folder/other.cc")));
  // Not a class that the SDK has.
  ASSERT_EQ(sikv({"new-plugin", "selector", "plan"}).code, 0);
  EXPECT_TRUE(contains(read_text(path("plan/plan.cc")), "class PlanSelector final"));
}

TEST_F(Cli, NewPluginRefusesBadNames) {
  refused({"new-plugin", "slector", "x"}, {"did you mean 'selector'?"});
  for (const char* name : {"Quest", "2fast", "a-b", "a/b", "", "_x"}) {
    refused({"new-plugin", "selector", name}, {fmt::format("'{}'", name), "lower case"});
  }
  refused({"new-plugin", "selector", std::string(32, 'a')}, {"31 characters"});
  refused({"new-plugin", "selector", "quest"}, {"quest", "already"});
  fs::create_directories(path("taken"));
  refused({"new-plugin", "selector", "taken"}, {"taken", "--out"});
}

}  // namespace
}  // namespace sikv
