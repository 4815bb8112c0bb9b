// A model of the Llama family in one HDF5 file, as `datasets/capture/export_model.py` writes it.
//
//   /                     attributes: format = "sikv-model", version = 1, the fields of
//   ModelConfig,
//                         and tie_embeddings, bos_token, eos_token, add_bos, pre_tokenizer
//   /embedding            [vocab, hidden]
//   /output               [vocab, hidden]; absent when tie_embeddings
//   /norm                 [hidden]
//   /layers/<l>/          attention_norm, mlp_norm [hidden]; wq [Hq * D, hidden]; wk, wv
//                         [Hkv * D, hidden]; wo [hidden, Hq * D]; w_gate, w_up
//                         [intermediate, hidden]; w_down [hidden, intermediate]; where the model
//                         has them bq, bk, bv (one per row of the matrix) and q_norm, k_norm [D]
//   /tokenizer/           tokens [vocab], merges: strings; types [vocab]: TokenType. Absent, with
//                         pre_tokenizer = "", in a model that is fed with token ids
//
// Matrices are fp32, fp16, bf16 (uint16 with an attribute dtype = "bf16") or int8 with a sibling
// <name>_scale [rows] fp32; vectors are any float type. Rotation pairs channels i and i + D/2.
//
// Everything wrong with a file is an Error of one sentence that starts with the file's name. HDF5
// is not thread safe as Debian builds it: read from one thread at a time.
#ifndef SIKV_FRAMEWORK_MODEL_MODEL_FILE_H_
#define SIKV_FRAMEWORK_MODEL_MODEL_FILE_H_

#include <array>
#include <cstdint>
#include <filesystem>
#include <optional>
#include <string>
#include <vector>

#include "framework/model/weight_matrix.h"

namespace sikv {

inline constexpr int kLargestHeadDim = 256;

struct ModelConfig {
  std::string architecture;  // llama | qwen2 | qwen3 | mistral
  std::string name, source, license;
  int num_layers = 0, num_query_heads = 0, num_kv_heads = 0, head_dim = 0;
  int64_t hidden_size = 0, intermediate_size = 0, vocab_size = 0, max_positions = 0;
  double rope_theta = 10000;
  std::string rope_scaling;  // JSON as in Hugging Face's config.json, or ""
  double rms_norm_eps = 1e-5;
};

struct ModelLayer {
  std::vector<float> attention_norm, mlp_norm;  // [hidden]
  WeightMatrix wq, wk, wv, wo, w_gate, w_up, w_down;
  std::vector<float> bq, bk, bv;      // empty where the model has none
  std::vector<float> q_norm, k_norm;  // [D], or empty
};

// The matrices of a layer, in the order of their use.
template <typename Layer>
auto matrices(Layer& layer) {
  return std::array{&layer.wq,     &layer.wk,   &layer.wv,    &layer.wo,
                    &layer.w_gate, &layer.w_up, &layer.w_down};
}

enum class TokenType : int8_t { kNormal = 1, kUnknown, kControl, kUserDefined, kUnused, kByte };

struct Vocabulary {
  std::string pre_tokenizer;        // "" without a vocabulary, smollm | gpt-2 | llama-bpe | qwen2
  std::vector<std::string> tokens;  // [vocab] in the alphabet of byte-level BPE
  std::vector<std::string> merges;  // "left right", best first
  std::vector<TokenType> types;     // [vocab]
  int32_t bos_token = -1;           // -1: none
  int32_t eos_token = -1;
  bool add_bos = false;
};

struct ModelFile {
  // Set where matrices have a shape and no data: a device draws them from it.
  std::optional<uint64_t> random_seed;
  ModelConfig config;
  WeightMatrix embedding;
  WeightMatrix output;  // without rows: the embedding serves
  std::vector<float> norm;
  std::vector<ModelLayer> layers;
  Vocabulary vocabulary;

  const WeightMatrix& unembedding() const { return output.rows == 0 ? embedding : output; }
};

// The whole file, checked: all shapes agree with the config, no weight is NaN or infinite.
ModelFile read_model(const std::filesystem::path& path);

}  // namespace sikv

#endif  // SIKV_FRAMEWORK_MODEL_MODEL_FILE_H_
