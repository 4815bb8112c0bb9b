#include "apps/eval/eval.h"

#include <fmt/format.h>

#include <algorithm>
#include <fstream>
#include <iterator>
#include <numeric>
#include <optional>
#include <set>

#include "apps/common/show.h"
#include "apps/eval/eval_file.h"
#include "framework/base/error.h"
#include "framework/base/text.h"
#include "framework/config/pipeline_text.h"
#include "framework/model/evaluate.h"
#include "framework/model/passkey.h"
#include "framework/model/tokenizer.h"
#include "framework/report/environment.h"
#include "framework/report/rows.h"
#include "framework/report/table.h"
#include "framework/trace/trace.h"

namespace sikv {
namespace {

using Json = nlohmann::ordered_json;

struct EvalFlags {
  ConfigFlags config;
  std::vector<std::filesystem::path> files, texts, traces;
  std::filesystem::path model, json;
  int64_t first_token = 0, prompt = 4096, steps = 96;
  int queries = 128;
  std::string dtype = "fp16";
  bool passkey = false;
  PasskeyPlan plan{{1024, 2048, 4096}};
};

struct Text {
  std::string name;
  std::vector<int32_t> tokens;  // from --first-token on
};

// All texts and traces.
std::vector<Text> read_texts(const EvalFlags& flags, const Tokenizer* tokenizer) {
  std::vector<Text> texts;
  const auto add = [&](const std::filesystem::path& file, const std::vector<int32_t>& tokens) {
    const std::string name = file.filename().string();
    if (std::any_of(texts.begin(), texts.end(), [&](const Text& t) { return t.name == name; })) {
      throw Error("two texts are called {}: rename one, rows are told apart by it", name);
    }
    const int64_t skipped = std::min(flags.first_token, std::ssize(tokens));
    texts.push_back({name, {tokens.begin() + skipped, tokens.end()}});
  };
  for (const auto& file : flags.texts) {
    std::ifstream stream(file, std::ios::binary);
    if (!stream) throw Error("cannot read the text {}: check the path", file.string());
    const std::string text{std::istreambuf_iterator<char>(stream), {}};
    try {
      add(file, tokenizer->encode(text));
    } catch (const Error& error) {
      throw Error("{}: {}", file.string(), error.what());
    }
  }
  for (const auto& file : flags.traces) add(file, TraceReader(file).tokens());
  if (texts.empty()) throw Error("there is no text: give --text FILE or --trace-tokens FILE");
  return texts;
}

EvalText cut(const Text& text, const EvalFlags& flags) {
  const int64_t needed = flags.prompt + flags.steps + 1;
  if (std::ssize(text.tokens) < needed) {
    throw Error(
        "{} has {} tokens from --first-token on, but {} are needed (prompt {}, {} steps and the "
        "token after them): lower --prompt, --steps or --first-token",
        text.name, text.tokens.size(), needed, flags.prompt, flags.steps);
  }
  return {
      text.name, {text.tokens.begin(), text.tokens.begin() + needed}, flags.prompt, flags.steps};
}

Json row_of(const Evaluated& row, const Json& setup) {
  Json metrics = {{"nll", row.nll}, {"nll_added", row.nll_added}};
  if (row.kl) {
    metrics["kl"] = {{"mean", row.kl->mean}, {"p95", row.kl->p95}, {"p99", row.kl->p99}};
  }
  metrics["top1_same"] = row.top1_same;
  if (row.scans_per_step) metrics["scans_per_step"] = *row.scans_per_step;
  metrics["bytes_per_token"] = row.bytes_per_token;
  metrics["compression_total"] = row.compression_total;
  Json json = {{"pipeline", row.pipeline}, {"setup", setup}, {"budget", nullptr}};
  if (row.budget) json["budget"] = *row.budget;
  json["metrics"] = std::move(metrics);
  json["memory"] = memory_json(row.ledger);
  std::map<std::string, Summary> latency = row.step_s;
  latency["token"] = row.token_s;
  json["latency_us"] = latency_json({{"pipeline", row.prefill_s}}, latency);
  json["variants"] = variants_json(row.variants);
  json["counters"] = row.counters;
  return json;
}

// Rows of the table, by text.
struct Line {
  std::string text;
  Json row;
  bool competes;
};

Table::Cell metric_cell(const Json& metrics, const char* name, const char* format) {
  const auto found = metrics.find(name);
  if (found == metrics.end() || !found->is_number()) return {"-"};
  const double value = found->get<double>();
  return {fmt::format(fmt::runtime(format), value), value};
}

std::string eval_table(const std::vector<Line>& lines, const TableStyle& style) {
  using enum Table::Align;
  using enum Table::Better;
  Table table({{"NLL"},
               {"added"},
               {"KL\nmean", kRight, kLower},
               {"\np95", kRight, kLower},
               {"\np99", kRight, kLower},
               {"top-1\nsame", kRight, kHigher},
               {"scans\n/step", kRight, kLower},
               {"bytes\n/token", kRight, kLower},
               {"total\ncompr.", kRight, kHigher},
               {"pipeline\nms/token", kRight, kLower},
               {"model\nms/token", kRight, kLower}},
              "pipeline");
  std::string group;
  for (const auto& [text, row, competes] : lines) {
    const std::string title =
        row["budget"].is_null() ? text + ", no budget"
                                : fmt::format("{}, budget {}", text, row["budget"].get<int64_t>());
    if (title != group) table.group(group = title);
    const Json& metrics = row["metrics"];
    const Json& latency = row["latency_us"];
    const Json kl = metrics.value("kl", Json::object());
    double pipeline_us = 0;
    for (const char* stage : {"append", "select", "attend"}) {
      pipeline_us += latency[stage]["median"].get<double>();
    }
    const auto millis = [](double us) { return Table::Cell{fmt::format("{:.2f}", us * 1e-3), us}; };
    table.row({metric_cell(metrics, "nll", "{:.4f}"), metric_cell(metrics, "nll_added", "{:+.4f}"),
               metric_cell(kl, "mean", "{:.4f}"), metric_cell(kl, "p95", "{:.4f}"),
               metric_cell(kl, "p99", "{:.4f}"), metric_cell(metrics, "top1_same", "{:.3f}"),
               metric_cell(metrics, "scans_per_step", "{:.2f}"),
               number_cell(metrics["bytes_per_token"].get<double>()),
               number_cell(metrics["compression_total"].get<double>()), millis(pipeline_us),
               millis(latency["token"]["median"].get<double>())},
              row["pipeline"].get<std::string>(), competes);
  }
  return table.text(style);
}

std::string passkey_table(const PasskeyPlan& plan, const std::vector<PasskeyRow>& rows,
                          const TableStyle& style) {
  using enum Table::Align;
  using enum Table::Better;
  std::vector<Table::Column> columns = {{"all", kRight, kHigher}};
  for (const int64_t length : plan.lengths) {
    columns.push_back({fmt::format("{}\ntokens", length), kRight, kHigher});
  }
  Table table(std::move(columns), "pipeline");
  const auto cell = [](int found) { return Table::Cell{std::to_string(found), double(found)}; };
  for (const PasskeyRow& row : rows) {
    std::vector<Table::Cell> cells = {cell(row.total())};
    for (const auto& of_length : row.found) {
      cells.push_back(cell(std::accumulate(of_length.begin(), of_length.end(), 0)));
    }
    table.row(std::move(cells), row.pipeline, &row != rows.data());
  }
  return table.text(style);
}

class Eval {
 public:
  Eval(const EvalFlags& flags, const std::vector<std::string>& command_line)
      : flags_(flags),
        registry_(flags.config.open_registry()),
        specs_(read_configs()),
        devices_(threads_),
        host_(devices_.open("cpu")),
        file_(flags.json, environment(command_line, host_)),
        model_(read_model(flags.model), host_),
        tokenizer_(made_tokenizer()),
        texts_(read_texts(flags, tokenizer_ ? &*tokenizer_ : nullptr)) {
    // Parts that do not go together are found before the prefill.
    for (const PipelineSpec& spec : specs_) {
      static_cast<void>(Composition(spec, registry_, devices_.open(spec, registry_),
                                    model_.shape(dtype(), flags.prompt + flags.steps)));
    }
  }

