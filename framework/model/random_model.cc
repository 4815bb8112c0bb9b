#include "framework/model/random_model.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <string_view>
#include <vector>

#include "framework/base/error.h"
#include "framework/base/interrupt.h"
#include "framework/base/random.h"
#include "framework/base/text.h"
#include "plugins/abi/sikv_abi.h"

namespace sikv {
namespace {

// What a ModelSpec does not say, from the models' published configurations.
struct Preset {
  std::string_view name;
  const char* architecture;
  int64_t hidden, intermediate, vocab;
  bool tied, qkv_bias, qk_norm;
};

constexpr Preset kPresets[] = {
    {"smollm2-135m", "llama", 576, 1536, 49152, true, false, false},
    {"llama-3.1-8b", "llama", 4096, 14336, 128256, false, false, false},
    {"qwen2.5-14b", "qwen2", 5120, 13824, 152064, false, true, false},
    {"qwen3-8b", "qwen3", 4096, 12288, 151936, false, false, true},
};

Preset preset_of(const ModelSpec& shape) {
  for (const Preset& preset : kPresets) {
    if (preset.name == shape.preset) return preset;
  }
  const int64_t hidden = int64_t{shape.query_heads} * shape.head_dim;
  return {"random", "llama", hidden, hidden * 7 / 2, 32000, false, false, false};
}

// Normals that the weights repeat: drawing billions would take minutes. The length is odd, so that
// rows of a matrix differ.
constexpr int64_t kTile = (1 << 16) + 1;

class Weights {
 public:
  // Matrices get no data where `shapes_only`.
  Weights(WeightType type, uint64_t seed, bool shapes_only)
      : type_(type), shapes_only_(shapes_only), normal_(kTile) {
    Random(seed).fill_normal(normal_);
  }

  // Products keep the scale of their input.
  WeightMatrix matrix(int64_t rows, int64_t columns) {
    check_interrupt();
    WeightMatrix matrix{type_, rows, columns, {}, {}};
    if (shapes_only_) return matrix;
    matrix.data.resize(static_cast<size_t>(rows * columns * weight_bytes(type_)));
    const float scale = 1 / std::sqrt(static_cast<float>(columns));
    if (type_ == WeightType::kInt8) {
      matrix.scale.assign(static_cast<size_t>(rows), scale / kInt8PerSigma);
    }
    // One tile as stored, then copies of it.
    const auto tile = stored(type_ == WeightType::kInt8 ? 1.0f : scale);
    for (size_t done = 0; done < matrix.data.size(); done += tile.size()) {
      std::memcpy(matrix.data.data() + done, tile.data(),
                  std::min(tile.size(), matrix.data.size() - done));
    }
    return matrix;
  }

  std::vector<float> vector(int64_t size) const {
    std::vector<float> values(static_cast<size_t>(size));
    for (size_t i = 0; i < values.size(); ++i) values[i] = 0.02f * normal_[i % normal_.size()];
    return values;
  }

 private:
  static constexpr float kInt8PerSigma = 32;

  std::vector<std::byte> stored(float scale) const {
    std::vector<std::byte> tile(normal_.size() * static_cast<size_t>(weight_bytes(type_)));
    for (int64_t i = 0; i < kTile; ++i) {
      const float weight = scale * normal_[static_cast<size_t>(i)];
      switch (type_) {
        case WeightType::kFp32:
          sikv_store(tile.data(), SIKV_FP32, i, weight);
          break;
        case WeightType::kFp16:
          sikv_store(tile.data(), SIKV_FP16, i, weight);
          break;
        case WeightType::kBf16:
          sikv_store(tile.data(), SIKV_BF16, i, weight);
          break;
        case WeightType::kInt8:
          tile[static_cast<size_t>(i)] = static_cast<std::byte>(
              static_cast<int8_t>(std::clamp(std::round(kInt8PerSigma * weight), -127.0f, 127.0f)));
          break;
      }
    }
    return tile;
  }

  WeightType type_;
  bool shapes_only_;
  std::vector<float> normal_;
};

// Of matrices; vectors are nothing beside them.
double bytes_of(const ModelConfig& config, bool tied, WeightType type) {
  const double hidden = static_cast<double>(config.hidden_size), D = config.head_dim;
  const double attention =
      hidden * D * 2 * (double(config.num_query_heads) + double(config.num_kv_heads));
  const double mlp = 3 * hidden * static_cast<double>(config.intermediate_size);
  const double embeddings = (tied ? 1 : 2) * hidden * static_cast<double>(config.vocab_size);
  return weight_bytes(type) * (config.num_layers * (attention + mlp) + embeddings);
}

}  // namespace

ModelFile random_model(const ModelSpec& shape, WeightType type, uint64_t seed,
                       const Device& device) {
  const Preset preset = preset_of(shape);
  ModelFile model;
  ModelConfig& config = model.config;
  config.architecture = preset.architecture;
  config.name = std::string(preset.name) + ", random weights";
  config.source = "random";
  config.num_layers = shape.layers;
  config.num_query_heads = shape.query_heads;
  config.num_kv_heads = shape.kv_heads;
  config.head_dim = shape.head_dim;
  config.hidden_size = preset.hidden;
  config.intermediate_size = preset.intermediate;
  config.vocab_size = preset.vocab;
  config.max_positions = int64_t{1} << 31;
  config.rope_theta = shape.rope_theta;
  if (device.is_cuda() && type == WeightType::kInt8) type = WeightType::kFp16;
  const double bytes = bytes_of(config, preset.tied, type);
  if (const uint64_t free = device.free_bytes(); bytes > static_cast<double>(free)) {
    throw Error(
        "{} takes {}, but {} are free: take smaller weights (int8), or fewer layers with "
        "--set model.layers=N",
        config.name, bytes_text(static_cast<uint64_t>(bytes)), bytes_text(free));
  }
  if (device.is_cuda()) model.random_seed = seed;
  Weights weights(type, seed, device.is_cuda());
  const int64_t q_rows = int64_t{shape.query_heads} * shape.head_dim;
  const int64_t kv_rows = int64_t{shape.kv_heads} * shape.head_dim;
  const std::vector<float> ones(static_cast<size_t>(config.hidden_size), 1.0f);
  model.embedding = weights.matrix(config.vocab_size, config.hidden_size);
  if (!preset.tied) model.output = weights.matrix(config.vocab_size, config.hidden_size);
  model.norm = ones;
  for (int l = 0; l < config.num_layers; ++l) {
    ModelLayer& layer = model.layers.emplace_back();
    layer.attention_norm = layer.mlp_norm = ones;
    layer.wq = weights.matrix(q_rows, config.hidden_size);
    layer.wk = weights.matrix(kv_rows, config.hidden_size);
    layer.wv = weights.matrix(kv_rows, config.hidden_size);
    layer.wo = weights.matrix(config.hidden_size, q_rows);
    layer.w_gate = weights.matrix(config.intermediate_size, config.hidden_size);
    layer.w_up = weights.matrix(config.intermediate_size, config.hidden_size);
    layer.w_down = weights.matrix(config.hidden_size, config.intermediate_size);
    if (preset.qkv_bias) {
      layer.bq = weights.vector(q_rows);
      layer.bk = weights.vector(kv_rows);
      layer.bv = weights.vector(kv_rows);
    }
    if (preset.qk_norm) layer.q_norm = layer.k_norm = {ones.begin(), ones.begin() + shape.head_dim};
  }
  return model;
}

}  // namespace sikv
