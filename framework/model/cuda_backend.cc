// A transformer on a GPU. Products are cuBLAS's; everything between them is model_kernels. Weights
// and the activations that are multiplied with them have one type for the whole model. The residual
// stays fp32: the products of wo and w_down are added to it where it lies.
#include <cublas_v2.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <utility>

#include "framework/base/error.h"
#include "framework/base/interrupt.h"
#include "framework/base/random.h"
#include "framework/device/cuda_error.h"
#include "framework/device/parallel.h"
#include "framework/model/backend.h"
#include "framework/model/model_kernels.h"
#include "framework/model/rope.h"
#include "framework/pipeline/offer.h"

namespace sikv {
namespace {

using namespace model_kernels;

// Activations of a chunk of llama-3.1-8b take 0.3 GiB, and its products are as fast as at 8192.
constexpr int64_t kChunkTokens = 2048;
// What cuBLAS recommends for Hopper. Its own would be allocated while a graph is recorded.
constexpr size_t kCublasWorkspace = size_t{32} << 20;

void check_cublas(cublasStatus_t status, const char* what) {
  if (status == CUBLAS_STATUS_SUCCESS) return;
  throw InternalError(fmt::format("{} failed: {}", what, cublasGetStatusString(status)));
}

cudaDataType_t cuda_type(Float type) {
  return type == Float::kFp32 ? CUDA_R_32F : type == Float::kFp16 ? CUDA_R_16F : CUDA_R_16BF;
}

// int8 is a way to store weights: products take fp16.
Float computed_in(WeightType type) {
  switch (type) {
    case WeightType::kFp32:
      return Float::kFp32;
    case WeightType::kBf16:
      return Float::kBf16;
    default:
      return Float::kFp16;
  }
}

bool stored_as(WeightType stored, Float type) {
  return stored != WeightType::kInt8 && computed_in(stored) == type;
}

int32_t dtype_of(Float type) {
  return type == Float::kFp32 ? SIKV_FP32 : type == Float::kFp16 ? SIKV_FP16 : SIKV_BF16;
}

Float cache_type(int32_t dtype) { return dtype == SIKV_FP32 ? Float::kFp32 : Float::kFp16; }

// Parts of one block of device memory: the same parts lie at the same offsets, so that a recorded
// step that finds its caches' addresses unchanged finds all others unchanged, too.
class Parts {
 public:
  explicit Parts(std::byte* base = nullptr) : base_(base) {}

  template <typename T = std::byte>
  T* take(int64_t count) {
    constexpr size_t kAlignment = 256;
    std::byte* const part = base_ + bytes_;
    bytes_ += (static_cast<size_t>(count) * sizeof(T) + kAlignment - 1) / kAlignment * kAlignment;
    return reinterpret_cast<T*>(part);
  }
  size_t bytes() const { return bytes_; }

 private:
  std::byte* base_;
  size_t bytes_ = 0;
};

// [rows, columns] in the model's type.
struct Matrix {
  const void* data = nullptr;
  int64_t rows = 0, columns = 0;
};

struct Layer {
  DeviceBuffer memory;
  Matrix qkv, wo, gate_up, w_down;
  const float *attention_norm = nullptr, *mlp_norm = nullptr;
  const float *bias = nullptr, *q_norm = nullptr, *k_norm = nullptr;  // where the model has them
};

// Of the tokens that go through a layer together.
struct Activations {
  void* normed;     // [n, hidden]
  float* qkv;       // [n, Hq + 2 Hkv, D]
  void* attention;  // [n, Hq, D]
  void* gate_up;    // [n, 2, intermediate]
  void* gated;      // [n, intermediate]
};

struct Prefill {
  DeviceBuffer memory;
  int64_t tokens = 0, kept = 0;
  int32_t dtype = SIKV_FP16;
  int32_t* ids = nullptr;                // [tokens]
  float* x = nullptr;                    // [tokens, hidden]
  std::byte *k = nullptr, *v = nullptr;  // [tokens, Hkv, D]
  std::byte* q = nullptr;                // [chunk, Hq, D]
  std::byte* last_q = nullptr;           // [kept, Hq, D]
  Activations activations{};
};

struct Decoding {
  DeviceBuffer memory;
  int64_t n = 0;
  int32_t dtype = SIKV_FP16;
  int32_t *ids = nullptr, *next = nullptr;  // [n]
  int64_t* positions = nullptr;             // [n]
  float *x = nullptr, *logits = nullptr;    // [n, hidden], [n, vocab]
  std::byte *q = nullptr, *k = nullptr, *v = nullptr;
  float *out = nullptr, *lse = nullptr;  // of a pipeline
  Activations activations{};
  std::unique_ptr<Device::Recording> without_cache;
};

class CudaBackend final : public ModelBackend {
 public:
  CudaBackend(ModelFile& model, Device& device);
  ~CudaBackend() override { cublasDestroy(cublas_); }

