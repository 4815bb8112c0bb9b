// sikv eval, sikv generate and sikv throughput --model as their users meet them, on the tiny models
// of datasets/tiny.
#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

namespace sikv {
namespace {

namespace fs = std::filesystem;

struct Result {
  int code;
  std::string text;  // stdout and stderr
};

const std::string kTiny = SIKV_SOURCE_DIR "/datasets/tiny/llama.h5";

class ModelCli : public testing::Test {
 protected:
  ModelCli()
      : folder_(fs::path(testing::TempDir()) /
                ("sikv_model_cli_" + std::to_string(getpid()) + "_" +
                 testing::UnitTest::GetInstance()->current_test_info()->name())) {
    fs::create_directories(folder_);
    std::string text;
    for (int i = 0; i < 400; ++i) text += "the " + std::to_string(i) + " things there, ";
    write("text.txt", text);
    write("eval.yaml", "source: {trace: '" SIKV_SOURCE_DIR
                       "/datasets/smollm2-135m-4k.h5'}\n"
                       "budgets: [16, 64]\n"
                       "pipelines:\n"
                       "  - rot_lm+rot_lm > self_index(rerank=2,pinned=8) > gather_attention\n"
                       "  - fp16+fp16 > full(pinned=8) > gather_attention\n");
  }
  ~ModelCli() override { fs::remove_all(folder_); }

  fs::path path(const std::string& name) const { return folder_ / name; }
  void write(const std::string& name, const std::string& text) const {
    std::ofstream(path(name)) << text;
  }

  // Words with blanks come quoted.
  Result sikv(const std::string& words) const {
    const std::string command =
        "cd '" + folder_.string() + "' && '" SIKV_BINARY "' " + words + " 2>&1";
    std::FILE* const pipe = popen(command.c_str(), "r");
    Result result{-1, ""};
    std::array<char, 4096> buffer;
    for (size_t n; (n = std::fread(buffer.data(), 1, buffer.size(), pipe)) > 0;) {
      result.text.append(buffer.data(), n);
    }
    const int status = pclose(pipe);
    if (WIFEXITED(status)) result.code = WEXITSTATUS(status);
    return result;
  }

  void refused(const std::string& words, const std::string& part) const {
    const Result result = sikv(words);
    EXPECT_EQ(result.code, 2) << words << "\n" << result.text;
    EXPECT_EQ(std::count(result.text.begin(), result.text.end(), '\n'), 1) << result.text;
    EXPECT_NE(result.text.find(part), std::string::npos) << result.text;
  }

  static bool contains(const std::string& text, const std::string& part) {
    return text.find(part) != std::string::npos;
  }

  std::string eval(const std::string& more, int prompt = 600) const {
    return "eval eval.yaml --model " + kTiny + " --steps 4 --prompt " + std::to_string(prompt) +
           " " + more;
  }

