#include "framework/trace/synth.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <new>
#include <set>
#include <span>
#include <string>

#include "framework/base/error.h"
#include "framework/base/interrupt.h"
#include "framework/base/random.h"
#include "framework/base/text.h"
#include "framework/trace/trace_format.h"
#include "plugins/abi/sikv_log.h"

namespace sikv {
namespace {

constexpr std::array<std::string_view, 3> kKindNames = {"gaussian", "clustered", "needle"};

constexpr int64_t kSinks = 4;
constexpr uint64_t kClusters = 64;
constexpr int64_t kRun = 16;
constexpr int64_t kShortestHaystack = 64;
constexpr int64_t kNewest = 256;
constexpr int32_t kVocabulary = 32000;
constexpr int64_t kMaxTokens = int64_t{1} << 32;
constexpr float kOutlierScale = 8;
constexpr float kCentre = 0.7f, kNoise = 0.71414284f;     // squares sum to 1
constexpr float kKeep = 0.9f, kInnovation = 0.43588990f;  // AR(1), squares sum to 1
constexpr float kShared = 0.8f, kOwn = 0.6f;              // squares sum to 1
constexpr float kValueMean = 0.3f, kSinkValue = 0.02f, kSinkNoise = 0.1f, kNeedleValue = 3;
constexpr double kNeedleComponent = 2;  // of a query, in units of sqrt(D)
// Above the expected log-sum-exp of the ordinary tokens, which scatters more where they are few.
constexpr double kNeedleMargin = 4, kNeedleScatter = 48;

// Parts of a seed; each names one independent stream.
enum Stream : uint64_t {
  kLayers,
  kModel,
  kNoiseOf,
  kQueries,
  kNeedles,
  kPositions,
  kTiles,
  kTokens
};

struct Head {
  std::vector<float> key_mean, key_scale;      // [D]
  std::vector<float> value_mean, value_scale;  // [D]
  std::vector<float> key_centres;              // [kClusters, D]; empty for kind gaussian
  std::vector<float> value_centres;
  std::vector<float> sink_direction;  // w [D]
};

double dot(std::span<const float> a, std::span<const float> b) {
  double sum = 0;
  for (size_t i = 0; i < a.size(); ++i) sum += double{a[i]} * b[i];
  return sum;
}

// a -= factor * b
void subtract(std::span<float> a, double factor, std::span<const float> b) {
  for (size_t i = 0; i < a.size(); ++i) a[i] -= static_cast<float>(factor * b[i]);
}

std::vector<float> normals(uint64_t seed, size_t size) {
  std::vector<float> values(size);
  Random(seed).fill_normal(values);
  return values;
}

void normalise(std::span<float> a) {
  const double length = std::sqrt(dot(a, a));
  for (float& x : a) x = static_cast<float>(x / length);
}

// The loops sit inside the switch: a branch per element would cost more than the conversion.
void store_row(std::span<const float> values, int32_t dtype, std::byte* out) {
  if (dtype == SIKV_FP32) {
    std::memcpy(out, values.data(), values.size_bytes());
    return;
  }
  const auto convert = [&](auto to_16_bits) {
    for (size_t i = 0; i < values.size(); ++i) {
      const uint16_t bits = to_16_bits(values[i]);
      std::memcpy(out + 2 * i, &bits, 2);
    }
  };
  if (dtype == SIKV_FP16) {
    convert([](float x) { return sikv_float_to_fp16(x); });
  } else {
    convert([](float x) { return sikv_float_to_bf16(x); });
  }
}

void resize(std::vector<std::byte>& elements, int64_t bytes) {
  try {
    elements.resize(static_cast<size_t>(bytes));
  } catch (const std::bad_alloc&) {
    throw Error("synthetic: no memory for a tensor of {}; use a shorter context or fewer heads",
                bytes_text(static_cast<uint64_t>(bytes)));
  }
}

void judge(const SynthSpec& spec) {
  const auto within = [](const char* name, int64_t value, int64_t least, int64_t most) {
    if (value < least || value > most) {
      throw Error("synthetic: {} is {}; it must be from {} to {}", name, value, least, most);
    }
  };
  within("context", spec.context, 1, kMaxTokens);
  within("steps", spec.steps, 0, kMaxTokens);
  within("batch", spec.batch, 1, 1 << 20);
  within("tile_tokens", spec.tile_tokens, 0, kMaxTokens);
  within("num_queries", spec.num_queries, 0, spec.context + spec.steps);
  if (spec.dtype != SIKV_FP32 && spec.dtype != SIKV_FP16 && spec.dtype != SIKV_BF16) {
    throw Error("synthetic: element type {} cannot be made; use fp16, bf16 or fp32", spec.dtype);
  }
  if (spec.kind != SynthKind::kNeedle) return;
  within("steps", spec.steps, 1, kMaxTokens);
  within("context", spec.context, kShortestHaystack, kMaxTokens);
  const int64_t places = spec.context - std::min(kNewest, spec.context / 4) - kSinks;
  if (spec.steps > places) {
    throw Error(
        "synthetic: {} steps need a needle each, and a context of {} has room for {}; use "
        "fewer steps or a longer context",
        spec.steps, spec.context, places);
  }
  if (spec.num_queries != 0 && spec.num_queries < spec.steps) {
    throw Error("synthetic: num_queries is {}; {} steps need at least one each", spec.num_queries,
                spec.steps);
  }
}

}  // namespace

SynthKind parse_synth_kind(std::string_view name) {
  for (size_t i = 0; i < kKindNames.size(); ++i) {
    if (kKindNames[i] == name) return static_cast<SynthKind>(i);
  }
  const std::vector<std::string> names(kKindNames.begin(), kKindNames.end());
  throw Error("synthetic: kind '{}' is not one of {}{}", name, join(names),
              did_you_mean(name, names));
}

std::string_view synth_kind_name(SynthKind kind) { return kKindNames[static_cast<size_t>(kind)]; }

struct Synthesizer::Impl {
  SynthSpec spec;