  void run() {
    if (flags_.passkey) return run_passkeys();
    std::vector<EvalText> texts;
    for (const Text& text : texts_) texts.push_back(cut(text, flags_));
    try {
      for (const EvalText& text : texts) run(text);
    } catch (const Interrupted&) {
      report();
      note(fmt::format("stopped after {} rows{}", lines_.size(),
                       flags_.json.empty() ? "" : "; the same command goes on from there"));
      throw;
    }
    report();
  }

 private:
  int32_t dtype() const { return flags_.dtype == "fp32" ? SIKV_FP32 : SIKV_FP16; }

  std::optional<Tokenizer> made_tokenizer() const {
    if (flags_.texts.empty() && !flags_.passkey) return std::nullopt;
    return std::optional<Tokenizer>(std::in_place, model_.vocabulary());
  }

  std::vector<PipelineSpec> read_configs() {
    std::vector<PipelineSpec> specs;
    std::set<std::string> seen;
    for (const auto& file : flags_.files) {
      const Config config = flags_.config.load(file, registry_);
      threads_ = config.threads;
      for (const PipelineSpec& spec : expand_budgets(config, registry_)) {
        if (seen.insert(pipeline_text(spec, registry_)).second) specs.push_back(spec);
      }
    }
    return specs;
  }

