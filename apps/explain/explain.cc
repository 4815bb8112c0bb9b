#include "apps/explain/explain.h"

#include <fmt/format.h>

#include <algorithm>
#include <map>
#include <utility>

#include "apps/common/show.h"
#include "framework/base/text.h"
#include "framework/config/pipeline_parts.h"
#include "framework/config/pipeline_text.h"
#include "framework/experiment/source.h"
#include "framework/experiment/throughput.h"
#include "framework/pipeline/bytes_read.h"
#include "framework/pipeline/pipeline.h"
#include "framework/report/table.h"

namespace sikv {
namespace {

// Larger batches are not looked for.
constexpr int kLargestBatch = 1 << 20;

struct ExplainFlags {
  ConfigFlags config;
  std::filesystem::path file;
};

// What a run of the config would be made with.
struct Sizes {
  sikv_shape shape{};
  int64_t new_tokens = 0;
  std::vector<int> layers;  // of the model, where a trace says which
};

// One entry per (context, batch) of a synthetic source; one for a trace, which `run` would read, too.
std::vector<Sizes> sizes_of(const Config& config) {
  const int64_t steps = config.source.steps > 0 ? config.source.steps : config.measure.steps;
  if (const auto& synthetic = config.source.synthetic) {
    std::vector<Sizes> all;
    for (const int64_t context : synthetic->context) {
      for (const int batch : synthetic->batch) {
        all.push_back(
            {model_shape(*config.model, parse_dtype(synthetic->dtype), context + steps, batch),
             steps,
             {}});
      }
    }
    return all;
  }
  const Source source = load_source(config);
  return {{source.shape(), source.steps, source.layer_numbers()}};
}

std::string parts_text(const Composition& composition, const Registry& registry,
                       const TableStyle& style) {
  Table table({{"role", Table::Align::kLeft},
               {"plugin", Table::Align::kLeft},
               {"variant", Table::Align::kLeft},
               {"score"},
               {"verdict", Table::Align::kLeft}});
  for (const ChosenPart& part : composition.parts()) {
    for (const Candidate& candidate : part.candidates) {
      const bool runs = candidate.variant == part.variant;
      const std::string verdict = runs ? part.forced ? "runs: forced" : "runs: highest score"
                                  : candidate.score > 0 ? "could run"
                                                        : "cannot run: " + candidate.reason;
      table.row({{part.role},
                 {part.variant->id},
                 {candidate.variant->variant},
                 {std::to_string(candidate.score)},
                 {verdict}});
    }
  }
  std::string text = table.text(style);
  for (const RefusedLibrary& refused : registry.refused()) {
    const auto named = [&](const ChosenPart& part) { return part.variant->id == refused.id; };
    if (std::any_of(composition.parts().begin(), composition.parts().end(), named)) {
      text += fmt::format("  {} was refused: {}\n", refused.path.string(), refused.reason);
    }
  }
  return text;
}

std::string sizes_text(const PipelineSpec& spec, const Registry& registry, Device& device,
                       const Sizes& sizes, uint64_t weights, const TableStyle& style) {
  const sikv_shape& shape = sizes.shape;
  const int new_tokens = static_cast<int>(sizes.new_tokens);
  const Composition composition(spec, registry, device, shape, sizes.layers);
  const CacheOptions options = composition.cache_options(new_tokens);
  Ledger ledger = composition.planned(shape.max_tokens, options);
  double bytes_per_token =
      static_cast<double>(
          layout_page_bytes(composition.key_layout()) +
          layout_page_bytes(composition.value_layout()) +
          line_padding_page_bytes(composition.key_layout(), composition.value_layout())) /
      SIKV_PAGE_TOKENS;
  const uint64_t free = usable_bytes(device), usable = free > weights ? free - weights : 0;
  const double dense = dense_row_bytes(shape.head_dim) * shape.num_layers * shape.num_kv_heads *
                       static_cast<double>(shape.max_sequences) * shape.max_tokens;
  const auto budget = composition.budget(shape.max_tokens);
  const int64_t encoded = (shape.max_tokens - new_tokens) / SIKV_PAGE_TOKENS * SIKV_PAGE_TOKENS;
  std::string evicted;
  if (composition.selector().evicts() && encoded > 0) {
    const int64_t kept = composition.kept_of(shape.max_tokens - new_tokens);
    const int64_t in_pages = (kept + SIKV_PAGE_TOKENS - 1) / SIKV_PAGE_TOKENS * SIKV_PAGE_TOKENS;
    evicted = fmt::format(
        "  held after the prompt's evictions: {} encoded tokens per KV head in whole pages of {}, "
        "and more pages\n"
        "  where heads or layers share a budget; before anything is evicted: {}, {:.4g} "
        "bytes/token\n",
        kept, SIKV_PAGE_TOKENS, bytes_text(ledger.total()), bytes_per_token);
    bytes_per_token *= static_cast<double>(in_pages) / static_cast<double>(encoded);
    ledger = composition.planned(in_pages, options);
    ledger.add("page_tables", KvCache::position_bytes(shape));
  }
  return fmt::format(
      "  {} layers, batch {}, {} tokens each{}\n{}{}"
      "  dense fp16 would take {}: {:.2f}x\n"
      "  {} are free for it{}: the largest batch at this length is {} ({}dense: {})\n",
      shape.num_layers, shape.max_sequences, shape.max_tokens,
      budget ? fmt::format(", budget {} tokens", *budget) : "",
      memory_table(ledger, bytes_per_token, style), evicted,
      bytes_text(static_cast<uint64_t>(dense)), dense / static_cast<double>(ledger.total()),
      bytes_text(usable), weights > 0 ? " beside the model's weights" : "",
      largest_planned_batch(spec, registry, device, shape, new_tokens, usable, kLargestBatch),
      evicted.empty() ? "" : "before evictions; ",
      static_cast<uint64_t>(static_cast<double>(usable) * shape.max_sequences / dense));
}

void explain(const ExplainFlags& flags) {
  Registry registry = flags.config.open_registry();
  const Config config = flags.config.load(flags.file, registry);
  Devices devices(config.threads);
  const TableStyle style = TableStyle::of(stdout);
  std::map<std::string, std::pair<std::vector<Sizes>, Offer>> places;  // by source, each read once
  std::string text;
  for (const PipelineSpec& spec : expand_budgets(config, registry)) {
    if (const SourceSpec& source = source_of(config, spec); source.missing) {
      text += fmt::format("{}{}\n  not explained: its trace {} is not there; {} makes it\n",
                          text.empty() ? "" : "\n", pipeline_text(spec, registry),
                          source.trace.string(), source.make);
      continue;
    }
    if (!places.contains(spec.entry.source)) {
      const Config own = on_source_of(config, spec);
      places[spec.entry.source] = {sizes_of(own), source_offer(own)};
    }
    const auto& [all_sizes, offer] = places.at(spec.entry.source);
    Device& device = devices.open(spec, registry);
    const Composition composition(spec, registry, device, all_sizes.front().shape,
                                  all_sizes.front().layers);
    check_needs(composition.selector(), offer);
    text += fmt::format("{}{}\n", text.empty() ? "" : "\n", pipeline_text(spec, registry));
    text += fmt::format("  keys in {}, values in {}\n\n", layout_text(composition.key_layout()),
                        layout_text(composition.value_layout()));
    text += parts_text(composition, registry, style);
    // They lie where the cache does.
    const int64_t weights = device.is_cuda() && config.model ? config.model->weight_bytes : 0;
    for (const Sizes& sizes : all_sizes) {
      note_pins(spec, sizes.shape.max_tokens - sizes.new_tokens);
      text +=
          "\n" + sizes_text(spec, registry, device, sizes, static_cast<uint64_t>(weights), style);
    }
  }
  print(text + "\nPlanned, without what selectors keep for themselves; nothing was run.\n");
}

}  // namespace

Command add_explain(CLI::App& app) {
  CLI::App* command = app.add_subcommand(
      "explain", "Which variants would run and why, bytes per token, memory; runs nothing");
  auto flags = std::make_shared<ExplainFlags>();
  add_config_argument(*command, flags->file);
  flags->config.add_to(*command);
  command->footer(examples({
      "sikv explain configs/self_index.yaml",
      "sikv explain configs/throughput.yaml --set 'model={preset: llama-3.1-8b}' "
      "--set source.synthetic.context=131072",
      "sikv explain configs/quest.yaml --force selector=ref",
  }));
  return {command, [flags] { explain(*flags); }};
}

}  // namespace sikv
