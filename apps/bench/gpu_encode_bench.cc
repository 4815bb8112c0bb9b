// Prefill and append on a GPU: fit and encode of whole prompts, and what one token per sequence
// costs in decode, page encodes included.
//
//   gpu_encode_bench [--codecs 'rot_lm+rot_lm' ...] [--batch B] [--context T] [--json FILE]
//
// K and V lie as a model writes them, [tokens, H, D] fp16. GB are bytes of K and V read once and of
// codes written once, however often they are; `share` is their rate over that of a device-to-device
// copy measured in the same run.
#include <CLI/CLI.hpp>
#include <algorithm>
#include <cstdio>
#include <memory>
#include <nlohmann/json.hpp>
#include <ostream>
#include <string>
#include <vector>

#include "apps/bench/gpu_bench.h"
#include "framework/base/file.h"
#include "framework/cache/kv_cache.h"
#include "framework/config/pipeline_text.h"
#include "framework/device/cuda_device.h"
#include "framework/pipeline/pipeline.h"
#include "framework/report/environment.h"

namespace sikv {
namespace {

using Json = nlohmann::ordered_json;
using namespace bench;  // NOLINT: all of it is for this

constexpr int kAppendLayers = 8;
constexpr int kAppendContext = 1024;

struct Flags {
  std::vector<std::string> codecs = {"sign_vq+intq",  "sign_vq(fit_tokens=0)+intq",
                                     "rot_lm+rot_lm", "rot_lm(fit_tokens=0)+rot_lm(fit_tokens=0)",
                                     "kivi+kivi",     "fp16+fp16"};
  std::vector<int> append_batches = {8, 64};
  int batch = 8, context = 131072, kv_heads = 8, group = 4, head_dim = 128, runs = 12;
  std::filesystem::path json;
};

// Two codecs and a cache that they fill.
class Codecs {
 public:
  Codecs(const std::string& text, const Flags& flags, int layers, int batch, int tokens,
         const Registry& registry, Device& device)
      : device_(device),
        layers_(layers),
        batch_(batch),
        heads_(flags.kv_heads),
        tokens_(tokens),
        shape_{sizeof(sikv_shape),
               layers,
               flags.kv_heads * flags.group,
               flags.kv_heads,
               flags.head_dim,
               SIKV_FP16,
               batch,
               tokens + 2 * SIKV_PAGE_TOKENS + 1,
               0},
        spec_(parse_pipeline(text + " > full(pinned=0) > gather_attention", registry)),
        key_(make(SIKV_KEY_CODEC, spec_.keys, registry)),
        value_(make(SIKV_VALUE_CODEC, spec_.values, registry)),
        cache_(device, shape_, {key_.describe(), &key_.variant().codec(), key_.self()},
               {value_.describe(), &value_.variant().codec(), value_.self()}, {0}),
        workspace_(device, std::max(key_.workspace_bytes(), value_.workspace_bytes())),
        first_(device, static_cast<size_t>(batch), 0),
        count_(device, static_cast<size_t>(batch), tokens),
        slots_(device, static_cast<size_t>(batch * flags.kv_heads), 0) {
    for (int layer = 0; layer < layers; ++layer) {
      for (int row = 0; row < cache_.num_rows(); ++row) cache_.extend(layer, row, tokens);
    }
    for (int b = 0; b < batch; ++b) first_.edit(static_cast<size_t>(b)) = b * tokens;
  }

  void fit(CodecInstance& codec, sikv_rows rows, int layer = 0) {
    codec.fit(on_device(rows), cache_.view(layer), workspace_.as<>(), device_.stream());
  }
  void encode(CodecInstance& codec, sikv_rows rows, int layer = 0) {
    codec.encode(on_device(rows), slots_.device(), cache_.view(layer), workspace_.as<>(),
                 device_.stream());
  }
  CodecInstance& key() { return key_; }
  CodecInstance& value() { return value_; }
  double code_bytes() const { return cache_.bytes_per_token() * batch_ * heads_ * tokens_; }
  std::string text() const {
    const auto part = [](const PluginSpec& plugin) {
      std::string text = plugin.id, separator = "(";
      for (const auto& [name, value] : plugin.options) {
        text += separator + name + "=" + value;
        separator = ",";
      }
      return plugin.options.empty() ? text : text + ")";
    };
    return part(spec_.keys) + "+" + part(spec_.values);
  }