  Json setup(const EvalText& text) const {
    return {{"model", model_.config().name},
            {"weights", model_.step_bytes()},
            {"text", text.name},
            {"first_token", flags_.first_token},
            {"prompt", text.prompt},
            {"steps", text.steps},
            {"queries", flags_.queries},
            {"dtype", flags_.dtype},
            {"threads", host_.info().num_threads}};
  }

  void run(const EvalText& text) {
    const Json setup = this->setup(text);
    std::optional<Evaluation> evaluation;  // made when the first row needs it
    const auto ready = [&]() -> Evaluation& {
      if (!evaluation) {
        evaluation.emplace(model_, text, dtype(), flags_.queries, registry_, host_);
      }
      return *evaluation;
    };
    const std::string dense = Evaluation::dense_pipeline(registry_);
    const auto row = [&](const std::string& pipeline, auto&& measure) {
      const Json* known = file_.find(pipeline, setup);
      kept_ += known != nullptr;
      return known != nullptr ? *known : file_.add(row_of(measure(), setup));
    };
    lines_.push_back({text.name, row(dense, [&] { return ready().dense(); }), false});
    for (const PipelineSpec& spec : specs_) {
      const std::string pipeline = pipeline_text(spec, registry_);
      if (pipeline == dense) continue;
      lines_.push_back(
          {text.name,
           row(pipeline, [&] { return ready().run(spec, devices_.open(spec, registry_)); }), true});
    }
  }

  // In the first text; one prompt serves all pipelines, so that rows come together.
  void run_passkeys() {
    std::vector<PipelineSpec> specs = {
        parse_pipeline(Evaluation::dense_pipeline(registry_), registry_)};
    specs.insert(specs.end(), specs_.begin(), specs_.end());
    PasskeyPlan plan = flags_.plan;
    plan.dtype = dtype();
    const Text& text = texts_.front();
    const auto rows = find_passkeys(
        model_, *tokenizer_, text.tokens, plan, specs, registry_,
        [&](const PipelineSpec& spec) -> Device& { return devices_.open(spec, registry_); });
    const Json setup = {{"task", "passkey"},
                        {"model", model_.config().name},
                        {"weights", model_.step_bytes()},
                        {"text", text.name},
                        {"first_token", flags_.first_token},
                        {"lengths", plan.lengths},
                        {"depths", plan.depths},
                        {"trials", plan.trials},
                        {"dtype", flags_.dtype}};
    for (const PasskeyRow& row : rows) {
      file_.add({{"pipeline", row.pipeline},
                 {"setup", setup},
                 {"found", row.total()},
                 {"prompts", plan.prompts()},
                 {"grid", row.found}});
    }
    print(fmt::format("{}: keys found of {} per length, {} depths x {} trials\n\n{}",
                      model_.config().name, plan.depths * plan.trials, plan.depths, plan.trials,
                      passkey_table(plan, rows, TableStyle::of(stdout))));
  }

