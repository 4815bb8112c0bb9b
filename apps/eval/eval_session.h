// What every kind of evaluation needs: the flags, and what they name, opened and checked.
#ifndef SIKV_APPS_EVAL_EVAL_SESSION_H_
#define SIKV_APPS_EVAL_EVAL_SESSION_H_

#include <cstdint>
#include <filesystem>
#include <optional>
#include <string>
#include <vector>

#include "apps/common/command.h"
#include "apps/common/row_file.h"
#include "framework/model/tasks.h"
#include "framework/model/tokenizer.h"
#include "framework/model/transformer.h"

namespace sikv {

struct EvalFlags {
  ConfigFlags config;
  std::vector<std::filesystem::path> files, texts, traces;
  std::filesystem::path model, json, svg;
  int64_t first_token = 0, prompt = 4096, steps = 96;
  int queries = 128;
  std::string dtype = "fp16";
  std::vector<std::string> tasks;
  std::vector<int64_t> lengths = {1024, 2048, 4096};
  TaskPlan plan;
};

struct EvalInput {
  std::string name;
  std::vector<int32_t> tokens;  // from --first-token on
};

class EvalSession {
 public:
  // Error if something that the flags name is missing or does not go together; nothing has been
  // computed by then.
  EvalSession(const EvalFlags& flags, const std::vector<std::string>& command_line);

  const EvalFlags& flags() const { return flags_; }
  const Registry& registry() const { return registry_; }
  // Of all configs and budgets, each once; dense is not among them.
  const std::vector<PipelineSpec>& pipelines() const { return pipelines_; }
  const PipelineSpec& dense() const { return dense_; }
  // Where the model and dense attention run: the GPU if every pipeline runs there, else the CPU.
  Device& device() { return device_; }
  Device& device_of(const PipelineSpec& spec) {
    return device_.is_cuda() ? device_ : devices_.open(spec, registry_);
  }
  RowFile& file() { return file_; }
  Transformer& model() { return model_; }
  const Tokenizer& tokenizer() const { return *tokenizer_; }
  const std::vector<EvalInput>& inputs() const { return inputs_; }
  int32_t dtype() const { return flags_.dtype == "fp32" ? SIKV_FP32 : SIKV_FP16; }

  // Error if a pipeline cannot run over so many tokens.
  void check_pipelines(int64_t tokens);
  // Whether one of them needs the queries of every prompt position; after check_pipelines.
  bool all_queries() const { return all_queries_; }

 private:
  std::vector<PipelineSpec> read_configs();
  Device& model_device();
  std::optional<Tokenizer> made_tokenizer() const;
  std::vector<EvalInput> read_inputs() const;
  std::vector<int32_t> tokens_of(const std::filesystem::path& text) const;

  const EvalFlags& flags_;
  Registry registry_;
  PipelineSpec dense_;
  int threads_ = 0;
  std::vector<PipelineSpec> pipelines_;
  bool all_queries_ = false;
  Devices devices_;
  Device& device_;
  RowFile file_;
  Transformer model_;
  std::optional<Tokenizer> tokenizer_;
  std::vector<EvalInput> inputs_;
};

}  // namespace sikv

#endif  // SIKV_APPS_EVAL_EVAL_SESSION_H_