  uint64_t step_bytes() const override { return step_bytes_; }
  int64_t chunk_tokens() const override { return kChunkTokens; }
  uint64_t prefill_bytes(int64_t tokens, int32_t dtype) const override {
    Prefill prefill;
    return laid_out(prefill, nullptr, tokens, kPromptQueries, dtype);
  }
  void begin_prefill(std::span<const int32_t> tokens, int32_t dtype, int queries) override;
  void prefill_chunk(int layer, int64_t first, int64_t count) override;
  PromptRows prefilled(int layer) override;
  std::vector<float> end_prefill() override;
  void step(Pipeline* pipeline, std::span<const int32_t> tokens, std::span<const int64_t> positions,
            Pipeline::StepMode mode, float* logits, int32_t* next) override;
  std::vector<float> output_projection(int) const override { return {}; }
  void logits(const float* hidden, int64_t n, float* logits) override;

 private:
  const ModelConfig& config() const { return model_.config; }
  int64_t q_width() const { return int64_t{config().num_query_heads} * config().head_dim; }
  int64_t kv_width() const { return int64_t{config().num_kv_heads} * config().head_dim; }
  cudaStream_t stream() const { return static_cast<cudaStream_t>(device_.stream()); }
  float eps() const { return static_cast<float>(config().rms_norm_eps); }

  // Weights.
  void take_layer(ModelLayer& from, Layer& to);
  Matrix take_matrix(WeightMatrix& matrix, void* to);
  const float* take_vector(const std::vector<float>& values, float* to);
  int64_t matrix_bytes(int64_t rows, int64_t columns) const {
    return rows * columns * float_bytes(type_);
  }

  // Memory.
  Activations take_activations(Parts& parts, int64_t n) const;
  size_t laid_out(Prefill& prefill, std::byte* base, int64_t tokens, int64_t kept,
                  int32_t dtype) const;
  size_t laid_out(Decoding& decoding, std::byte* base, int64_t n, int32_t dtype) const;
  Decoding& decoding(int64_t n, int32_t dtype);

  // Work on the stream.
  // out [n, rows] = x [n, columns] . matrix^T, added to what `out` has where `add`.
  void multiply(const Matrix& matrix, const void* x, int64_t n, void* out, Float out_type,
                bool add = false);
  void norm(const float* x, const float* weight, int64_t n, int stage, Positions at, void* out);
  void project(int l, const float* x, int64_t n, Positions at, Float cache, void* q, void* k,
               void* v, const Activations& a);
  void finish_layer(int l, int64_t n, Positions at, float* x, const Activations& a);
  void output(const float* x, int64_t n, Positions at, const Activations& a, float* logits,
              int32_t* next);
  void before_cache(Decoding& d, int layer);
  void after_cache(Decoding& d, int layer);

  void clear_fault() {
    const Fault none = kNoFault;
    device_.copy_in(fault_.as<>(), &none, sizeof none);
  }
  // Waits. Error naming what first was not a finite number.
  void check_fault();

