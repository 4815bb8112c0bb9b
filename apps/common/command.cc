#include "apps/common/command.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <cstdio>
#include <set>

#include "framework/base/error.h"
#include "framework/base/text.h"
#include "framework/config/pipeline_parts.h"
#include "framework/device/cuda_device.h"
#include "framework/registry/options.h"

namespace sikv {

void print(const std::string& text) { std::fputs(text.c_str(), stdout); }

void note(const std::string& text) {
  static std::set<std::string> said;
  if (!said.insert(text).second) return;
  std::fflush(stdout);
  std::fputs(("note: " + text + "\n").c_str(), stderr);
}

void note_surprises(const Config& config, const Source& source, const Measured& measured) {
  if (config.model && !config.source.synthetic &&
      (config.model->query_heads != source.num_query_heads ||
       config.model->kv_heads != source.num_kv_heads ||
       config.model->head_dim != source.head_dim)) {
    note(
        "measured on the trace's own model, which is not the config's: that one only serves "
        "`sikv explain`");
  }
  const int64_t encoded = source.prompt / SIKV_PAGE_TOKENS * SIKV_PAGE_TOKENS;
  if (measured.budget && encoded > 0 && *measured.budget >= encoded) {
    note(fmt::format("the budget of {} covers all {} encoded tokens: everything is selected",
                     *measured.budget, encoded));
  }
  if (encoded == 0) {
    note(fmt::format(
        "a prompt of {} tokens fills no page of {}: nothing is encoded, bytes/token is 0",
        source.prompt, SIKV_PAGE_TOKENS));
  }
}

void note_pins(const PipelineSpec& spec, int64_t prompt) {
  const int64_t encoded = prompt / SIKV_PAGE_TOKENS * SIKV_PAGE_TOKENS;
  if (encoded == 0 || spec.pinned < encoded) return;
  note(fmt::format(
      "pinned={}: a prompt of {} tokens has {} that can be pinned; all are, exact, and nothing is "
      "left to select",
      spec.pinned, prompt, encoded));
}

std::string left_of_sweep(const Config& config) {
  if (!config.source.synthetic) return {};
  const SyntheticSpec& synthetic = *config.source.synthetic;
  std::vector<std::string> left;
  const auto add = [&](const char* what, const auto& entries) {
    if (entries.size() < 2) return;
    left.push_back(fmt::format("{} {}", what, fmt::join(entries.begin() + 1, entries.end(), ", ")));
  };
  add("context", synthetic.context);
  add("batch", synthetic.batch);
  if (synthetic.batch_max) left.emplace_back("batch max");
  return join(left, " and ");
}

void note_left_of_sweep(const Config& config) {
  const std::string left = left_of_sweep(config);
  if (left.empty()) return;
  const SyntheticSpec& synthetic = *config.source.synthetic;
  note(fmt::format(
      "{}: measured at context {}, batch {}, without {}: sikv throughput measures all of them",
      config.file.string(), synthetic.context.front(),
      synthetic.batch_max ? 1 : synthetic.batch.front(), left));
}

void PluginFlags::add_to(CLI::App& app) {
  app.add_option("--plugin-path", folders_, "a folder with more plugins; may be repeated")
      ->type_name("DIR")
      ->allow_extra_args(false);
}

Registry PluginFlags::open() const { return Registry::standard(folders_, served_devices); }

void ConfigFlags::add_to(CLI::App& app) {
  app.add_option("--set", sets_,
                 "overrides a key of the config, as in pipeline.selector.budget=512; may be "
                 "repeated")
      ->type_name("KEY=VALUE")
      ->allow_extra_args(false);
  app.add_option("--force", forces_,
                 "runs this variant or fails, as in selector=ref or keys.sign_vq=cpu; may be "
                 "repeated")
      ->type_name("ROLE[.ID]=VARIANT")
      ->allow_extra_args(false);
  plugins_.add_to(app);
  app.add_option("--threads", threads_, "CPU workers; 0 = one per core")->type_name("N");
  app.add_option("--device", device_, "cpu, cuda, cuda:N or auto")->type_name("NAME");
}

namespace {

sikv_option_value value_of(const PluginSpec& plugin, const char* name, const Registry& registry) {
  const sikv_option_spec& spec =
      find_option(registry.options(SIKV_SELECTOR, plugin.id), name, plugin.id);
  const auto given = std::find_if(plugin.options.begin(), plugin.options.end(),
                                  [&](const auto& option) { return option.first == name; });
  return parse_option(spec, given == plugin.options.end() ? spec.default_value : given->second,
                      plugin.id);
}

// Empty, or what a budget gives that one may not expect.
std::string budget_surprise(const PluginSpec& holder, const Registry& registry) {
  const sikv_option_value budget = value_of(holder, "budget", registry);
  if (budget.i == 0 || (budget.i < 0 && budget.f == 0)) {
    return fmt::format(
        "budget=0 of {} selects nothing: attention is to pinned tokens and the tail alone",
        holder.id);
  }
  const auto options = registry.options(SIKV_SELECTOR, holder.id);
  const bool has_window = std::any_of(
      options.begin(), options.end(),
      [](const sikv_option_spec& spec) { return std::string_view(spec.name) == "window"; });
  if (!has_window || budget.i < 0) return {};
  const int64_t window = value_of(holder, "window", registry).i;
  if (budget.i >= window) return {};
  // Selectors that evict keep the window's tokens; the window of others is of queries.
  sikv_device any{};
  any.struct_size = sizeof any;
  const auto variants = registry.candidates(SIKV_SELECTOR, holder.id, any);
  if (variants.front().variant->selector().evict == nullptr) return {};
  return fmt::format(
      "budget={} of {} is below its window={}, which is kept whatever the budget: raise the budget "
      "or lower the window",
      budget.i, holder.id, window);
}

}  // namespace

Config ConfigFlags::load(const std::filesystem::path& file, Registry& registry,
                         SourceUse source) const {
  Config config = load_config(file, sets_, registry, source);
  if (const auto budgets = overridden_budgets(config, registry); !budgets.empty()) {
    const std::string given =
        config.budgets.empty() ? "" : fmt::format(" [{}]", join(config.budgets));
    note(fmt::format("{}: budgets{} stand in for {}", file.string(), given, join(budgets)));
  }
  if (const auto ids = without_budget(config, registry); !ids.empty()) {
    note(fmt::format("{}: budgets do not apply to {}, which {} no budget to set", file.string(),
                     join(ids), ids.size() == 1 ? "has" : "have"));
  }
  for (const PipelineSpec& spec : expand_budgets(config, registry)) {
    const PluginSpec* const holder = budget_holder(spec.selector, registry);
    const std::string text = holder == nullptr ? "" : budget_surprise(*holder, registry);
    if (!text.empty()) note(fmt::format("{}: {}", file.string(), text));
  }
  if (threads_) config.threads = *threads_;
  if (!device_.empty()) {
    check_device_name(device_);
    for (PipelineSpec& pipeline : config.pipelines) pipeline.device = device_;
  }
  for (const std::string& assignment : forces_) force(config, assignment, registry);
  return config;
}

void ConfigFlags::force(Config& config, const std::string& assignment,
                        const Registry& registry) const {
  const size_t equals = assignment.find('=');
  if (equals == std::string::npos || equals + 1 == assignment.size()) {
    throw Error("--force {}: write ROLE=VARIANT or ROLE.ID=VARIANT, as in selector=ref",
                assignment);
  }
  const std::string target = assignment.substr(0, equals);
  const std::string variant = assignment.substr(equals + 1);
  const size_t dot = target.find('.');
  const std::string role = target.substr(0, dot);
  const std::string id = dot == std::string::npos ? "" : target.substr(dot + 1);

  std::vector<std::string> roles, ids;
  for (const PipelinePart& part : kPipelineParts) roles.emplace_back(part.family);
  const auto part = std::find_if(kPipelineParts.begin(), kPipelineParts.end(),
                                 [&](const PipelinePart& p) { return p.family == role; });
  if (part == kPipelineParts.end()) {
    const std::string near = did_you_mean(role, roles);
    throw Error("--force {}: there is no role '{}'{}", assignment, role,
                near.empty() ? "; the roles are " + join(roles) : near);
  }
  bool used = false;
  for (PipelineSpec& pipeline : config.pipelines) {
    // A base is forced by its id only.
    for (const PluginSpec* plugin : chain_of(pipeline.*part->plugin)) {
      ids.push_back(plugin->id);
      if (id.empty() ? plugin != &(pipeline.*part->plugin) : plugin->id != id) continue;
      try {
        force_variant(pipeline, *part, plugin->id, variant, registry);
      } catch (const Error& error) {
        throw Error("--force {}: {}", assignment, error.what());
      }
      used = true;
    }
  }
  if (!used) {
    const std::string near = did_you_mean(id, ids);
    throw Error("--force {}: no pipeline of {} has {} '{}'{}", assignment, config.file.string(),
                role, id, near.empty() ? "; there is " + join(ids) : near);
  }
}

namespace {

bool runs_on_gpu(const PipelineSpec& spec, const Registry& registry) {
  const auto on_gpu = [&](const PipelinePart& part) {
    const auto chain = chain_of(spec.*part.plugin);
    return std::all_of(chain.begin(), chain.end(), [&](const PluginSpec* plugin) {
      const std::string* forced = forced_variant(spec, part, plugin->id);
      return std::any_of(
          registry.variants().begin(), registry.variants().end(), [&](const Variant& variant) {
            return variant.device == SIKV_CUDA && variant.kind == part.kind &&
                   variant.id == plugin->id && (forced == nullptr || variant.variant == *forced);
          });
    });
  };
  return std::all_of(kPipelineParts.begin(), kPipelineParts.end(), on_gpu);
}

}  // namespace

Device& Devices::open(const std::string& name) {
  std::unique_ptr<Device>& device = open_[name];
  if (device == nullptr) {
    const int gpu = gpu_number(name);
    device = gpu >= 0 ? open_cuda_device(gpu, threads_) : open_cpu_device(threads_);
  }
  return *device;
}

Device& Devices::open(const PipelineSpec& spec, const Registry& registry) {
  if (spec.device != "auto") return open(spec.device);
  return open(runs_on_gpu(spec, registry) ? "cuda" : "cpu");
}

std::string examples(const std::vector<std::string>& lines) {
  std::string text = "Examples:";
  for (const std::string& line : lines) text += "\n  " + line;
  return text;
}

void add_config_argument(CLI::App& app, std::filesystem::path& file) {
  app.add_option("CONFIG", file, "a YAML config, as in configs/")->required();
}

void check_own_files(std::initializer_list<std::pair<const char*, std::filesystem::path>> outputs) {
  std::map<std::filesystem::path, const char*> named;
  for (const auto& [option, file] : outputs) {
    if (file.empty()) continue;
    const auto [first, is_new] = named.try_emplace(
        std::filesystem::weakly_canonical(std::filesystem::absolute(file)), option);
    if (!is_new) {
      throw Error("{} and {} both name {}: give each its own file", first->second, option,
                  file.string());
    }
  }
}

void add_output_option(CLI::App& app, const char* name, std::filesystem::path& file,
                       const char* help) {
  app.add_option(name, file, help)->type_name("FILE")->check([](const std::string& given) {
    return given.empty() ? std::string("needs the name of a file, not ''") : std::string();
  });
}

}  // namespace sikv