  // What the last layer needed; drawn anew when another is asked for.
  int layer = -1;
  std::vector<Head> heads;
  // With tiles, [tile_tokens, Hkv, D] elements as 64-bit words: drawn with all signs as they are,
  // and those xor what all signs flipped would give.
  struct Tile {
    std::vector<uint64_t> plain, change;
  };
  Tile key_tile, value_tile;

  explicit Impl(const SynthSpec& given) : spec(given) {
    judge(spec);
    trace_format::judge_meta("synthetic", meta());
    if (spec.num_queries == 0)
      spec.num_queries = std::min(spec.context, kSynthPromptQueries) + spec.steps;
  }

  size_t dim() const { return static_cast<size_t>(spec.head_dim); }
  int64_t num_tokens() const { return spec.context + spec.steps; }
  int64_t tile_tokens() const { return std::min(spec.tile_tokens, num_tokens()); }
  size_t vector_bytes() const { return dim() * static_cast<size_t>(sikv_dtype_bytes(spec.dtype)); }
  size_t row_bytes() const { return vector_bytes() * static_cast<size_t>(spec.num_kv_heads); }

  uint64_t layer_seed(int l, Stream stream) const {
    return derive_seed(derive_seed(derive_seed(spec.seed, kLayers), static_cast<uint64_t>(l)),
                       stream);
  }
  uint64_t sequence_seed(int l, int sequence, Stream stream) const {
    return derive_seed(layer_seed(l, stream), static_cast<uint64_t>(sequence));
  }

  TraceMeta meta() const {
    TraceMeta result;
    result.model = fmt::format("synthetic-{}", synth_kind_name(spec.kind));
    result.text = fmt::format("generated: context {}, steps {}, seed {}", spec.context, spec.steps,
                              spec.seed);
    result.license = "none needed, generated";
    result.tokenizer = "none";
    result.num_layers = spec.num_layers;
    result.num_query_heads = spec.num_query_heads;
    result.num_kv_heads = spec.num_kv_heads;
    result.head_dim = spec.head_dim;
    return result;
  }

  Head draw_head(uint64_t seed) const {
    Head head;
    head.key_mean.assign(dim(), 0);
    head.key_scale.assign(dim(), 1);
    head.value_mean.assign(dim(), 0);
    head.value_scale.assign(dim(), 1);
    if (spec.kind == SynthKind::kGaussian) return head;
    Random channels(derive_seed(seed, 0));
    const size_t outliers = std::max<size_t>(1, dim() / 32);
    for (size_t made = 0; made < outliers;) {
      float& scale = head.key_scale[channels.below(dim())];
      if (scale != 1) continue;
      scale = kOutlierScale;
      ++made;
    }
    head.key_mean = normals(derive_seed(seed, 1), dim());
    for (size_t c = 0; c < dim(); ++c) head.key_mean[c] *= head.key_scale[c];
    head.value_mean = normals(derive_seed(seed, 2), dim());
    for (float& x : head.value_mean) x *= kValueMean;
    head.key_centres = normals(derive_seed(seed, 3), kClusters * dim());
    head.value_centres = normals(derive_seed(seed, 4), kClusters * dim());
    head.sink_direction = normals(derive_seed(seed, 5), dim());
    normalise(head.sink_direction);
    return head;
  }