  // Microseconds per layer of each of `steps` appended tokens, as steps of a recorded decode.
  std::vector<double> append_us(const void* k, const void* v, int steps) {
    std::unique_ptr<Device::Recording> graphs[2];
    std::vector<int> bounds[2];
    std::vector<double> ms = time_ms(
        device_, 0, steps, [&](int, cudaEvent_t begin, cudaEvent_t end, cudaStream_t stream) {
          const bool flush = cache_.flush_due(0);
          std::vector<int> now;
          for (int layer = 0; layer < layers_; ++layer) {
            if (flush) cache_.reserve_flush(layer);
            now.push_back(cache_.encoded_bound(layer, flush));
          }
          cache_.upload();
          if (graphs[flush] == nullptr || bounds[flush] != now) {
            device_.synchronize();
            cache_.begin_recording(now);
            graphs[flush] = device_.record([&] { enqueue_append(k, v, flush); });
            cache_.end_recording();
            bounds[flush] = now;
          }
          check_cuda(cudaEventRecord(begin, stream), "cudaEventRecord");
          graphs[flush]->replay();
          check_cuda(cudaEventRecord(end, stream), "cudaEventRecord");
          for (int layer = 0; layer < layers_; ++layer) cache_.replayed(layer, flush);
        });
    for (double& time : ms) time *= 1e3 / layers_;
    return ms;
  }

 private:
  CodecInstance make(sikv_kind kind, const PluginSpec& plugin, const Registry& registry) {
    const Variant& variant = registry.choose(kind, plugin.id, device_.info());
    return {variant, OptionSet::parse(variant.options, plugin.options, plugin.id), shape_,
            device_.info(), device_.host()};
  }
  sikv_rows on_device(sikv_rows rows) const {
    rows.first = first_.device();
    rows.count = count_.device();
    return rows;
  }
  void enqueue_append(const void* k, const void* v, bool flush) {
    for (int layer = 0; layer < layers_; ++layer) {
      if (flush) {
        const KvCache::Flush page = cache_.begin_flush(layer);
        const sikv_cache_view view = cache_.view(layer);
        key_.encode(page.k, page.first_slot, view, workspace_.as<>(), device_.stream());
        value_.encode(page.v, page.first_slot, view, workspace_.as<>(), device_.stream());
        cache_.end_flush(layer);
      }
      cache_.append(layer, k, v);
    }
  }