  void report() const {
    if (kept_ > 0) note(fmt::format("{} rows were there already and were kept", kept_));
    if (lines_.empty()) return;
    std::vector<Line> lines = lines_;
    std::stable_sort(lines.begin(), lines.end(), [&](const Line& a, const Line& b) {
      const auto rank = [](const Line& line) {
        return std::pair(line.text, line.row["budget"].is_null()
                                        ? int64_t{-1}
                                        : line.row["budget"].get<int64_t>());
      };
      return rank(a) < rank(b);
    });
    print(
        fmt::format("{}: prompt of {} tokens, {} teacher-forced steps\n\n{}\n"
                    "* best of its group, dense aside; KL: nats to dense, p99: 1 % of the steps "
                    "are worse; times "
                    "are\n  medians, all layers\n",
                    model_.config().name, flags_.prompt, flags_.steps,
                    eval_table(lines, TableStyle::of(stdout))));
  }

  const EvalFlags& flags_;
  Registry registry_;
  int threads_ = 0;
  std::vector<PipelineSpec> specs_;
  Devices devices_;
  Device& host_;
  EvalFile file_;
  Transformer model_;
  std::optional<Tokenizer> tokenizer_;
  std::vector<Text> texts_;
  std::vector<Line> lines_;
  int kept_ = 0;
};

}  // namespace

Command add_eval(CLI::App& app, const std::vector<std::string>& command_line) {
  CLI::App* command = app.add_subcommand(
      "eval", "What pipelines do to what a real model says: NLL, KL to dense, top-1 agreement");
  auto flags = std::make_shared<EvalFlags>();
  command->add_option("CONFIG", flags->files, "YAML configs; their source is not used")->required();
  command->add_option("--model", flags->model, "a model file")->required()->type_name("FILE");
  command->add_option("--text", flags->texts, "UTF-8 text; may be repeated")
      ->type_name("FILE")
      ->allow_extra_args(false);
  command
      ->add_option("--trace-tokens", flags->traces,
                   "takes the tokens of a trace instead of a text; may be repeated")
      ->type_name("FILE")
      ->allow_extra_args(false);
  const auto count = [&](const char* name, auto& value, int64_t least, const char* help) {
    command->add_option(name, value, help)
        ->type_name("N")
        ->capture_default_str()
        ->check(CLI::Range(least, int64_t{1} << 30));
  };
  count("--first-token", flags->first_token, 0, "tokens of the text that are skipped");
  count("--prompt", flags->prompt, 1, "tokens that are prefilled with dense attention");
  count("--steps", flags->steps, 1, "teacher-forced steps behind the prompt");
  count("--queries", flags->queries, 1, "last prompt queries that selectors see");
  command->add_option("--kv-type", flags->dtype, "K, V and Q as caches get them: fp16 or fp32")
      ->type_name("TYPE")
      ->capture_default_str()
      ->check(CLI::IsMember({"fp16", "fp32"}));
  command->add_flag("--passkey", flags->passkey,
                    "plants five digits in the text instead and asks for them at its end");
  command->add_option("--lengths", flags->plan.lengths, "of passkey prompts, in tokens")
      ->type_name("N,...")
      ->delimiter(',')
      ->capture_default_str()
      ->check(CLI::Range(int64_t{64}, int64_t{1} << 30));
  count("--depths", flags->plan.depths, 1, "places of the key");
  count("--trials", flags->plan.trials, 1, "keys per length and depth");
  add_output_option(*command, "--json", flags->json,
                    "keeps every finished row there; an evaluation that was interrupted goes on "
                    "from it");
  flags->config.add_to(*command);
  command->footer(examples({
      "sikv eval configs/eval.yaml --model smollm2.h5 --text manual.txt --json eval.json",
      "sikv eval configs/eval.yaml --model smollm2.h5 --text a.txt --text b.txt --steps 1000",
      "sikv eval configs/eval.yaml --model smollm2.h5 --text manual.txt --passkey --lengths 3000",
      "sikv eval configs/self_index.yaml --model smollm2.h5 --trace-tokens trace.h5 --prompt 2048",
  }));
  return {command, [flags, &command_line] { Eval(*flags, command_line).run(); }};
}

}  // namespace sikv