  ModelFile& model_;
  Device& device_;
  Float type_;
  cublasHandle_t cublas_ = nullptr;
  DeviceBuffer cublas_workspace_, fault_, frequencies_, embedding_memory_, output_memory_, norm_;
  Matrix embedding_, unembedding_;
  std::vector<Layer> layers_;
  double rope_magnitude_ = 1;
  uint64_t step_bytes_ = 0, drawn_ = 0;
  Prefill prefill_;
  Decoding decoding_;
};

// ---- weights ------------------------------------------------------------------------------------

CudaBackend::CudaBackend(ModelFile& model, Device& device)
    : model_(model),
      device_(device),
      type_(computed_in(model.layers.at(0).wq.type)),
      cublas_workspace_(device, kCublasWorkspace),
      fault_(device, sizeof(Fault)) {
  if (!attention_takes(config().head_dim, Float::kFp16)) {
    throw Error(
        "{} has a head_dim of {}, but on a GPU models run with 64, 96, 128 or 256: use "
        "device cpu",
        config().name, config().head_dim);
  }
  check_cublas(cublasCreate(&cublas_), "cublasCreate");
  check_cublas(cublasSetStream(cublas_, stream()), "cublasSetStream");
  check_cublas(cublasSetWorkspace(cublas_, cublas_workspace_.as<>(), kCublasWorkspace),
               "cublasSetWorkspace");
  const Rope rope(config().head_dim, config().rope_theta, config().rope_scaling);
  rope_magnitude_ = rope.magnitude();
  frequencies_ = DeviceBuffer(device, rope.frequencies().size() * sizeof(double));
  device.copy_in(frequencies_.as<>(), rope.frequencies().data(), frequencies_.bytes());
  embedding_memory_ = DeviceBuffer(
      device, static_cast<size_t>(matrix_bytes(model.embedding.rows, model.embedding.columns)));
  embedding_ = take_matrix(model.embedding, embedding_memory_.as<>());
  unembedding_ = embedding_;
  if (model.output.rows > 0) {
    output_memory_ = DeviceBuffer(
        device, static_cast<size_t>(matrix_bytes(model.output.rows, model.output.columns)));
    unembedding_ = take_matrix(model.output, output_memory_.as<>());
  }
  norm_ = DeviceBuffer(device, model.norm.size() * sizeof(float));
  take_vector(model.norm, norm_.as<float>());
  step_bytes_ = static_cast<uint64_t>(matrix_bytes(unembedding_.rows, unembedding_.columns));
  layers_.resize(model.layers.size());
  for (size_t l = 0; l < layers_.size(); ++l) {
    check_interrupt();
    take_layer(model.layers[l], layers_[l]);
  }
  clear_fault();
  device.synchronize();
}

void CudaBackend::take_layer(ModelLayer& from, Layer& to) {
  int64_t bytes = 0;
  for (const WeightMatrix* matrix : matrices(from)) {
    bytes += matrix_bytes(matrix->rows, matrix->columns);
  }
  step_bytes_ += static_cast<uint64_t>(bytes);
  const int64_t qkv_rows = from.wq.rows + from.wk.rows + from.wv.rows;
  const int64_t hidden = config().hidden_size, D = config().head_dim;
  const auto lay_out = [&](std::byte* base) {
    Parts parts(base);
    std::byte* const all = parts.take(bytes);
    float* const attention_norm = parts.take<float>(hidden);
    float* const mlp_norm = parts.take<float>(hidden);
    float* const bias = parts.take<float>(qkv_rows);
    float* const q_norm = parts.take<float>(D);
    float* const k_norm = parts.take<float>(D);
    if (base == nullptr) return parts.bytes();
    // wq, wk, wv are one matrix, and so are w_gate and w_up: one product instead of three and two.
    int64_t offset = 0;
    std::vector<Matrix> taken;
    for (WeightMatrix* matrix : matrices(from)) {
      taken.push_back(take_matrix(*matrix, all + offset));
      offset += matrix_bytes(matrix->rows, matrix->columns);
    }
    to.qkv = {taken[0].data, qkv_rows, hidden};
    to.wo = taken[3];
    to.gate_up = {taken[4].data, taken[4].rows + taken[5].rows, hidden};
    to.w_down = taken[6];
    to.attention_norm = take_vector(from.attention_norm, attention_norm);
    to.mlp_norm = take_vector(from.mlp_norm, mlp_norm);
    std::vector<float> joined;
    for (const auto* part : {&from.bq, &from.bk, &from.bv}) {
      joined.insert(joined.end(), part->begin(), part->end());
    }
    SIKV_ASSERT(joined.empty() || std::ssize(joined) == qkv_rows);
    to.bias = take_vector(joined, bias);
    to.q_norm = take_vector(from.q_norm, q_norm);
    to.k_norm = take_vector(from.k_norm, k_norm);
    return parts.bytes();
  };
  to.memory = DeviceBuffer(device_, lay_out(nullptr));
  lay_out(to.memory.as<std::byte>());
}

Matrix CudaBackend::take_matrix(WeightMatrix& matrix, void* to) {
  const int64_t count = matrix.rows * matrix.columns;
  const Matrix taken{to, matrix.rows, matrix.columns};
  if (model_.random_seed) {  // products keep the scale of their input
    draw_normals(to, type_, count, 1 / std::sqrt(static_cast<float>(matrix.columns)),
                 derive_seed(*model_.random_seed, drawn_++), stream());
    return taken;
  }
  if (stored_as(matrix.type, type_)) {
    device_.copy_in(to, matrix.data.data(), matrix.data.size());
  } else {
    std::vector<std::byte> converted(
        static_cast<size_t>(matrix_bytes(matrix.rows, matrix.columns)));
    parallel_for(device_, matrix.rows, [&](int64_t r, int) {
      std::vector<float> row(static_cast<size_t>(matrix.columns));
      load_weights(matrix, r, row.data());
      for (int64_t c = 0; c < matrix.columns; ++c) {
        sikv_store(converted.data(), dtype_of(type_), r * matrix.columns + c,
                   row[static_cast<size_t>(c)]);
      }
    });
    device_.copy_in(to, converted.data(), converted.size());
  }
  matrix.data = {};
  matrix.scale = {};
  return taken;
}

const float* CudaBackend::take_vector(const std::vector<float>& values, float* to) {
  if (values.empty()) return nullptr;
  device_.copy_in(to, values.data(), values.size() * sizeof(float));
  return to;
}

// ---- memory -------------------------------------------------------------------------------------

Activations CudaBackend::take_activations(Parts& parts, int64_t n) const {
  const int64_t element = float_bytes(type_), intermediate = config().intermediate_size;
  Activations a{};
  a.normed = parts.take(n * config().hidden_size * element);
  a.qkv = parts.take<float>(n * (q_width() + 2 * kv_width()));
  a.attention = parts.take(n * q_width() * element);
  a.gate_up = parts.take(n * 2 * intermediate * element);
  a.gated = parts.take(n * intermediate * element);
  return a;
}

size_t CudaBackend::laid_out(Prefill& p, std::byte* base, int64_t tokens, int64_t kept,
                             int32_t dtype) const {
  Parts parts(base);
  const int64_t element = sikv_dtype_bytes(dtype), chunk = std::min(kChunkTokens, tokens);
  p.ids = parts.take<int32_t>(tokens);
  p.x = parts.take<float>(tokens * config().hidden_size);
  p.k = parts.take(tokens * kv_width() * element);
  p.v = parts.take(tokens * kv_width() * element);
  p.q = parts.take(chunk * q_width() * element);
  p.last_q = parts.take(std::min(kept, tokens) * q_width() * element);
  p.activations = take_activations(parts, chunk);
  return parts.bytes();
}

size_t CudaBackend::laid_out(Decoding& d, std::byte* base, int64_t n, int32_t dtype) const {
  Parts parts(base);
  const int64_t element = sikv_dtype_bytes(dtype);
  d.ids = parts.take<int32_t>(n);
  d.next = parts.take<int32_t>(n);
  d.positions = parts.take<int64_t>(n);
  d.x = parts.take<float>(n * config().hidden_size);
  d.logits = parts.take<float>(n * config().vocab_size);
  d.q = parts.take(n * q_width() * element);
  d.k = parts.take(n * kv_width() * element);
  d.v = parts.take(n * kv_width() * element);
  d.out = parts.take<float>(n * q_width());
  d.lse = parts.take<float>(n * config().num_query_heads);
  d.activations = take_activations(parts, n);
  return parts.bytes();
}

Decoding& CudaBackend::decoding(int64_t n, int32_t dtype) {
  if (decoding_.n != n || decoding_.dtype != dtype) {
    decoding_ = {};
    Decoding plan;
    decoding_.memory = DeviceBuffer(device_, laid_out(plan, nullptr, n, dtype));
    laid_out(decoding_, decoding_.memory.as<std::byte>(), n, dtype);
    decoding_.n = n;
    decoding_.dtype = dtype;
    // What is launched for the first time may load code and set up cuBLAS: not while recording.
    before_cache(decoding_, 0);
    after_cache(decoding_, 0);
    output(decoding_.x, n, {decoding_.positions, 0}, decoding_.activations, decoding_.logits,
           decoding_.next);
    clear_fault();
    device_.synchronize();
  }
  return decoding_;
}

// ---- the layers ---------------------------------------------------------------------------------

void CudaBackend::multiply(const Matrix& matrix, const void* x, int64_t n, void* out,
                           Float out_type, bool add) {
  const float one = 1, beta = add ? 1 : 0;
  const auto size = [](int64_t value) { return static_cast<int>(value); };
  // cuBLAS counts columns first: its matrices are ours transposed.
  check_cublas(
      cublasGemmEx(cublas_, CUBLAS_OP_T, CUBLAS_OP_N, size(matrix.rows), size(n),
                   size(matrix.columns), &one, matrix.data, cuda_type(type_), size(matrix.columns),
                   x, cuda_type(type_), size(matrix.columns), &beta, out, cuda_type(out_type),
                   size(matrix.rows), CUBLAS_COMPUTE_32F, CUBLAS_GEMM_DEFAULT),
      "cublasGemmEx");
}

void CudaBackend::norm(const float* x, const float* weight, int64_t n, int stage, Positions at,
                       void* out) {
  rms_norm(x, weight, n, config().hidden_size, eps(), out, type_, stage, at, fault_.as<Fault>(),
           stream());
}

void CudaBackend::project(int l, const float* x, int64_t n, Positions at, Float cache, void* q,
                          void* k, void* v, const Activations& a) {
  const Layer& layer = layers_[static_cast<size_t>(l)];
  norm(x, layer.attention_norm, n, stage(std::max(l - 1, 0), kPartHidden), at, a.normed);
  multiply(layer.qkv, a.normed, n, a.qkv, Float::kFp32);
  const Rotation rotation{config().num_query_heads,
                          config().num_kv_heads,
                          config().head_dim,
                          layer.bias,
                          layer.q_norm,
                          layer.k_norm,
                          eps(),
                          frequencies_.as<double>(),
                          rope_magnitude_};
  split_and_rotate(a.qkv, n, rotation, at, l, cache, q, k, v, fault_.as<Fault>(), stream());
}

void CudaBackend::finish_layer(int l, int64_t n, Positions at, float* x, const Activations& a) {
  const Layer& layer = layers_[static_cast<size_t>(l)];
  multiply(layer.wo, a.attention, n, x, Float::kFp32, true);
  norm(x, layer.mlp_norm, n, stage(l, kPartHidden), at, a.normed);
  multiply(layer.gate_up, a.normed, n, a.gate_up, type_);
  silu_multiply(a.gate_up, n, config().intermediate_size, a.gated, type_, stream());
  multiply(layer.w_down, a.gated, n, x, Float::kFp32, true);
}

void CudaBackend::output(const float* x, int64_t n, Positions at, const Activations& a,
                         float* logits, int32_t* next) {
  norm(x, norm_.as<float>(), n, stage(config().num_layers - 1, kPartHidden), at, a.normed);
  multiply(unembedding_, a.normed, n, logits, Float::kFp32);
  most_likely(logits, n, config().vocab_size, next, stage(config().num_layers, kPartK), at,
              fault_.as<Fault>(), stream());
}

// ---- prefill ------------------------------------------------------------------------------------

void CudaBackend::begin_prefill(std::span<const int32_t> tokens, int32_t dtype, int queries) {
  const int64_t T = std::ssize(tokens), kept = std::min<int64_t>(queries, T);
  prefill_ = {};
  Prefill plan;
  prefill_.memory = DeviceBuffer(device_, laid_out(plan, nullptr, T, kept, dtype));
  laid_out(prefill_, prefill_.memory.as<std::byte>(), T, kept, dtype);
  prefill_.tokens = T;
  prefill_.kept = kept;
  prefill_.dtype = dtype;
  device_.copy_in(prefill_.ids, tokens.data(), tokens.size_bytes());
  embed(prefill_.ids, T, embedding_.data, type_, config().hidden_size, prefill_.x, stream());
}

void CudaBackend::prefill_chunk(int l, int64_t first, int64_t n) {
  const Prefill& p = prefill_;
  const Positions at{nullptr, first};
  const Float cache = cache_type(p.dtype);
  const int64_t element = sikv_dtype_bytes(p.dtype);
  float* const x = p.x + first * config().hidden_size;
  project(l, x, n, at, cache, p.q, p.k + first * kv_width() * element,
          p.v + first * kv_width() * element, p.activations);
  const int64_t from = std::max(first, p.tokens - p.kept);
  if (from < first + n) {
    const int64_t row = q_width() * element;
    device_.copy_in(p.last_q + (from - (p.tokens - p.kept)) * row, p.q + (from - first) * row,
                    static_cast<size_t>((first + n - from) * row));
  }
  dense_attention(p.q, p.k, p.v, cache, first, n, config().num_query_heads, config().num_kv_heads,
                  config().head_dim, p.activations.attention, type_, stream());
  finish_layer(l, n, at, x, p.activations);
  if (l == config().num_layers - 1) {  // what no other layer looks at
    norm(x, norm_.as<float>(), n, stage(l, kPartHidden), at, p.activations.normed);
  }
}

PromptRows CudaBackend::prefilled(int) {
  check_fault();
  return {prefill_.k, prefill_.v, prefill_.last_q, prefill_.tokens,
          static_cast<int>(prefill_.kept)};
}

std::vector<float> CudaBackend::end_prefill() {
  std::vector<float> hidden(static_cast<size_t>(config().hidden_size));
  device_.copy_out(hidden.data(), prefill_.x + (prefill_.tokens - 1) * config().hidden_size,
                   hidden.size() * sizeof(float));
  prefill_ = {};
  return hidden;
}

// ---- decode -------------------------------------------------------------------------------------

void CudaBackend::before_cache(Decoding& d, int layer) {
  const Positions at{d.positions, 0};
  if (layer == 0) {
    embed(d.ids, d.n, embedding_.data, type_, config().hidden_size, d.x, stream());
  }
  project(layer, d.x, d.n, at, cache_type(d.dtype), d.q, d.k, d.v, d.activations);
}

void CudaBackend::after_cache(Decoding& d, int layer) {
  const Positions at{d.positions, 0};
  narrow(d.out, d.n * q_width(), d.activations.attention, type_, stream());
  finish_layer(layer, d.n, at, d.x, d.activations);
  if (layer == config().num_layers - 1) output(d.x, d.n, at, d.activations, d.logits, d.next);
}

void CudaBackend::step(Pipeline* pipeline, std::span<const int32_t> tokens,
                       std::span<const int64_t> positions, Pipeline::StepMode mode, float* logits,
                       int32_t* next) {
  SIKV_ASSERT(pipeline == nullptr || &pipeline->device() == &device_);
  const int64_t n = std::ssize(tokens);
  Decoding& d =
      decoding(n, pipeline == nullptr ? decoding_.dtype : pipeline->cache().view(0).dtype);
  device_.copy_in(d.ids, tokens.data(), tokens.size_bytes());
  device_.copy_in(d.positions, positions.data(), positions.size_bytes());
  if (pipeline != nullptr) {
    const std::vector<Pipeline::LayerStep> layers(layers_.size(), {d.k, d.v, d.q, d.out, d.lse});
    try {
      pipeline->step(layers, mode,
                     {[&](int l) { before_cache(d, l); }, [&](int l) { after_cache(d, l); }});
      check_fault();
      pipeline->synchronize();
    } catch (const Error&) {
      check_fault();  // says better where a number that the cache refused came from
      throw;
    }
  } else {
    if (d.without_cache == nullptr) {
      d.without_cache = device_.record([&] {
        for (int l = 0; l < config().num_layers; ++l) {
          before_cache(d, l);
          after_cache(d, l);
        }
      });
    }
    d.without_cache->replay();
    check_fault();
  }
  if (logits != nullptr) {
    device_.copy_out(logits, d.logits,
                     static_cast<size_t>(n * config().vocab_size) * sizeof(float));
  }
  if (next != nullptr) device_.copy_out(next, d.next, tokens.size_bytes());
}

void CudaBackend::logits(const float* hidden, int64_t n, float* logits) {
  const int64_t width = config().hidden_size, vocab = config().vocab_size;
  float *x = nullptr, *out = nullptr;
  int32_t* next = nullptr;
  Activations a{};
  const auto lay_out = [&](std::byte* base) {
    Parts parts(base);
    x = parts.take<float>(n * width);
    out = parts.take<float>(n * vocab);
    next = parts.take<int32_t>(n);
    a.normed = parts.take(n * width * float_bytes(type_));
    return parts.bytes();
  };
  const DeviceBuffer memory(device_, lay_out(nullptr));
  lay_out(memory.as<std::byte>());
  device_.copy_in(x, hidden, static_cast<size_t>(n * width) * sizeof(float));
  output(x, n, {nullptr, 0}, a, out, next);
  check_fault();
  device_.copy_out(logits, out, static_cast<size_t>(n * vocab) * sizeof(float));
}

void CudaBackend::check_fault() {
  Fault fault = kNoFault;
  device_.copy_out(&fault, fault_.as<>(), sizeof fault);
  if (fault == kNoFault) return;
  clear_fault();
  const int where = static_cast<int>(fault >> kPositionBits), layer = where / kParts;
  const int64_t position = static_cast<int64_t>(fault & ((Fault{1} << kPositionBits) - 1));
  if (layer == config().num_layers) {
    throw Error(
        "the output layer of {} gives a NaN or infinity although every layer before it is "
        "finite: check norm and output, or export them as fp32",
        config().name);
  }
  if (where % kParts == kPartHidden) {
    throw Error(
        "layer {} of {} gives a NaN or infinity at position {}, the first to do so: check the "
        "weights, or export them as bf16 or fp32",
        layer, config().name, position);
  }
  throw Error(
      "{} of layer {} holds a NaN or infinity, or more than its cache's type can, at position {}, "
      "the first in the model: check the weights, or give caches fp32",
      "KVQ"[where % kParts], layer, position);
}

}  // namespace

std::unique_ptr<ModelBackend> make_cuda_backend(ModelFile& model, Device& device) {
  return std::make_unique<CudaBackend>(model, device);
}

}  // namespace sikv