  Device& device_;
  int layers_, batch_, heads_, tokens_;
  sikv_shape shape_;
  PipelineSpec spec_;
  CodecInstance key_, value_;
  KvCache cache_;
  DeviceBuffer workspace_;
  MirroredArray first_, count_, slots_;
};

Json measure_prefill(const std::string& text, const Flags& flags, double copy, const Prompt& prompt,
                     const Registry& registry, Device& device) {
  Codecs codecs(text, flags, 1, flags.batch, flags.context, registry, device);
  const auto ms = [&](auto&& work) { return median(time_calls_ms(device, 3, flags.runs, work)); };
  const double fit = ms([&] {
    codecs.fit(codecs.key(), prompt.keys());
    codecs.fit(codecs.value(), prompt.values());
  });
  const double encode_k = ms([&] { codecs.encode(codecs.key(), prompt.keys()); });
  const double encode_v = ms([&] { codecs.encode(codecs.value(), prompt.values()); });
  const double all = ms([&] {
    codecs.fit(codecs.key(), prompt.keys());
    codecs.fit(codecs.value(), prompt.values());
    codecs.encode(codecs.key(), prompt.keys());
    codecs.encode(codecs.value(), prompt.values());
  });
  const double bytes = 2.0 * static_cast<double>(prompt.bytes()) + codecs.code_bytes();
  std::printf("%-55s %7.3f ms (fit %.3f, K %.3f, V %.3f), %.0f GB/s, %.0f%% of copy\n",
              codecs.text().c_str(), all, fit, encode_k, encode_v, bytes / all / 1e6,
              bytes / all / copy / 1e7);
  std::fflush(stdout);
  return {{"codecs", codecs.text()},
          {"batch", flags.batch},
          {"context", flags.context},
          {"kv_heads", flags.kv_heads},
          {"head_dim", flags.head_dim},
          {"median_ms", all},
          {"fit_ms", fit},
          {"encode_keys_ms", encode_k},
          {"encode_values_ms", encode_v},
          {"bytes", bytes},
          {"gb_per_s", bytes / all / 1e6},
          {"share_of_copy", bytes / all / copy / 1e9}};
}

Json measure_append(const std::string& text, const Flags& flags, int batch,
                    const Registry& registry, Device& device) {
  Codecs codecs(text, flags, kAppendLayers, batch, kAppendContext, registry, device);
  Prompt prompt(device, {batch, kAppendContext, flags.kv_heads, flags.group, flags.head_dim, 0}, 0);
  for (int layer = 0; layer < kAppendLayers; ++layer) {
    prompt.make(layer);
    codecs.fit(codecs.key(), prompt.keys(), layer);
    codecs.fit(codecs.value(), prompt.values(), layer);
    codecs.encode(codecs.key(), prompt.keys(), layer);
    codecs.encode(codecs.value(), prompt.values(), layer);
  }
  // The first tokens of each sequence, [B, H, D], stand in for every step's.
  const std::vector<double> us =
      codecs.append_us(prompt.keys().data, prompt.values().data, 2 * SIKV_PAGE_TOKENS);
  // The second period: a page was recorded before it.
  const std::vector<double> period(us.end() - SIKV_PAGE_TOKENS, us.end());
  const double page = *std::max_element(period.begin(), period.end());
  std::printf("%-55s append at batch %3d: %.2f us per layer (a token %.2f, with a page %.1f)\n",
              codecs.text().c_str(), batch, mean(period), median(period), page);
  std::fflush(stdout);
  return {{"codecs", codecs.text()},
          {"batch", batch},
          {"kv_heads", flags.kv_heads},
          {"head_dim", flags.head_dim},
          {"mean_us", mean(period)},
          {"token_us", median(period)},
          {"page_us", page}};
}

void run(const Flags& flags, const std::vector<std::string>& command_line) {
  const Registry registry = Registry::standard({}, served_devices);
  const std::unique_ptr<Device> device = open_cuda_device();
  const double copy = copy_tb_per_s(*device);
  std::printf("%s, copy %.2f TB/s\n", device->info().name, copy);
  Json result = {{"environment", environment(command_line, *device)}, {"copy_tb_per_s", copy}};
  result["rows"] = Json::array();
  result["append"] = Json::array();
  int failed = 0;
  const auto attempt = [&](auto&& measure) {
    try {
      measure();
    } catch (const Error& error) {
      std::printf("FAILED: %s\n", error.what());
      ++failed;
    }
  };
  {
    Prompt prompt(*device,
                  {flags.batch, flags.context, flags.kv_heads, flags.group, flags.head_dim, 0}, 0);
    prompt.make(0);
    for (const std::string& text : flags.codecs) {
      attempt([&] {
        result["rows"].push_back(measure_prefill(text, flags, copy, prompt, registry, *device));
      });
    }
  }
  for (const std::string& text : flags.codecs) {
    if (text.find("fit_tokens") != std::string::npos) continue;  // appends do not fit
    for (const int batch : flags.append_batches) {
      attempt([&] {
        result["append"].push_back(measure_append(text, flags, batch, registry, *device));
      });
    }
  }
  if (!flags.json.empty()) {
    write_atomically(flags.json, [&](std::ostream& file) { file << result.dump(1) << '\n'; });
  }
  if (failed > 0) throw Error("{} rows failed", failed);
}

}  // namespace
}  // namespace sikv

int main(int argc, char** argv) {
  sikv::Flags flags;
  CLI::App app("Fit and encode of prompts and append of tokens on a GPU.");
  app.add_option("--codecs", flags.codecs, "KEYS+VALUES as in a pipeline's printed form");
  app.add_option("--batch", flags.batch)->check(CLI::PositiveNumber);
  app.add_option("--context", flags.context, "a multiple of 256")->check(CLI::PositiveNumber);
  app.add_option("--append-batch", flags.append_batches);
  app.add_option("--kv-heads", flags.kv_heads)->check(CLI::PositiveNumber);
  app.add_option("--head-dim", flags.head_dim);
  app.add_option("--runs", flags.runs)->check(CLI::PositiveNumber);
  app.add_option("--json", flags.json, "also write the result here");
  CLI11_PARSE(app, argc, argv);
  try {
    sikv::run(flags, {argv, argv + argc});
  } catch (const std::exception& error) {
    std::fprintf(stderr, "gpu_encode_bench: %s\n", error.what());
    return 2;
  }
  return 0;
}