  void select_layer(int l) {
    if (l == layer) return;
    heads.clear();
    for (int h = 0; h < spec.num_kv_heads; ++h) {
      heads.push_back(draw_head(derive_seed(layer_seed(l, kModel), static_cast<uint64_t>(h))));
    }
    layer = l;
    if (spec.tile_tokens == 0) return;
    const uint64_t seed = layer_seed(l, kNoiseOf);
    draw_tile(seed, false, key_tile);
    draw_tile(seed, true, value_tile);
  }

  // x of one token: noise, and the centre of the token's run.
  void draw_vector(uint64_t seed, size_t h, int64_t token, bool value, std::span<float> x) const {
    const uint64_t head_seed = derive_seed(seed, h);
    Random(derive_seed(head_seed, static_cast<uint64_t>(token) * 2 + value)).fill_normal(x);
    const std::vector<float>& centres = value ? heads[h].value_centres : heads[h].key_centres;
    if (centres.empty()) return;
    const uint64_t run = ~static_cast<uint64_t>(token / kRun);
    const float* centre = centres.data() + derive_seed(head_seed, run) % kClusters * dim();
    for (size_t c = 0; c < dim(); ++c) x[c] = kCentre * centre[c] + kNoise * x[c];
  }

  // mean + sign * scale * x, in the element type.
  void store_vector(size_t h, bool value, float sign, std::span<const float> x,
                    std::byte* out) const {
    const std::vector<float>& mean = value ? heads[h].value_mean : heads[h].key_mean;
    const std::vector<float>& scale = value ? heads[h].value_scale : heads[h].key_scale;
    std::array<float, 256> row;
    for (size_t c = 0; c < dim(); ++c) row[c] = mean[c] + sign * scale[c] * x[c];
    store_row({row.data(), dim()}, spec.dtype, out);
  }

  void draw_rows(uint64_t seed, bool value, int64_t count, std::byte* plain,
                 std::byte* flipped) const {
    std::vector<float> x(dim());
    for (int64_t token = 0; token < count; ++token) {
      if (token % 1024 == 0) check_interrupt();
      for (size_t h = 0; h < heads.size(); ++h) {
        draw_vector(seed, h, token, value, x);
        const size_t offset = static_cast<size_t>(token) * row_bytes() + h * vector_bytes();
        store_vector(h, value, 1, x, plain + offset);
        if (flipped != nullptr) store_vector(h, value, -1, x, flipped + offset);
      }
    }
  }

  void draw_tile(uint64_t seed, bool value, Tile& tile) const {
    const size_t words = static_cast<size_t>(tile_tokens()) * row_bytes() / 8;
    tile.plain.resize(words);
    tile.change.resize(words);
    draw_rows(seed, value, tile_tokens(), reinterpret_cast<std::byte*>(tile.plain.data()),
              reinterpret_cast<std::byte*>(tile.change.data()));
    for (size_t i = 0; i < words; ++i) tile.change[i] ^= tile.plain[i];
  }

  void repeat_tile(uint64_t seed, const Tile& tile, std::vector<std::byte>& out) const {
    const size_t row_words = row_bytes() / 8;
    std::vector<std::byte> mask_bytes(row_bytes());
    std::vector<uint64_t> mask(row_words);
    for (int64_t first = 0; first < num_tokens(); first += tile_tokens()) {
      check_interrupt();
      Random signs(derive_seed(seed, static_cast<uint64_t>(first)));
      const size_t element = static_cast<size_t>(sikv_dtype_bytes(spec.dtype));
      for (size_t i = 0; i < mask_bytes.size(); i += element) {
        std::memset(mask_bytes.data() + i, signs.next() >> 63 ? 0xff : 0, element);
      }
      std::memcpy(mask.data(), mask_bytes.data(), mask_bytes.size());
      const int64_t rows = std::min(tile_tokens(), num_tokens() - first);
      for (int64_t r = 0; r < rows; ++r) {
        const uint64_t* plain = tile.plain.data() + static_cast<size_t>(r) * row_words;
        const uint64_t* change = tile.change.data() + static_cast<size_t>(r) * row_words;
        std::byte* row = out.data() + static_cast<size_t>(first + r) * row_bytes();
        for (size_t i = 0; i < row_words; ++i) {
          const uint64_t word = plain[i] ^ (change[i] & mask[i]);
          std::memcpy(row + 8 * i, &word, 8);
        }
      }
    }
  }

