#include "framework/experiment/source.h"

#include <algorithm>
#include <numeric>

#include "framework/base/error.h"
#include "framework/base/text.h"
#include "framework/trace/synth.h"
#include "framework/trace/trace.h"

namespace sikv {
namespace {

// Fills prompt and steps from what the config asks and the tokens and queries there are.
void settle_lengths(const SourceSpec& spec, const std::string& name, Source& source) {
  const int64_t tokens = source.num_tokens;
  source.steps = spec.steps;
  source.prompt = spec.prompt;
  if (source.prompt == 0) source.prompt = tokens - (source.steps == 0 ? 1 : source.steps);
  if (source.steps == 0) source.steps = tokens - source.prompt;
  if (source.prompt < 1 || source.prompt + source.steps > tokens) {
    throw Error(
        "{} holds {} tokens, but prompt {} and steps {} need {}: lower source.prompt or "
        "source.steps",
        name, tokens, source.prompt, source.steps, source.prompt + source.steps);
  }
  if (source.prompt < source.first_query) {
    throw Error(
        "{} holds queries from position {} on, but the first decode step is at {}: set "
        "source.prompt to {} or more, or capture more queries",
        name, source.first_query, source.prompt, source.first_query);
  }
}

// The layers asked for, of those that the trace holds.
std::vector<int> wanted_layers(const SourceSpec& spec, const TraceReader& reader) {
  const std::vector<int>& held = reader.layers();
  for (int layer : spec.layers) {
    if (std::find(held.begin(), held.end(), layer) != held.end()) continue;
    std::vector<std::string> there;
    for (int l : held) there.push_back(std::to_string(l));
    throw Error("{} holds no layer {}: choose source.layers among {}", spec.trace.string(), layer,
                join(there));
  }
  return spec.layers.empty() ? held : spec.layers;
}

Offer trace_offer(const SourceSpec& spec, const TraceReader& reader) {
  const std::vector<int> wanted = wanted_layers(spec, reader);
  Offer offer{spec.trace.string(), static_cast<int>(wanted.size()), reader.meta().num_layers, 0,
              true};
  for (int layer : wanted) {
    offer.first_query = std::max(offer.first_query, reader.layer_info(layer).first_query_position);
    offer.w_o &= reader.has_w_o(layer);
  }
  return offer;
}

void judge_all(Source& source) {
  source.judged.resize(source.layers.size());
  std::iota(source.judged.begin(), source.judged.end(), 0);
}

Source load_trace(const SourceSpec& spec) {
  const std::string name = spec.trace.string();
  const TraceReader reader(spec.trace);
  const TraceMeta& meta = reader.meta();
  Source source;
  source.num_query_heads = meta.num_query_heads;
  source.num_kv_heads = meta.num_kv_heads;
  source.head_dim = meta.head_dim;
  source.rope_theta = meta.rope_theta;
  source.num_tokens = reader.num_tokens();

  source.offer = trace_offer(spec, reader);

  const std::vector<int> wanted = wanted_layers(spec, reader);
  for (int layer : wanted) {
    TraceLayer read = reader.read_layer(layer);
    if (source.layers.empty()) {
      source.dtype = read.dtype;
      source.num_queries = read.num_queries;
      source.first_query = read.first_query_position;
    } else if (read.dtype != source.dtype || read.num_queries != source.num_queries ||
               read.first_query_position != source.first_query) {
      throw Error("{}: layer {} differs from layer {} in type or queries: capture them alike", name,
                  layer, wanted.front());
    }
    source.layers.push_back(
        {layer, std::move(read.k), std::move(read.v), std::move(read.q), std::move(read.w_o)});
  }
  for (int layer : spec.judge) {
    const auto found = std::find(wanted.begin(), wanted.end(), layer);
    if (found == wanted.end()) {
      throw Error("{} holds no layer {}, which judge names: choose among its layers", name, layer);
    }
    source.judged.push_back(static_cast<int>(found - wanted.begin()));
  }
  if (spec.judge.empty()) judge_all(source);
  settle_lengths(spec, name, source);
  if (source.prompt + source.steps > source.first_query + source.num_queries) {
    throw Error("{} holds queries up to position {}, but the last decode step is at {}", name,
                source.first_query + source.num_queries - 1, source.prompt + source.steps - 1);
  }
  const std::string judged =
      spec.judge.empty() ? "" : fmt::format(", {} of them judged", spec.judge.size());
  source.text = fmt::format("{}, {} layers{}, prompt {}, {} steps", name, source.layers.size(),
                            judged, source.prompt, source.steps);
  return source;
}

Source synthesize(const Config& config) {
  const SyntheticSpec& synthetic = *config.source.synthetic;
  const ModelSpec model = config.model.value_or(ModelSpec{});
  SynthSpec spec;
  spec.kind = parse_synth_kind(synthetic.kind);
  spec.context = synthetic.context.front();
  spec.steps = config.source.steps == 0 ? 32 : config.source.steps;
  spec.batch = synthetic.batch.empty() ? 1 : synthetic.batch.front();
  spec.num_layers = model.layers;
  spec.num_query_heads = model.query_heads;
  spec.num_kv_heads = model.kv_heads;
  spec.head_dim = model.head_dim;
  spec.dtype = parse_dtype(synthetic.dtype);
  spec.seed = synthetic.seed;
  Synthesizer synthesizer(spec);

  Source source;
  source.num_sequences = spec.batch;
  source.num_query_heads = spec.num_query_heads;
  source.num_kv_heads = spec.num_kv_heads;
  source.head_dim = spec.head_dim;
  source.dtype = spec.dtype;
  source.rope_theta = model.rope_theta;
  source.num_tokens = spec.context + spec.steps;
  TraceLayer drawn;
  for (int l = 0; l < spec.num_layers; ++l) {
    SourceLayer& layer = source.layers.emplace_back();
    layer.model_layer = l;
    for (int b = 0; b < spec.batch; ++b) {
      synthesizer.fill(b, l, drawn);
      layer.k.insert(layer.k.end(), drawn.k.begin(), drawn.k.end());
      layer.v.insert(layer.v.end(), drawn.v.begin(), drawn.v.end());
      layer.q.insert(layer.q.end(), drawn.q.begin(), drawn.q.end());
    }
  }
  source.num_queries = drawn.num_queries;
  source.first_query = drawn.first_query_position;
  source.offer = source_offer(config);
  judge_all(source);
  SourceSpec lengths = config.source;
  lengths.steps = spec.steps;
  settle_lengths(lengths, "the synthetic source", source);
  source.text = fmt::format("synthetic {} (seed {}), batch {}, {} layers, prompt {}, {} steps",
                            synthetic.kind, synthetic.seed, spec.batch, spec.num_layers,
                            source.prompt, source.steps);
  return source;
}

}  // namespace

sikv_shape Source::shape() const {
  sikv_shape shape{};
  shape.struct_size = sizeof shape;
  shape.num_layers = static_cast<int32_t>(layers.size());
  shape.num_query_heads = num_query_heads;
  shape.num_kv_heads = num_kv_heads;
  shape.head_dim = head_dim;
  shape.dtype = dtype;
  shape.max_sequences = num_sequences;
  shape.max_tokens = static_cast<int32_t>(prompt + steps);
  shape.rope_theta = rope_theta;
  return shape;
}

std::vector<int> Source::layer_numbers() const {
  std::vector<int> numbers;
  for (const SourceLayer& layer : layers) numbers.push_back(layer.model_layer);
  return numbers;
}

int32_t parse_dtype(const std::string& name) {
  if (name == "fp32") return SIKV_FP32;
  if (name == "fp16") return SIKV_FP16;
  if (name == "bf16") return SIKV_BF16;
  throw Error("the input type is {}: choose fp16, bf16 or fp32", name);
}

Offer source_offer(const Config& config) {
  if (!config.source.synthetic) {
    return trace_offer(config.source, TraceReader(config.source.trace));
  }
  const int layers = config.model.value_or(ModelSpec{}).layers;
  const int64_t shortest =
      std::max<int64_t>(0, config.source.synthetic->context.front() - kSynthPromptQueries);
  return {"a synthetic source", layers, layers, shortest, false};
}

Source load_source(const Config& config) {
  if (config.source.synthetic) return synthesize(config);
  if (config.source.trace.empty()) {
    throw Error("the config names no source: set source.trace or source.synthetic");
  }
  return load_trace(config.source);
}

}  // namespace sikv
