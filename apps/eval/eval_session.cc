#include "apps/eval/eval_session.h"

#include <algorithm>
#include <fstream>
#include <iterator>
#include <set>

#include "framework/base/error.h"
#include "framework/config/pipeline_text.h"
#include "framework/model/dense_pipeline.h"
#include "framework/report/environment.h"
#include "framework/report/rows.h"
#include "framework/trace/trace.h"

namespace sikv {

EvalSession::EvalSession(const EvalFlags& flags, const std::vector<std::string>& command_line)
    : flags_(flags),
      registry_(flags.config.open_registry()),
      dense_(parse_pipeline(kDensePipeline, registry_)),
      pipelines_(read_configs()),
      devices_(threads_),
      device_(model_device()),
      file_(flags.json, environment(command_line, device_), "evaluation"),
      model_(read_model(flags.model), device_),
      tokenizer_(made_tokenizer()),
      inputs_(read_inputs()) {
  if (!flags.svg.empty()) check_writable(flags.svg);
}

std::vector<PipelineSpec> EvalSession::read_configs() {
  std::vector<PipelineSpec> specs;
  std::set<std::string> seen = {pipeline_text(dense_, registry_)};
  for (const auto& file : flags_.files) {
    const Config config = flags_.config.load(file, registry_, SourceUse::kIgnored);
    threads_ = config.threads;
    for (const PipelineSpec& spec : expand_budgets(config, registry_)) {
      if (seen.insert(pipeline_text(spec, registry_)).second) specs.push_back(spec);
    }
  }
  return specs;
}

Device& EvalSession::model_device() {
  Device* common = nullptr;
  for (const PipelineSpec& spec : pipelines_) {
    Device& device = devices_.open(spec, registry_);
    if (common != nullptr && common != &device) return devices_.open("cpu");
    common = &device;
  }
  return common == nullptr ? devices_.open("cpu") : *common;
}

std::optional<Tokenizer> EvalSession::made_tokenizer() const {
  if (flags_.texts.empty() && flags_.tasks.empty()) return std::nullopt;
  return std::optional<Tokenizer>(std::in_place, model_.vocabulary());
}

std::vector<EvalInput> EvalSession::read_inputs() const {
  std::vector<EvalInput> inputs;
  const auto add = [&](const std::filesystem::path& file, const std::vector<int32_t>& tokens) {
    const std::string name = file.filename().string();
    if (std::any_of(inputs.begin(), inputs.end(),
                    [&](const EvalInput& input) { return input.name == name; })) {
      throw Error("two texts are called {}: rename one, rows are told apart by it", name);
    }
    const int64_t skipped = std::min(flags_.first_token, std::ssize(tokens));
    inputs.push_back({name, {tokens.begin() + skipped, tokens.end()}});
  };
  for (const auto& file : flags_.texts) add(file, tokens_of(file));
  for (const auto& file : flags_.traces) add(file, TraceReader(file).tokens());
  if (inputs.empty()) throw Error("there is no text: give --text FILE or --trace-tokens FILE");
  return inputs;
}

std::vector<int32_t> EvalSession::tokens_of(const std::filesystem::path& text) const {
  std::ifstream stream(text, std::ios::binary);
  if (!stream) throw Error("cannot read the text {}: check the path", text.string());
  try {
    return tokenizer_->encode(std::string{std::istreambuf_iterator<char>(stream), {}});
  } catch (const Error& error) {
    throw Error("{}: {}", text.string(), error.what());
  }
}

void EvalSession::check_pipelines(int64_t tokens) {
  for (const PipelineSpec& spec : pipelines_) {
    const Composition composition(spec, registry_, device_of(spec), model_.shape(dtype(), tokens),
                                  model_.layer_numbers());
    check_needs(composition.selector(), model_.offer(0, 0));
    all_queries_ |= (composition.selector().table().flags & SIKV_SELECTOR_NEEDS_ALL_QUERIES) != 0;
  }
}

}  // namespace sikv