 private:
  fs::path folder_;
};

TEST_F(ModelCli, HelpHasExamples) {
  for (const std::string command : {"eval", "generate"}) {
    const Result result = sikv(command + " --help");
    EXPECT_EQ(result.code, 0);
    EXPECT_TRUE(contains(result.text, "Examples:\n  sikv " + command)) << result.text;
  }
}

TEST_F(ModelCli, EvalWritesRowsAndGoesOnFromThem) {
  const Result first = sikv(eval("--text text.txt --json rows.json"));
  ASSERT_EQ(first.code, 0) << first.text;
  for (const char* part : {"NLL", "KL", "top-1", "scans", "budget 16", "budget 64"}) {
    EXPECT_TRUE(contains(first.text, part)) << part << "\n" << first.text;
  }
  std::ifstream stream(path("rows.json"));
  const auto json = nlohmann::json::parse(stream);
  ASSERT_EQ(json["rows"].size(), 4u);
  const auto& dense = json["rows"][0];
  EXPECT_EQ(dense["pipeline"], "fp16+fp16 > full(pinned=0) > dense_attention");
  EXPECT_TRUE(dense["metrics"]["nll"].is_number());
  EXPECT_EQ(dense["metrics"]["nll_added"], 0);
  const auto& row = json["rows"][1];
  EXPECT_EQ(row["budget"], 16);
  for (const char* what : {"mean", "p95", "p99"}) {
    EXPECT_TRUE(row["metrics"]["kl"][what].is_number()) << what;
  }
  EXPECT_EQ(row["metrics"]["scans_per_step"], 1);
  EXPECT_EQ(row["setup"]["text"], "text.txt");
  EXPECT_EQ(row["setup"]["prompt"], 600);
  EXPECT_TRUE(row["latency_us"]["token"]["median"].is_number());
  EXPECT_TRUE(contains(json["environment"]["command"].get<std::string>(), "sikv eval"));

  const Result again = sikv(eval("--text text.txt --json rows.json"));
  EXPECT_EQ(again.code, 0);
  EXPECT_TRUE(contains(again.text, "4 rows were there already")) << again.text;
}

TEST_F(ModelCli, EvalRefusesBadInput) {
  refused("eval eval.yaml --model none.h5 --text text.txt", "there is no model file none.h5");
  refused("eval eval.yaml --model text.txt --text text.txt", "text.txt is not an HDF5 file");
  refused("eval none.yaml --model " + kTiny + " --text text.txt", "none.yaml");
  refused(eval(""), "there is no text");
  refused(eval("--text none.txt"), "cannot read the text none.txt");
  refused(eval("--text text.txt", 100000), "but 100005 are needed");
  refused(eval("--text text.txt", 2048), "do not fit the context of tiny-llama");
  refused(eval("--text text.txt --kv-type fp8"), "--kv-type");
  refused(eval("--text text.txt --json text.txt"), "holds no evaluation");
  refused(eval("--text text.txt --json out --svg ./out"),
          "--json and --svg both name ./out: give each its own file");
  refused(eval("--text text.txt --text text.txt"), "two texts are called text.txt");
  refused(eval("--trace-tokens " SIKV_SOURCE_DIR "/datasets/smollm2-135m-4k.h5"),
          "is not in the vocabulary of tiny-llama");
  write("latin1.txt", "caf\xe9 " + std::string(4000, 'x'));
  refused(eval("--text latin1.txt"), "latin1.txt: the text is not UTF-8 at byte 3");
  write("bad.yaml", "source: {trace: '" SIKV_SOURCE_DIR
                    "/datasets/smollm2-135m-4k.h5'}\n"
                    "pipeline: fp16+fp16 > self_index > gather_attention\n");
  refused("eval bad.yaml --text text.txt --prompt 600 --steps 4 --model " + kTiny, "self_index");
}

TEST_F(ModelCli, EvalNeedsNoSource) {
  const std::string pipeline = "pipeline: fp16+fp16 > full(pinned=8) > gather_attention\n";
  const std::string rest = " --model " + kTiny + " --text text.txt --steps 4 --prompt 300";
  write("none.yaml", pipeline);
  write("gone.yaml", "source: {trace: gone.h5}\n" + pipeline);
  for (const std::string name : {"none.yaml", "gone.yaml"}) {
    const Result result = sikv("eval " + name + rest);
    EXPECT_EQ(result.code, 0) << result.text;
    refused("run " + name, name == "none.yaml" ? "config lacks 'source'" : "'gone.h5'");
  }
  write("typo.yaml", "source: {trce: gone.h5}\n" + pipeline);
  refused("eval typo.yaml" + rest, "did you mean 'trace'?");
}

TEST_F(ModelCli, TasksGiveGridsAndGoOnFromRows) {
  const std::string words = eval(
      "--text text.txt --tasks passkey,variables --lengths 600,700 --depths 2 --trials 1 "
      "--json tasks.json --svg grid.svg");
  const Result result = sikv(words);
  ASSERT_EQ(result.code, 0) << result.text;
  for (const char* part : {"passkey", "variables", "found", "scans", "700", "100 %"}) {
    EXPECT_TRUE(contains(result.text, part)) << part << "\n" << result.text;
  }
  std::ifstream stream(path("tasks.json"));
  const auto json = nlohmann::json::parse(stream);
  ASSERT_EQ(json["rows"].size(), 2u * 2 * 4);  // tasks x lengths x (dense, 2 budgets, full)
  const auto& row = json["rows"][1];
  EXPECT_EQ(row["setup"]["task"], "passkey");
  EXPECT_EQ(row["setup"]["length"], 600);
  EXPECT_EQ(row["asked"], 2);
  EXPECT_EQ(row["shares"].size(), 2u);
  ASSERT_EQ(row["found_by_prompt"].size(), 2u);
  EXPECT_EQ(row["found_by_prompt"][0].get<int>() + row["found_by_prompt"][1].get<int>(),
            row["found"]);
  EXPECT_EQ(row["scans_per_step"], 1);
  EXPECT_TRUE(row["latency_us"]["token"]["median"].is_number());
  std::ifstream svg(path("grid.svg"));
  EXPECT_TRUE(contains(std::string{std::istreambuf_iterator<char>(svg), {}}, "</svg>"));

  const Result again = sikv(words);
  EXPECT_EQ(again.code, 0) << again.text;
  EXPECT_TRUE(contains(again.text, "16 rows were there already")) << again.text;
}

TEST_F(ModelCli, TasksRefuseBadInput) {
  refused(eval("--text text.txt --tasks multikey"), "did you mean 'multi_key'?");
  refused(eval("--text text.txt --tasks passkey --lengths 100000"), "change --lengths");
  refused(eval("--text text.txt --tasks passkey --lengths 2048"), "do not fit the context");
  refused(eval("--text text.txt --tasks passkey --svg /no/such/folder/x.svg"), "/no/such/folder");
}

TEST_F(ModelCli, RowsOfAnotherBuildAreKeptUntilReplaced) {
  ASSERT_EQ(sikv(eval("--text text.txt --json rows.json")).code, 0);
  std::ifstream stream(path("rows.json"));
  auto json = nlohmann::ordered_json::parse(stream);
  json["environment"]["commit"] = "another";
  json["rows"][0]["setup"]["text"] = "gone.txt";
  write("rows.json", json.dump());
  const Result again = sikv(eval("--text text.txt --json rows.json"));
  ASSERT_EQ(again.code, 0) << again.text;
  EXPECT_FALSE(contains(again.text, "were there already")) << again.text;
  std::ifstream stream_again(path("rows.json"));
  json = nlohmann::ordered_json::parse(stream_again);
  ASSERT_EQ(json["rows"].size(), 5u);
  EXPECT_EQ(json["rows"][0]["environment"]["commit"], "another");
  for (size_t i = 1; i < 5; ++i) EXPECT_FALSE(json["rows"][i].contains("environment"));
}

TEST_F(ModelCli, GenerateStreamsAndCompares) {
  const Result result = sikv("generate --model " + kTiny +
                             " --prompt 'the things' --max-tokens 6 --ignore-stop --compare");
  ASSERT_EQ(result.code, 0) << result.text;
  for (const char* part : {"both texts are the same (6 tokens)", "6 tokens after a prompt of",
                           "second", "tokens/s", "KV", "rot_lm", "dense_attention"}) {
    EXPECT_TRUE(contains(result.text, part)) << part << "\n" << result.text;
  }
}

TEST_F(ModelCli, ThroughputOfAWholeModel) {
  write("speed.yaml",
        "model: {layers: 2, query_heads: 4, kv_heads: 2, head_dim: 64}\n"
        "source: {synthetic: {context: 512, batch: [1, 2]}}\n"
        "pipelines:\n  - rot_lm+rot_lm > self_index(budget=64,pinned=8) > sparse_flash\n"
        "measure: {steps: 3, warmup: 1}\n");
  const std::string words = "throughput speed.yaml --json speed.json --model " + kTiny;
  const Result result = sikv(words);
  ASSERT_EQ(result.code, 0) << result.text;
  for (const char* part : {"tokens/s", "weights", "first", "second", "dense_attention", "rot_lm",
                           "context 512, batch 2"}) {
    EXPECT_TRUE(contains(result.text, part)) << part << "\n" << result.text;
  }
  std::ifstream stream(path("speed.json"));
  const auto json = nlohmann::json::parse(stream);
  ASSERT_EQ(json["rows"].size(), 4u);
  for (const auto& row : json["rows"]) {
    EXPECT_GT(row["tokens_per_s"], 0);
    EXPECT_GT(row["weights_only_tokens_per_s"], 0);
    EXPECT_GT(row["second_token_s"], row["first_token_s"]);
    EXPECT_GT(row["memory"]["total"], 0);
  }
  EXPECT_EQ(json["rows"][0]["ratio_to_dense"], 1);
  EXPECT_EQ(json["rows"][3]["batch"], 2);
  const Result again = sikv(words);
  EXPECT_TRUE(contains(again.text, "4 rows were there already")) << again.text;

  const Result random = sikv(
      "throughput speed.yaml --model random --weights int8 --set source.synthetic.batch=max "
      "--memory 2MiB");
  EXPECT_EQ(random.code, 0) << random.text;
  EXPECT_TRUE(contains(random.text, "random weights")) << random.text;
}

TEST_F(ModelCli, ThroughputRefusesBadInput) {
  write("speed.yaml",
        "model: {preset: llama-3.1-8b}\n"
        "source: {synthetic: {context: 512, batch: 4}}\n"
        "pipelines: [fp16+fp16 > full > dense_attention]\n");
  const std::string throughput = "throughput speed.yaml ";
  refused(throughput + "--model none.h5", "there is no model file none.h5");
  refused(throughput + "--model " + kTiny + " --memory 800KiB", "the largest batch that does is");
  refused(throughput + "--model " + kTiny + " --memory 400KiB",
          "not one sequence of that length fits; the longest context that does is 256");
  refused(throughput + "--model " + kTiny + " --memory 1KiB",
          "not one sequence fits, not even of a single page (256 tokens)");
  refused(throughput + "--model " + kTiny + " --set source.synthetic.context=2048",
          "do not fit the context of tiny-llama");
  refused(throughput + "--model random --set model.layers=4096", "fewer layers");
  refused(throughput + "--model random --weights int4", "--weights");
  refused("throughput eval.yaml --model " + kTiny, "source.synthetic");
}

TEST_F(ModelCli, GenerateRefusesBadInput) {
  const std::string generate = "generate --model " + kTiny + " ";
  refused(generate, "give the prompt as --prompt TEXT or as --prompt-file FILE");
  refused(generate + "--prompt the --prompt-file text.txt", "one of them");
  refused(generate + "--prompt-file none.txt", "cannot read the prompt none.txt");
  refused(generate + "--prompt-file text.txt --max-tokens 2048", "do not fit the context");
  refused(generate + "--prompt the --pipeline 'fp16+fp16 > qest > gather_attention'",
          "did you mean 'quest'?");
  refused(generate + "--prompt the --max-tokens 0", "--max-tokens");
}

// On a CPU a model gives the queries of every position and w_o, but no other layers and heads than
// its own.
TEST_F(ModelCli, RefusesPipelinesThatNeedWhatTheModelDoesNotGive) {
  const std::string pca =
      "dataset pca " SIKV_SOURCE_DIR "/datasets/smollm2-135m-4k.h5 -o t.pca --tokens 300 --layers ";
  const std::string pipeline = "fp16+fp16 > loki(budget=32,pca=t.pca) > gather_attention";
  write("loki.yaml", "pipeline: '" + pipeline + "'\n");
  const std::string eval = "eval loki.yaml --text text.txt --steps 4 --prompt 600 --model " + kTiny;
  const std::string generate =
      "generate --prompt the --pipeline '" + pipeline + "' --model " + kTiny;
  ASSERT_EQ(sikv(pca + "0,5,11").code, 0);
  for (const std::string& command : {eval, generate}) {
    refused(command,
            "selector 'loki' (cpu): the PCA file 't.pca' has 3 layers, the cache has 2; `sikv "
            "dataset pca` writes one from a trace");
  }
  ASSERT_EQ(sikv(pca + "0,5").code, 0);
  for (const std::string& command : {eval, generate}) {
    refused(command, "the PCA file 't.pca' has 3 KV heads, the cache has 1");
  }
}

}  // namespace
}  // namespace sikv