  std::byte* vector_at(std::vector<std::byte>& rows, int64_t token, size_t h) const {
    return rows.data() + static_cast<size_t>(token) * row_bytes() + h * vector_bytes();
  }

  double log_tokens() const { return sikv_log(static_cast<double>(num_tokens())); }

  void plant_sinks(uint64_t seed, TraceLayer& out) const {
    for (size_t h = 0; h < heads.size(); ++h) {
      const std::vector<float>& w = heads[h].sink_direction;
      for (int64_t i = 0; i < std::min(kSinks, num_tokens()); ++i) {
        const uint64_t row_seed = derive_seed(derive_seed(seed, h), static_cast<uint64_t>(i));
        std::vector<float> x = normals(row_seed, dim());
        for (float& element : x) element *= kSinkNoise;
        subtract(x, dot(x, w) - (log_tokens() + 1 - static_cast<double>(i)), w);
        store_vector(h, false, 1, x, vector_at(out.k, i, h));
        std::vector<float> v = normals(derive_seed(row_seed, 0), dim());
        for (float& element : v) element *= kSinkValue;
        store_row(v, spec.dtype, vector_at(out.v, i, h));
      }
    }
  }

  std::vector<float> needle_direction(uint64_t seed, size_t h, int64_t step) const {
    std::vector<float> u =
        normals(derive_seed(derive_seed(seed, h), static_cast<uint64_t>(step)), dim());
    const std::vector<float>& w = heads[h].sink_direction;
    subtract(u, dot(u, w), w);
    normalise(u);
    return u;
  }

  void plant_needles(uint64_t seed, std::span<const int64_t> positions, TraceLayer& out) const {
    // Ordinary scores under a step's query have variance 1 + 1 + kNeedleComponent^2.
    const double margin =
        kNeedleMargin + kNeedleScatter / std::sqrt(static_cast<double>(num_tokens()));
    const double score = log_tokens() + (2 + kNeedleComponent * kNeedleComponent) / 2 + margin;
    for (size_t h = 0; h < heads.size(); ++h) {
      for (size_t step = 0; step < positions.size(); ++step) {
        std::vector<float> x = needle_direction(seed, h, static_cast<int64_t>(step));
        for (float& element : x) element *= static_cast<float>(score / kNeedleComponent);
        store_vector(h, false, 1, x, vector_at(out.k, positions[step], h));
        Random signs(derive_seed(derive_seed(~seed, h), step));
        std::vector<float> v(dim());
        for (float& element : v) element = signs.next() >> 63 ? kNeedleValue : -kNeedleValue;
        store_row(v, spec.dtype, vector_at(out.v, positions[step], h));
      }
    }
  }

  void draw_queries(uint64_t seed, uint64_t needle_seed, TraceLayer& out) const {
    const size_t group = static_cast<size_t>(spec.num_query_heads / spec.num_kv_heads);
    const double root = std::sqrt(static_cast<double>(spec.head_dim));
    for (size_t h = 0; h < heads.size(); ++h) {
      Random common(derive_seed(seed, h));
      std::vector<Random> own;
      for (size_t g = 0; g < group; ++g) own.emplace_back(derive_seed(derive_seed(seed, h), g + 1));
      std::vector<std::vector<float>> state(group);
      std::vector<float> shared(dim()), noise(dim());
      const std::vector<float>& w = heads[h].sink_direction;
      for (int64_t row = 0; row < out.num_queries; ++row) {
        common.fill_normal(shared);
        std::vector<float> u;
        const int64_t step = out.first_query_position + row - spec.context;
        if (spec.kind == SynthKind::kNeedle && step >= 0)
          u = needle_direction(needle_seed, h, step);
        for (size_t g = 0; g < group; ++g) {
          own[g].fill_normal(noise);
          const size_t index = static_cast<size_t>(row) * heads.size() * group + h * group + g;
          std::byte* const to = out.q.data() + index * vector_bytes();
          if (spec.kind == SynthKind::kGaussian) {
            store_row(noise, spec.dtype, to);
            continue;
          }
          for (size_t c = 0; c < dim(); ++c) noise[c] = kShared * shared[c] + kOwn * noise[c];
          std::vector<float>& a = state[g];
          if (a.empty()) {
            a = noise;
          } else {
            for (size_t c = 0; c < dim(); ++c) a[c] = kKeep * a[c] + kInnovation * noise[c];
          }
          std::vector<float> y = a;
          subtract(y, dot(y, w) - root, w);
          if (!u.empty()) subtract(y, dot(y, u) - kNeedleComponent * root, u);
          for (size_t c = 0; c < dim(); ++c) y[c] /= heads[h].key_scale[c];
          store_row(y, spec.dtype, to);
        }
      }
    }
  }

