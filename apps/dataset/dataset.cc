#include "apps/dataset/dataset.h"

#include <fmt/format.h>

#include <algorithm>

#include "apps/common/show.h"
#include "framework/base/error.h"
#include "framework/base/file.h"
#include "framework/base/progress.h"
#include "framework/base/text.h"
#include "framework/experiment/source.h"
#include "framework/report/rows.h"
#include "framework/report/table.h"
#include "framework/trace/synth.h"
#include "framework/trace/trace.h"
#include "kernels/common/pca_file.h"

namespace sikv {
namespace {

struct SynthFlags {
  std::filesystem::path out;
  std::string preset;
  ModelSpec model{"", 2, 8, 2, 64, 10000.0, 0};
  SyntheticSpec source;
  int64_t context = 4096, steps = 32;
};

void info(const std::filesystem::path& file) {
  const TraceReader reader(file);
  const TraceMeta& meta = reader.meta();
  std::string text = fmt::format(
      "{}\n"
      "  model      {}, {} layers, {} query heads, {} KV heads, head_dim {}\n"
      "  rope       theta {}, {}, {}\n"
      "  text       {}\n"
      "  license    {}\n"
      "  tokenizer  {}\n"
      "  tokens     {}\n",
      file.string(), meta.model, meta.num_layers, meta.num_query_heads, meta.num_kv_heads,
      meta.head_dim, meta.rope_theta, meta.rope_layout,
      meta.rope_applied ? "applied to the keys" : "not applied", meta.text, meta.license,
      meta.tokenizer, reader.num_tokens());
  if (const auto needles = reader.needles(); !needles.empty()) {
    text += fmt::format("  needles    for the last {} tokens\n", needles.size());
  }
  Table table({{"layer"}, {"type", Table::Align::kLeft}, {"queries"}, {"from position"}});
  for (const int layer : reader.layers()) {
    const TraceLayer at = reader.layer_info(layer);
    table.row({{std::to_string(layer)},
               {at.dtype == SIKV_FP32   ? "fp32"
                : at.dtype == SIKV_FP16 ? "fp16"
                                        : "bf16"},
               {std::to_string(at.num_queries)},
               {std::to_string(at.first_query_position)}});
  }
  print(text + "\n" + table.text(TableStyle::of(stdout)));
}

void synth(const SynthFlags& flags) {
  const ModelSpec model = flags.preset.empty() ? flags.model : model_preset(flags.preset);
  SynthSpec spec;
  spec.kind = parse_synth_kind(flags.source.kind);
  spec.context = flags.context;
  spec.steps = flags.steps;
  spec.num_layers = model.layers;
  spec.num_query_heads = model.query_heads;
  spec.num_kv_heads = model.kv_heads;
  spec.head_dim = model.head_dim;
  spec.dtype = parse_dtype(flags.source.dtype);
  spec.seed = flags.source.seed;
  check_replaceable(flags.out, "\x89HDF\r\n\x1a\n", "a trace");
  Synthesizer synthesizer(spec);
  write_trace(flags.out, synthesizer, 0);
  print(fmt::format("{}: {} tokens, {}\n", flags.out.string(), spec.context + spec.steps,
                    bytes_text(std::filesystem::file_size(flags.out))));
}

void check_trace(const std::filesystem::path& file) {
  const std::vector<std::string> faults = check(TraceReader(file));
  if (faults.empty()) {
    print(fmt::format("{}: sound\n", file.string()));
    return;
  }
  for (const std::string& fault : faults) print(fault + "\n");
  throw Error("{}: {} found; capture it again", file.string(),
              faults.size() == 1 ? "1 fault was" : fmt::format("{} faults were", faults.size()));
}

struct PcaFlags {
  std::filesystem::path trace, out;
  std::vector<int> layers;
  int64_t tokens = 0;
};

// Of the first `tokens` keys of every layer and KV head.
void pca_of_trace(const PcaFlags& flags) {
  const TraceReader reader(flags.trace);
  check_replaceable(flags.out, std::string_view(kPcaMagic, sizeof kPcaMagic), "a PCA file");
  const int64_t tokens = flags.tokens == 0 ? reader.num_tokens() : flags.tokens;
  if (tokens < 2 || tokens > reader.num_tokens()) {
    throw Error("--tokens is {}, but {} holds {} tokens: choose 2 to {}", tokens,
                flags.trace.string(), reader.num_tokens(), reader.num_tokens());
  }
  const std::vector<int> layers = flags.layers.empty() ? reader.layers() : flags.layers;
  const auto heads = static_cast<size_t>(reader.meta().num_kv_heads);
  const int dim = reader.meta().head_dim;
  std::vector<Pca> fits;
  std::vector<float> rows(static_cast<size_t>(tokens * dim));
  Progress progress("principal axes", std::ssize(layers));
  for (const int layer : layers) {
    const TraceLayer read = reader.read_layer(layer);
    for (size_t head = 0; head < heads; ++head) {
      for (size_t i = 0; i < rows.size(); ++i) {
        const size_t t = i / static_cast<size_t>(dim), d = i % static_cast<size_t>(dim);
        rows[i] =
            sikv_load(read.k.data(), read.dtype,
                      static_cast<int64_t>((t * heads + head) * static_cast<size_t>(dim) + d));
      }
      fits.push_back(pca(rows, static_cast<int>(tokens), dim));
    }
    progress.add();
  }
  write_atomically(flags.out, [&](std::ostream& stream) {
    write_pca_file(stream, layers, reader.meta().num_kv_heads, fits);
  });
  print(fmt::format("{}: {} layers, {} KV heads, {} channels, of {} tokens\n", flags.out.string(),
                    layers.size(), heads, dim, tokens));
}

void add_synth_options(CLI::App& app, SynthFlags& flags) {
  app.option_defaults()->always_capture_default();
  add_output_option(app, "--out", flags.out, "the trace to write");
  app.get_option("--out")->required();
  app.add_option("--kind", flags.source.kind, "gaussian, clustered or needle");
  app.add_option("--context", flags.context, "prompt tokens")->type_name("N");
  app.add_option("--steps", flags.steps, "decode steps after them")->type_name("N");
  app.add_option("--model", flags.preset,
                 "a shape by name, in place of the next four: " + join(model_presets()))
      ->type_name("PRESET");
  app.add_option("--layers", flags.model.layers, "layers")->type_name("N");
  app.add_option("--query-heads", flags.model.query_heads, "query heads")->type_name("N");
  app.add_option("--kv-heads", flags.model.kv_heads, "key/value heads")->type_name("N");
  app.add_option("--head-dim", flags.model.head_dim, "channels per head")->type_name("N");
  app.add_option("--dtype", flags.source.dtype, "fp16, bf16 or fp32")
      ->check(CLI::IsMember({"fp16", "bf16", "fp32"}));
  app.add_option("--seed", flags.source.seed, "of the random numbers")->type_name("N");
}

}  // namespace

Command add_dataset(CLI::App& app) {
  CLI::App* command =
      app.add_subcommand("dataset", "Traces of keys, values and queries: info, synth, check, pca");
  command->require_subcommand(1);
  command->footer(examples({
      "sikv dataset info datasets/smollm2-135m-4k.h5",
      "sikv dataset synth --kind needle --context 8192 --out needle.h5",
      "sikv dataset check needle.h5",
      "sikv dataset pca datasets/smollm2-135m-4k.h5 -o keys.pca",
  }));

  auto file = std::make_shared<std::filesystem::path>();
  CLI::App* info_command = command->add_subcommand("info", "What a trace holds");
  CLI::App* check_command =
      command->add_subcommand("check", "Reads a whole trace and names what is wrong with it");
  for (CLI::App* reading : {info_command, check_command}) {
    reading->add_option("TRACE", *file, "an HDF5 trace")->required();
    reading->footer(
        examples({"sikv dataset " + reading->get_name() + " datasets/smollm2-135m-4k.h5"}));
  }

  auto flags = std::make_shared<SynthFlags>();
  CLI::App* synth_command = command->add_subcommand("synth", "Writes a synthetic trace");
  add_synth_options(*synth_command, *flags);
  synth_command->footer(examples({
      "sikv dataset synth --kind needle --context 8192 --steps 16 --out needle.h5",
      "sikv dataset synth --model smollm2-135m --dtype bf16 --seed 7 --out clustered.h5",
  }));

  auto pca_flags = std::make_shared<PcaFlags>();
  CLI::App* pca_command = command->add_subcommand(
      "pca", "Fits the principal axes of a trace's keys, for the selector loki(pca=FILE)");
  pca_command->add_option("TRACE", pca_flags->trace, "an HDF5 trace")->required();
  add_output_option(*pca_command, "-o,--out", pca_flags->out, "the file to write");
  pca_command->get_option("--out")->required();
  pca_command->add_option("--layers", pca_flags->layers, "layers of it; without: all it holds")
      ->delimiter(',')
      ->type_name("N,...");
  pca_command->add_option("--tokens", pca_flags->tokens, "first tokens of it; 0 = all")
      ->type_name("N");
  pca_command->footer(examples({
      "sikv dataset pca datasets/smollm2-135m-4k.h5 -o keys.pca",
      "sikv dataset pca models/smollm2-135m-4k-full.h5 --layers 0,5,11 --tokens 2048 -o keys.pca",
  }));

  return {command, [=] {
            if (pca_command->parsed()) return pca_of_trace(*pca_flags);
            if (info_command->parsed()) return info(*file);
            if (check_command->parsed()) return check_trace(*file);
            synth(*flags);
          }};
}

}  // namespace sikv
