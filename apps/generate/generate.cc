#include "apps/generate/generate.h"

#include <fmt/format.h>

#include <algorithm>
#include <cstdio>
#include <fstream>
#include <iterator>

#include "apps/common/show.h"
#include "framework/base/error.h"
#include "framework/base/text.h"
#include "framework/config/pipeline_parts.h"
#include "framework/config/pipeline_text.h"
#include "framework/model/dense_pipeline.h"
#include "framework/model/generate.h"
#include "framework/model/tokenizer.h"
#include "framework/report/table.h"

namespace sikv {
namespace {

constexpr const char* kRecommended =
    "rot_lm(bits=3)+rot_lm(bits=2) > "
    "self_index(budget=192,tables=6bit,rerank=4,schedule=auto,refresh_cosine=0.45) > sparse_flash";

struct GenerateFlags {
  PluginFlags plugins;
  std::filesystem::path model, prompt_file;
  std::string prompt, pipeline = kRecommended, device = "auto";
  int max_tokens = 64, threads = 0;
  bool compare = false, ignore_stop = false;
};

std::string read_prompt(const GenerateFlags& flags) {
  if (flags.prompt_file.empty()) return flags.prompt;
  std::ifstream stream(flags.prompt_file, std::ios::binary);
  if (!stream) {
    throw Error("cannot read the prompt {}: check the path", flags.prompt_file.string());
  }
  return {std::istreambuf_iterator<char>(stream), {}};
}

std::string result_table(const std::vector<Generated>& results) {
  using enum Table::Align;
  using enum Table::Better;
  Table table({{"first\ntoken", kRight, kLower},
               {"second\ntoken", kRight, kLower},
               {"tokens/s", kRight, kHigher},
               {"KV\nmemory", kRight, kLower},
               {"of dense\nfp16"}},
              "pipeline");
  for (const Generated& result : results) {
    const auto seconds = [](double s) {
      return s == 0 ? Table::Cell{"-"} : Table::Cell{duration_text(s), s};
    };
    const uint64_t bytes = result.ledger.total();
    table.row({seconds(result.first_s), seconds(result.second_s),
               result.token_s == 0 ? Table::Cell{"-"} : number_cell(1 / result.token_s),
               bytes_cell(bytes),
               share_cell(static_cast<double>(bytes) / static_cast<double>(result.dense_bytes))},
              result.pipeline);
  }
  return table.text(TableStyle::of(stdout));
}

// Where two texts part, and how each goes on.
std::string parting(const Tokenizer& tokenizer, const Generated& a, const Generated& b) {
  const auto [at_a, at_b] =
      std::mismatch(a.tokens.begin(), a.tokens.end(), b.tokens.begin(), b.tokens.end());
  if (at_a == a.tokens.end() && at_b == b.tokens.end()) {
    return fmt::format("both texts are the same ({} tokens)\n", a.tokens.size());
  }
  const std::span rest(at_b, b.tokens.end());
  return fmt::format("the texts part at token {} of {}; dense goes on:\n{}\n",
                     at_a - a.tokens.begin() + 1, a.tokens.size(), tokenizer.decode(rest));
}

void generate(const GenerateFlags& flags) {
  if (flags.prompt.empty() == flags.prompt_file.empty()) {
    throw Error("give the prompt as --prompt TEXT or as --prompt-file FILE, one of them");
  }
  check_device_name(flags.device);
  const Registry registry = flags.plugins.open();
  PipelineSpec spec = parse_pipeline(flags.pipeline, registry);
  if (flags.device != "auto") spec.device = flags.device;
  Devices devices(flags.threads);
  Device& device = devices.open(spec, registry);
  Transformer model(read_model(flags.model), device);
  const Vocabulary& vocabulary = model.vocabulary();
  const Tokenizer tokenizer(vocabulary);
  std::vector<int32_t> tokens = tokenizer.encode(read_prompt(flags), SpecialTokens::kParsed);
  if (vocabulary.add_bos) tokens.insert(tokens.begin(), vocabulary.bos_token);

  GenerateOptions options;
  options.max_tokens = flags.max_tokens;
  if (!flags.ignore_stop) options.stop_token = vocabulary.eos_token;
  // Parts that do not go together are found before the prefill.
  const sikv_shape shape = model.shape(options.dtype, std::ssize(tokens) + options.max_tokens);
  const Composition composition(spec, registry, device, shape, model.layer_numbers());
  check_needs(composition.selector(), model.offer(0, 0));
  options.all_queries =
      (composition.selector().table().flags & SIKV_SELECTOR_NEEDS_ALL_QUERIES) != 0;
  const size_t prompt_tokens = tokens.size();
  Generator generator(model, std::move(tokens), options);
  std::vector<Generated> results;
  results.push_back(generator.run(spec, registry, device, [&](int32_t token) {
    print(tokenizer.decode({&token, 1}));
    std::fflush(stdout);
  }));
  print("\n");
  if (flags.compare) {
    results.push_back(
        generator.run(parse_pipeline(kDensePipeline, registry), registry, device, [](int32_t) {}));
    print("\n" + parting(tokenizer, results[0], results[1]));
  }
  print(fmt::format(
      "\n{}: {} tokens after a prompt of {}\n\n{}\n* best; second token: filling the "
      "pipeline is in it; tokens/s: the median step\n",
      model.config().name, results[0].tokens.size(), prompt_tokens, result_table(results)));
}

}  // namespace

Command add_generate(CLI::App& app) {
  CLI::App* command = app.add_subcommand(
      "generate", "Text from a model with a pipeline as its KV cache, and how fast it came");
  auto flags = std::make_shared<GenerateFlags>();
  command->add_option("--model", flags->model, "a model file")->required()->type_name("FILE");
  command->add_option("--prompt", flags->prompt, "names of special tokens in it are parsed")
      ->type_name("TEXT");
  command->add_option("--prompt-file", flags->prompt_file, "UTF-8 text")->type_name("FILE");
  command->add_option("--pipeline", flags->pipeline, "its one-line form")
      ->type_name("TEXT")
      ->capture_default_str();
  command->add_option("--max-tokens", flags->max_tokens, "stops after so many")
      ->type_name("N")
      ->capture_default_str()
      ->check(CLI::Range(1, 1 << 24));
  command->add_flag("--compare", flags->compare, "dense attention beside it: where the texts part");
  command->add_flag("--ignore-stop", flags->ignore_stop, "goes on behind the end of the text");
  flags->plugins.add_to(*command);
  command->add_option("--threads", flags->threads, "CPU workers; 0 = one per core")->type_name("N");
  command->add_option("--device", flags->device, "cpu, cuda, cuda:N or auto")->type_name("NAME");
  command->footer(examples({
      "sikv generate --model smollm2.h5 --prompt 'The capital of France is'",
      "sikv generate --model smollm2.h5 --prompt-file long.txt --compare",
      "sikv generate --model smollm2.h5 --prompt-file long.txt --pipeline "
      "'fp16+fp16 > quest(budget=512) > gather_attention'",
  }));
  return {command, [flags] { generate(*flags); }};
}

}  // namespace sikv