  std::vector<int64_t> needle_positions(int sequence) const {
    std::vector<int64_t> positions;
    if (spec.kind != SynthKind::kNeedle) return positions;
    const int64_t end = spec.context - std::min(kNewest, spec.context / 4);
    Random random(sequence_seed(0, sequence, kPositions));
    std::set<int64_t> taken;
    while (static_cast<int64_t>(positions.size()) < spec.steps) {
      const int64_t position =
          kSinks + static_cast<int64_t>(random.below(static_cast<uint64_t>(end - kSinks)));
      if (taken.insert(position).second) positions.push_back(position);
    }
    return positions;
  }

  void fill(int sequence, int l, TraceLayer& out) {
    if (sequence < 0 || sequence >= spec.batch) {
      throw Error("synthetic: there is no sequence {}; the batch is {}", sequence, spec.batch);
    }
    if (l < 0 || l >= spec.num_layers) {
      throw Error("synthetic: there is no layer {}; there are {}", l, spec.num_layers);
    }
    select_layer(l);
    out.layer = l;
    out.dtype = spec.dtype;
    out.num_tokens = num_tokens();
    out.num_queries = spec.num_queries;
    out.first_query_position = num_tokens() - spec.num_queries;
    out.w_o.clear();
    resize(out.k, num_tokens() * static_cast<int64_t>(row_bytes()));
    resize(out.v, num_tokens() * static_cast<int64_t>(row_bytes()));
    resize(out.q, spec.num_queries * spec.num_query_heads * static_cast<int64_t>(vector_bytes()));
    if (spec.tile_tokens > 0) {
      const uint64_t seed = sequence_seed(l, sequence, kTiles);
      repeat_tile(derive_seed(seed, 0), key_tile, out.k);
      repeat_tile(derive_seed(seed, 1), value_tile, out.v);
    } else {
      const uint64_t seed = sequence_seed(l, sequence, kNoiseOf);
      draw_rows(seed, false, num_tokens(), out.k.data(), nullptr);
      draw_rows(seed, true, num_tokens(), out.v.data(), nullptr);
    }
    const uint64_t needle_seed = sequence_seed(l, sequence, kNeedles);
    if (spec.kind != SynthKind::kGaussian) plant_sinks(~needle_seed, out);
    if (spec.kind == SynthKind::kNeedle) {
      plant_needles(needle_seed, needle_positions(sequence), out);
    }
    draw_queries(sequence_seed(l, sequence, kQueries), needle_seed, out);
  }
};

Synthesizer::Synthesizer(const SynthSpec& spec) : impl_(std::make_unique<Impl>(spec)) {}
Synthesizer::~Synthesizer() = default;
Synthesizer::Synthesizer(Synthesizer&&) noexcept = default;
Synthesizer& Synthesizer::operator=(Synthesizer&&) noexcept = default;

const SynthSpec& Synthesizer::spec() const { return impl_->spec; }
TraceMeta Synthesizer::meta() const { return impl_->meta(); }

void Synthesizer::fill(int sequence, int layer, TraceLayer& out) {
  impl_->fill(sequence, layer, out);
}

std::vector<int64_t> Synthesizer::needle_positions(int sequence) const {
  return impl_->needle_positions(sequence);
}

std::vector<int32_t> Synthesizer::tokens(int sequence) const {
  Random random(impl_->sequence_seed(0, sequence, kTokens));
  std::vector<int32_t> result(static_cast<size_t>(impl_->num_tokens()));
  for (int32_t& token : result) token = static_cast<int32_t>(random.below(kVocabulary));
  return result;
}

void write_trace(const std::filesystem::path& path, Synthesizer& synthesizer, int sequence) {
  TraceWriter writer(path, synthesizer.meta(), synthesizer.tokens(sequence));
  writer.write_needles(synthesizer.needle_positions(sequence));
  TraceLayer layer;
  for (int l = 0; l < synthesizer.spec().num_layers; ++l) {
    synthesizer.fill(sequence, l, layer);
    writer.write_layer(layer);
  }
  writer.finish();
}

}  // namespace sikv
