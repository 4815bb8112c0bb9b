// KV traces: keys, values and queries of a model on a text, in one HDF5 file.
//
//   /                        attributes: the fields of TraceMeta, same names
//   /tokens     [T]          int32, the token ids
//   /needles    [steps]      int64, optional: position of the key planted for each of the last
//   `steps`
//                            positions (synthetic traces)
//   /layers/<l>              a trace may hold some layers only; attribute first_query_position
//   /layers/<l>/k, v         [T, Hkv, D]
//   /layers/<l>/q            [Nq, Hq, D], the queries of the last Nq positions
//   /layers/<l>/w_o          [Hq * D, hidden], optional: the output projection
//
// Elements of k, v, q are fp16 or fp32 floats, or uint16 with an attribute dtype = "bf16"; one type
// within a layer. w_o is any float type and is read as fp32. Keys are as attention sees them.
//
// Everything wrong with a file is an Error of one sentence that starts with the file's name. HDF5
// is not thread safe as Debian builds it: use readers and writers from one thread at a time.
#ifndef SIKV_FRAMEWORK_TRACE_TRACE_H_
#define SIKV_FRAMEWORK_TRACE_TRACE_H_

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "plugins/abi/sikv_dtype.h"

namespace sikv {

struct TraceMeta {
  std::string model;
  std::string text;     // what was read, and from where
  std::string license;  // of model and text
  std::string tokenizer;
  std::string rope_layout = "half";  // "half" or "interleaved"
  int num_layers = 0;                // of the model; the trace may hold fewer
  int num_query_heads = 0;
  int num_kv_heads = 0;
  int head_dim = 0;
  double rope_theta = 10000;
  bool rope_applied = true;
};

struct TraceLayer {
  int layer = 0;
  int32_t dtype = SIKV_FP16;  // of k, v, q
  int64_t num_tokens = 0;
  int64_t num_queries = 0;
  int64_t first_query_position = 0;
  std::vector<std::byte> k;  // [num_tokens, Hkv, D]
  std::vector<std::byte> v;  // [num_tokens, Hkv, D]
  std::vector<std::byte> q;  // [num_queries, Hq, D]
  std::vector<float> w_o;    // [Hq * D, hidden]; empty when the trace has none
};

class TraceReader {
 public:
  // Reads the attributes and the list of layers; each layer is judged when it is read.
  explicit TraceReader(const std::filesystem::path& path);
  ~TraceReader();
  TraceReader(TraceReader&&) noexcept;
  TraceReader& operator=(TraceReader&&) noexcept;

  const TraceMeta& meta() const;
  const std::vector<int>& layers() const;  // ascending
  int64_t num_tokens() const;

  std::vector<int32_t> tokens() const;
  std::vector<int64_t> needles() const;  // empty when the trace has none

  // The layer's type and sizes, without its tensors.
  TraceLayer layer_info(int layer) const;
  bool has_w_o(int layer) const;
  // All of it, free of NaN and infinity.
  TraceLayer read_layer(int layer) const;

 private:
  friend std::vector<std::string> check(const TraceReader& reader);
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

// Reads the whole file and returns what is wrong with it, one sentence each: every tensor that
// read_layer would refuse, and what is merely suspicious (a key row of zeros, a negative token id).
std::vector<std::string> check(const TraceReader& reader);

class TraceWriter {
 public:
  // The file appears under `path` when finish() returns; without it nothing remains.
  TraceWriter(const std::filesystem::path& path, const TraceMeta& meta,
              std::span<const int32_t> tokens);
  ~TraceWriter();
  TraceWriter(const TraceWriter&) = delete;
  TraceWriter& operator=(const TraceWriter&) = delete;

  // Refuses what TraceReader would refuse.
  void write_layer(const TraceLayer& layer);
  void write_needles(std::span<const int64_t> needles);
  void finish();

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace sikv

#endif  // SIKV_FRAMEWORK_TRACE_TRACE_H_
