// Codecs on CUDA: bytes and tables against `ref`, then fit, encode, page encode and decode timed.
//
//   encode_cuda_bench PLUGIN_FOLDER [check] [time|quick] [CONTEXT]
//
// Check: awkward rows through both variants, everything compared byte by byte. Time: 8 sequences of
// CONTEXT (131072) tokens, 8 KV heads, D 128, fp16; medians of device events over 7 calls; the
// input is 43 times the L2, so every call begins cold. Prints GB/s of what must move (rows read
// once, codes written once; a fit reads nothing that counts) and its share of a device-to-device
// copy.
#include <cuda_fp16.h>
#include <dlfcn.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "kernels/common/cuda_launch.h"
#include "plugins/abi/sikv_codec.h"
#include "plugins/sdk/finite.h"

namespace {

using sikv::cuda::check;
using Choices = std::map<std::string, std::string>;

constexpr int kPage = SIKV_PAGE_TOKENS;

[[noreturn]] void fail(const std::string& text) {
  std::fprintf(stderr, "encode_cuda_bench: %s\n", text.c_str());
  std::exit(1);
}

void ok(int32_t status, const sikv_message& why, const char* what) {
  if (status != SIKV_OK) fail(std::string(what) + ": " + why.text);
}

// ---- codecs -------------------------------------------------------------------------------------

void serial_for(void*, int64_t n, void (*body)(void*, int64_t, int32_t), void* arg) {
  for (int64_t i = 0; i < n; ++i) body(arg, i, 0);
}

class BenchCodec {
 public:
  BenchCodec(const std::string& folder, sikv_kind kind, const std::string& id, bool cuda,
             const Choices& choices, const sikv_shape& shape) {
    const std::string path = folder + "/libsikv-codec-" + id + (cuda ? "-cuda.so" : "-cpu.so");
    void* library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
    if (library == nullptr) fail(dlerror());
    const auto tables =
        reinterpret_cast<sikv_plugin_tables_fn>(dlsym(library, "sikv_plugin_tables"))();
    for (uint32_t i = 0; i < tables->num_entries; ++i) {
      const sikv_plugin_entry& entry = tables->entries[i];
      if (entry.kind != static_cast<uint32_t>(kind)) continue;
      if (std::string(entry.variant) != (cuda ? "cuda" : "ref")) continue;
      table_ = static_cast<const sikv_codec_table*>(entry.table);
      create(entry, cuda, choices, shape);
    }
    if (table_ == nullptr) fail(path + " has no such codec");
    sikv_message why{};
    ok(table_->describe(self_, &layout, &why), why, "describe");
    ok(table_->workspace_bytes(self_, &workspace_bytes, &why), why, "workspace_bytes");
  }
  BenchCodec(const BenchCodec&) = delete;
  ~BenchCodec() { table_->destroy(self_); }

  void fit(const sikv_rows& rows, const sikv_cache_view& view, void* workspace) const {
    sikv_message why{};
    ok(table_->fit(self_, &rows, &view, workspace, nullptr, &why), why, "fit");
  }
  void encode(const sikv_rows& rows, const int32_t* first_slot, const sikv_cache_view& view,
              void* workspace) const {
    sikv_message why{};
    ok(table_->encode(self_, &rows, first_slot, &view, workspace, nullptr, &why), why, "encode");
  }
  void decode(const sikv_decode_args& args) const {
    sikv_message why{};
    ok(table_->decode(self_, &args, nullptr, &why), why, "decode");
  }

  sikv_layout layout{};
  uint64_t workspace_bytes = 0;

 private:
  void create(const sikv_plugin_entry& entry, bool cuda, const Choices& choices,
              const sikv_shape& shape) {
    std::vector<sikv_option_value> values;
    for (uint64_t i = 0; i < entry.num_options; ++i) {
      const sikv_option_spec& spec = entry.options[i];
      const auto chosen = choices.find(spec.name);
      const char* text = chosen != choices.end() ? chosen->second.c_str() : spec.default_value;
      values.push_back({spec.name, spec.type, 0, std::atoll(text), std::atof(text), text});
    }
    sikv_device device{};
    device.struct_size = sizeof device;
    device.type = cuda ? SIKV_CUDA : SIKV_CPU;
    device.num_threads = 1;
    static const sikv_host host{sizeof(sikv_host), 0, nullptr, serial_for, nullptr};
    const sikv_create_args args{sizeof args,   static_cast<uint32_t>(values.size()),
                                values.data(), &shape,
                                &device,       &host,
                                nullptr,       nullptr};
    sikv_message why{};
    ok(table_->create(&args, &self_, &why), why, "create");
  }

  const sikv_codec_table* table_ = nullptr;
  void* self_ = nullptr;
};

sikv_shape make_shape(int sequences, int heads, int head_dim, int32_t dtype, int tokens) {
  sikv_shape shape{};
  shape.struct_size = sizeof shape;
  shape.num_layers = 1;
  shape.num_query_heads = shape.num_kv_heads = heads;
  shape.head_dim = head_dim;
  shape.dtype = dtype;
  shape.max_sequences = sequences;
  shape.max_tokens = tokens;
  return shape;
}

int64_t page_bytes(const sikv_plane& plane) {
  return int64_t{kPage} / plane.tile_tokens * plane.bytes_per_tile;
}

// ---- memory -------------------------------------------------------------------------------------

// On the GPU, or on the host for the reference.
class Memory {
 public:
  Memory(bool cuda, size_t bytes) : cuda_(cuda), bytes_(bytes) {
    if (cuda) {
      check(cudaMalloc(&data_, std::max<size_t>(bytes, 16)), "cudaMalloc");
    } else {
      data_ = std::aligned_alloc(64, (bytes + 127) / 64 * 64);
    }
  }
  Memory(const Memory&) = delete;
  ~Memory() { cuda_ ? static_cast<void>(cudaFree(data_)) : std::free(data_); }
  void* get() const { return data_; }
  size_t size() const { return bytes_; }
  void fill(int byte) const {
    if (cuda_) {
      check(cudaMemset(data_, byte, bytes_), "cudaMemset");
    } else {
      std::memset(data_, byte, bytes_);
    }
  }
  void write(const void* from, size_t bytes) const {
    if (cuda_) {
      check(cudaMemcpy(data_, from, bytes, cudaMemcpyHostToDevice), "cudaMemcpy");
    } else {
      std::memcpy(data_, from, bytes);
    }
  }
  std::vector<uint8_t> read() const {
    std::vector<uint8_t> bytes(bytes_);
    if (cuda_) {
      check(cudaMemcpy(bytes.data(), data_, bytes_, cudaMemcpyDeviceToHost), "cudaMemcpy");
    } else {
      std::memcpy(bytes.data(), data_, bytes_);
    }
    return bytes;
  }

 private:
  bool cuda_;
  size_t bytes_;
  void* data_ = nullptr;
};

using Block = std::unique_ptr<Memory>;

template <typename T>
Block to_memory(bool cuda, const std::vector<T>& from) {
  Block memory = std::make_unique<Memory>(cuda, from.size() * sizeof(T));
  memory->write(from.data(), from.size() * sizeof(T));
  return memory;
}

// A cache of one side, pages in reverse order.
struct BenchCache {
  BenchCache(bool cuda, const sikv_layout& key_or_value, bool keys, int sequences, int heads,
             int head_dim, int32_t dtype, int tokens)
      : layout(key_or_value) {
    const int pages = (tokens + kPage - 1) / kPage, rows = sequences * heads;
    std::vector<int32_t> table(static_cast<size_t>(rows) * pages);
    for (size_t i = 0; i < table.size(); ++i) {
      table[i] = static_cast<int32_t>(table.size() - 1 - i);
    }
    page_table = to_memory(cuda, table);
    fault = std::make_unique<Memory>(cuda, sizeof(sikv_fault));
    fault->fill(0);
    view.struct_size = sizeof view;
    view.num_sequences = sequences;
    view.num_kv_heads = heads;
    view.head_dim = head_dim;
    view.dtype = dtype;
    view.max_pages = pages;
    view.max_encoded_len = tokens;
    view.page_table = static_cast<const int32_t*>(page_table->get());
    view.fault = static_cast<sikv_fault*>(fault->get());
    sikv_store_view& store = keys ? view.key : view.value;
    static const sikv_layout kNothing{};
    view.key.layout = view.value.layout = &kNothing;
    store.layout = &layout;
    for (uint32_t i = 0; i < layout.num_planes; ++i) {
      const int64_t bytes = page_bytes(layout.planes[i]);
      blocks.push_back(std::make_unique<Memory>(cuda, static_cast<size_t>(bytes) * table.size()));
      blocks.back()->fill(0xa5);
      store.planes[i] = blocks.back()->get();
      store.page_stride_bytes[i] = bytes;
    }
    for (uint32_t i = 0; i < layout.num_tables; ++i) {
      blocks.push_back(std::make_unique<Memory>(cuda, size_t{4} * layout.tables[i].count * rows));
      blocks.back()->fill(0xff);
      store.tables[i] = static_cast<float*>(blocks.back()->get());
    }
  }

  sikv_layout layout;
  sikv_cache_view view{};
  Block page_table, fault;
  std::vector<Block> blocks;  // planes, then tables
};

// ---- check --------------------------------------------------------------------------------------

constexpr const char* kPatterns[] = {"gaussian", "outliers", "offset",    "constant",
                                     "zeros",    "huge",     "subnormal", "steps"};

float pattern_number(int pattern, int t, int d, int32_t dtype, std::mt19937& random) {
  std::normal_distribution<float> normal;
  const float sign = random() % 2 != 0 ? 1.0f : -1.0f;
  switch (pattern) {
    case 0:
      return normal(random);
    case 1:
      return normal(random) * (d % 17 == 0 ? 20.0f : 1.0f);
    case 2:
      return normal(random) + static_cast<float>(d % 13 - 6);
    case 3:
      return 0.75f;
    case 4:
      return (t + d) % 2 == 0 ? 0.0f : -0.0f;
    case 5:
      return sign * (dtype == SIKV_FP16 ? 32752.0f : 0x1p57f);
    case 6:
      return sign * (dtype == SIKV_FP16 ? 0x1p-15f : 0x1p-127f);
    default:
      return static_cast<float>((7 * t + 5 * d) % 33 - 16) / 8.0f;
  }
}

struct Case {
  sikv_kind kind;
  const char* id;
  Choices choices;
};

std::string describe(const Case& c, int head_dim, int32_t dtype, int pattern) {
  std::string text = std::string(c.kind == SIKV_KEY_CODEC ? "keys " : "values ") + c.id;
  for (const auto& [name, value] : c.choices) text += " " + name + "=" + value;
  return text + " D " + std::to_string(head_dim) + " dtype " + std::to_string(dtype) + " " +
         kPatterns[pattern];
}

// Number of differing blocks; the first differences are printed.
int check_case(const std::string& folder, const Case& c, int head_dim, int32_t dtype, int pattern) {
  constexpr int kHeads = 2;
  const std::vector<int32_t> counts = {512, 0, 1280, 256};
  const int sequences = static_cast<int>(counts.size()), tokens = 1280;
  const sikv_shape shape = make_shape(sequences, kHeads, head_dim, dtype, tokens);
  std::vector<int32_t> first;
  int64_t total = 1;
  for (const int32_t n : counts) {
    first.push_back(static_cast<int32_t>(total));
    total += n;
  }
  const int64_t token_stride = kHeads * head_dim + 8;
  std::vector<uint8_t> data(static_cast<size_t>(total * token_stride * sikv_dtype_bytes(dtype)),
                            0xff);
  std::mt19937 random(static_cast<unsigned>(head_dim + 1000 * pattern));
  for (int64_t t = 1; t < total; ++t) {
    for (int d = 0; d < kHeads * head_dim; ++d) {
      sikv_store(data.data(), dtype, t * token_stride + d,
                 pattern_number(pattern, static_cast<int>(t), d, dtype, random));
    }
  }

  std::vector<std::vector<uint8_t>> results[2];
  std::vector<uint8_t> decoded[2];
  for (const bool cuda : {false, true}) {
    const BenchCodec codec(folder, c.kind, c.id, cuda, c.choices, shape);
    BenchCache cache(cuda, codec.layout, c.kind == SIKV_KEY_CODEC, sequences, kHeads, head_dim,
                     dtype, tokens);
    const Block d_data = to_memory(cuda, data), d_first = to_memory(cuda, first),
                d_count = to_memory(cuda, counts),
                slots = to_memory(cuda, std::vector<int32_t>(sequences * kHeads, 0));
    const Memory workspace(cuda, codec.workspace_bytes);
    workspace.fill(0xa5);
    const sikv_rows rows{d_data->get(),
                         dtype,
                         tokens,
                         static_cast<const int32_t*>(d_first->get()),
                         static_cast<const int32_t*>(d_count->get()),
                         token_stride,
                         head_dim};
    codec.fit(rows, cache.view, workspace.get());
    codec.encode(rows, static_cast<const int32_t*>(slots->get()), cache.view, workspace.get());
    for (const Block& block : cache.blocks) results[cuda].push_back(block->read());

    // Every third token of sequence 2, both heads.
    std::vector<int32_t> asked;
    for (int t = 0; t < 1280; t += 3) asked.push_back(t);
    const int capacity = static_cast<int>(asked.size());
    asked.insert(asked.end(), asked.rbegin(), asked.rend());
    const Block d_asked = to_memory(cuda, asked),
                d_counts = to_memory(cuda, std::vector<int32_t>(2, capacity));
    const Memory out(cuda, size_t{4} * asked.size() * head_dim);
    const sikv_decode_args args{&cache.view,
                                2 * kHeads,
                                kHeads,
                                capacity,
                                0,
                                static_cast<const int32_t*>(d_asked->get()),
                                static_cast<const int32_t*>(d_counts->get()),
                                static_cast<float*>(out.get())};
    codec.decode(args);
    decoded[cuda] = out.read();
  }
  int wrong = 0;
  for (size_t i = 0; i < results[0].size(); ++i) {
    const auto at =
        std::mismatch(results[0][i].begin(), results[0][i].end(), results[1][i].begin());
    if (at.first == results[0][i].end()) continue;
    size_t bytes = 0;
    for (size_t k = 0; k < results[0][i].size(); ++k) bytes += results[0][i][k] != results[1][i][k];
    std::printf("  DIFFERS %s: block %zu, %zu of %zu bytes, first %zd: %02x instead of %02x\n",
                describe(c, head_dim, dtype, pattern).c_str(), i, bytes, results[0][i].size(),
                at.first - results[0][i].begin(), *at.second, *at.first);
    ++wrong;
  }
  const auto* a = reinterpret_cast<const float*>(decoded[0].data());
  const auto* b = reinterpret_cast<const float*>(decoded[1].data());
  size_t off = 0;
  for (size_t k = 0; k < decoded[0].size() / 4; ++k) off += !(a[k] == b[k]);
  if (off != 0) {
    std::printf("  DIFFERS %s: decode, %zu of %zu numbers\n",
                describe(c, head_dim, dtype, pattern).c_str(), off, decoded[0].size() / 4);
    ++wrong;
  }
  return wrong;
}

int check_all(const std::string& folder) {
  std::vector<Case> cases = {{SIKV_KEY_CODEC, "fp16", {}}, {SIKV_VALUE_CODEC, "fp16", {}}};
  for (const char* bits : {"2", "3", "4"}) {
    cases.push_back({SIKV_KEY_CODEC, "rot_lm", {{"bits", bits}}});
    cases.push_back({SIKV_VALUE_CODEC, "rot_lm", {{"bits", bits}}});
  }
  cases.push_back({SIKV_KEY_CODEC, "rot_lm", {{"fit_tokens", "700"}}});
  cases.push_back({SIKV_VALUE_CODEC, "rot_lm", {{"fit_tokens", "700"}}});
  for (const char* bits : {"0", "2", "3", "4", "8", "16"}) {
    cases.push_back({SIKV_KEY_CODEC, "sign_vq", {{"magnitude_bits", bits}}});
  }
  for (const char* bits : {"2", "4", "8", "16"}) {
    cases.push_back({SIKV_VALUE_CODEC, "intq", {{"bits", bits}}});
  }
  for (const char* group : {"16", "64"}) {
    cases.push_back({SIKV_KEY_CODEC, "sign_vq", {{"scale_group", group}}});
    cases.push_back({SIKV_VALUE_CODEC, "intq", {{"scale_group", group}}});
  }
  for (const char* type : {"fp8_e4m3", "fp8_e5m2"}) {
    cases.push_back({SIKV_KEY_CODEC, "sign_vq", {{"scale_type", type}}});
    cases.push_back({SIKV_VALUE_CODEC, "intq", {{"scale_type", type}}});
  }
  for (const char* center : {"median", "none"}) {
    cases.push_back({SIKV_KEY_CODEC, "sign_vq", {{"center", center}}});
  }
  cases.push_back({SIKV_KEY_CODEC, "sign_vq", {{"fit_tokens", "700"}, {"center", "median"}}});
  for (const char* bits : {"2", "4"}) {
    cases.push_back({SIKV_KEY_CODEC, "kivi", {{"bits", bits}}});
    cases.push_back({SIKV_VALUE_CODEC, "kivi", {{"bits", bits}}});
  }
  cases.push_back({SIKV_KEY_CODEC, "kivi", {{"group", "128"}}});

  struct Job {
    const Case* c;
    int head_dim;
    int32_t dtype;
    int pattern;
  };
  std::vector<Job> jobs;
  for (const Case& c : cases) {
    for (const int head_dim : {64, 96, 128, 256}) {
      const auto group = c.choices.find("scale_group");
      if (group != c.choices.end() && head_dim % std::atoi(group->second.c_str()) != 0) continue;
      for (const int32_t dtype : {SIKV_FP16, SIKV_BF16, SIKV_FP32}) {
        for (int pattern = 0; pattern < 8; ++pattern) {
          // Every pattern at D = 128, some elsewhere.
          if (head_dim != 128 && pattern != 1 && (pattern + head_dim / 32 + dtype) % 4 != 0)
            continue;
          jobs.push_back({&c, head_dim, dtype, pattern});
        }
      }
    }
  }
  // The reference is what takes long.
  std::atomic<int> wrong = 0, next = 0;
  std::vector<std::thread> threads;
  for (unsigned i = 0; i < std::max(1u, std::thread::hardware_concurrency()); ++i) {
    threads.emplace_back([&] {
      for (size_t j = next++; j < jobs.size(); j = next++) {
        const Job& job = jobs[j];
        wrong += check_case(folder, *job.c, job.head_dim, job.dtype, job.pattern);
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  std::printf("check: %zu cases, %d blocks differ\n", jobs.size(), wrong.load());
  return wrong;
}

// ---- time ---------------------------------------------------------------------------------------

// Unit normals around channel means, with outlier channels.
__global__ void fill_rows(__half* data, int64_t n, int head_dim, uint32_t seed) {
  for (int64_t i = (blockIdx.x * int64_t{blockDim.x} + threadIdx.x) * 2; i < n;
       i += int64_t{gridDim.x} * blockDim.x * 2) {
    uint64_t z =
        (static_cast<uint64_t>(seed) << 40) + static_cast<uint64_t>(i) * 0x9e3779b97f4a7c15u;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    z ^= z >> 31;
    const float u = (static_cast<float>(z >> 40) + 1.0f) / 16777217.0f;
    const float v = static_cast<float>(z & 0xffffff) / 16777216.0f;
    float s, c;
    sincospif(2 * v, &s, &c);
    const float r = sqrtf(-2.0f * logf(u));
    const int d = static_cast<int>(i % head_dim);
    const float mean = static_cast<float>(d % 11 - 5) * 0.3f;
    data[i] = __float2half(r * c * (d % 17 == 0 ? 5.0f : 1.0f) + mean);
    data[i + 1] = __float2half(r * s + mean);
  }
}

double median_us(int repeats, const std::function<void()>& call) {
  cudaEvent_t begin, end;
  check(cudaEventCreate(&begin), "cudaEventCreate");
  check(cudaEventCreate(&end), "cudaEventCreate");
  std::vector<float> times;
  call();
  for (int i = 0; i < repeats; ++i) {
    check(cudaEventRecord(begin), "cudaEventRecord");
    call();
    check(cudaEventRecord(end), "cudaEventRecord");
    check(cudaEventSynchronize(end), "cudaEventSynchronize");
    float ms = 0;
    check(cudaEventElapsedTime(&ms, begin, end), "cudaEventElapsedTime");
    times.push_back(1000.0f * ms);
  }
  std::sort(times.begin(), times.end());
  return times[times.size() / 2];
}

double copy_gb_per_s() {
  const size_t bytes = size_t{2} << 30;
  const Memory from(true, bytes), to(true, bytes);
  from.fill(1);
  const double us = median_us(7, [&] {
    check(cudaMemcpyAsync(to.get(), from.get(), bytes, cudaMemcpyDeviceToDevice), "copy");
  });
  return 2.0 * static_cast<double>(bytes) / us / 1000.0;
}

struct Times {
  double fit, encode, bytes;
};

Times time_prefill(const std::string& folder, const Case& c, int batch, int context, double copy,
                   const __half* data) {
  constexpr int kHeads = 8, kDim = 128;
  const BenchCodec codec(folder, c.kind, c.id, true, c.choices,
                         make_shape(batch, kHeads, kDim, SIKV_FP16, context));
  BenchCache cache(true, codec.layout, c.kind == SIKV_KEY_CODEC, batch, kHeads, kDim, SIKV_FP16,
                   context);
  std::vector<int32_t> first, count(batch, context);
  for (int b = 0; b < batch; ++b) first.push_back(b * context);
  const Block d_first = to_memory(true, first), d_count = to_memory(true, count),
              slots = to_memory(true, std::vector<int32_t>(batch * kHeads, 0));
  const Memory workspace(true, codec.workspace_bytes);
  const sikv_rows rows{data,
                       SIKV_FP16,
                       context,
                       static_cast<const int32_t*>(d_first->get()),
                       static_cast<const int32_t*>(d_count->get()),
                       kHeads * kDim,
                       kDim};
  const auto* first_slot = static_cast<const int32_t*>(slots->get());
  Times times{};
  times.fit = median_us(7, [&] { codec.fit(rows, cache.view, workspace.get()); });
  times.encode = median_us(7, [&] { codec.encode(rows, first_slot, cache.view, workspace.get()); });
  double token_bytes = kDim * 2;
  for (uint32_t i = 0; i < codec.layout.num_planes; ++i) {
    token_bytes += static_cast<double>(page_bytes(codec.layout.planes[i])) / kPage;
  }
  times.bytes = token_bytes * batch * static_cast<double>(context) * kHeads;

  // A page per sequence, and 2048 slots of every row.
  const Block page_count = to_memory(true, std::vector<int32_t>(batch, kPage)),
              none = to_memory(true, std::vector<int32_t>(batch, 0));
  sikv_rows page = rows;
  page.max_count = kPage;
  page.count = static_cast<const int32_t*>(page_count->get());
  const double page_us =
      median_us(15, [&] { codec.encode(page, first_slot, cache.view, workspace.get()); });
  page.count = static_cast<const int32_t*>(none->get());
  const double idle_us =
      median_us(15, [&] { codec.encode(page, first_slot, cache.view, workspace.get()); });
  constexpr int kSlots = 2048;
  std::vector<int32_t> asked(static_cast<size_t>(batch) * kHeads * kSlots);
  for (size_t i = 0; i < asked.size(); ++i) {
    asked[i] = static_cast<int32_t>(i % kSlots * (context / kSlots) + i / kSlots % 7);
  }
  const Block d_asked = to_memory(true, asked),
              d_counts = to_memory(true, std::vector<int32_t>(batch * kHeads, kSlots));
  const Memory out(true, asked.size() * kDim * 4);
  const sikv_decode_args args{&cache.view,
                              0,
                              batch * kHeads,
                              kSlots,
                              0,
                              static_cast<const int32_t*>(d_asked->get()),
                              static_cast<const int32_t*>(d_counts->get()),
                              static_cast<float*>(out.get())};
  const double decode_us = median_us(15, [&] { codec.decode(args); });

  std::string name = std::string(c.kind == SIKV_KEY_CODEC ? "keys " : "values ") + c.id;
  for (const auto& [option, value] : c.choices) name += " " + option + "=" + value;
  const double gb = times.bytes / times.encode / 1000.0;
  std::printf(
      "%-48s fit %8.1f encode %8.1f us %7.1f GB/s %3.0f%%  page %6.1f idle %5.1f decode %7.1f\n",
      name.c_str(), times.fit, times.encode, gb, 100 * gb / copy, page_us, idle_us, decode_us);
  sikv_fault fault{};
  std::memcpy(&fault, cache.fault->read().data(), sizeof fault);
  if (fault.what != 0) fail("a fault was reported on finite rows");
  return times;
}

void time_all(const std::string& folder, int context, bool all) {
  constexpr int kBatch = 8;
  const double copy = copy_gb_per_s();
  cudaDeviceProp properties;
  check(cudaGetDeviceProperties(&properties, 0), "cudaGetDeviceProperties");
  std::printf("%s: copy %.1f GB/s; %d x %d tokens x 8 heads x D 128, fp16\n", properties.name, copy,
              kBatch, context);
  const int64_t n = int64_t{kBatch} * context * 8 * 128;
  const Memory data(true, static_cast<size_t>(n) * 2);
  fill_rows<<<4096, 256>>>(static_cast<__half*>(data.get()), n, 128, 1);
  check(cudaDeviceSynchronize(), "fill_rows");
  const auto* rows = static_cast<const __half*>(data.get());
  const auto time = [&](const Case& c) {
    return time_prefill(folder, c, kBatch, context, copy, rows);
  };
  const auto both = [&](const char* name, const Case& k, const Case& v) {
    const Times a = time(k), b = time(v);
    const double us = a.fit + a.encode + b.fit + b.encode, gb = (a.bytes + b.bytes) / us / 1000.0;
    std::printf("  => %s: %.0f us, fit included: %.1f GB/s = %.0f%% of copy\n", name, us, gb,
                100 * gb / copy);
  };
  for (const char* fit : {"16384", "0"}) {
    const Choices sampled{{"fit_tokens", fit}};
    if (!all && std::string(fit) == "0") return;
    both("rot_lm + rot_lm", {SIKV_KEY_CODEC, "rot_lm", sampled},
         {SIKV_VALUE_CODEC, "rot_lm", sampled});
    both("sign_vq + intq", {SIKV_KEY_CODEC, "sign_vq", sampled}, {SIKV_VALUE_CODEC, "intq", {}});
  }
  both("sign_vq + intq, fp8", {SIKV_KEY_CODEC, "sign_vq", {{"scale_type", "fp8_e4m3"}}},
       {SIKV_VALUE_CODEC, "intq", {{"scale_type", "fp8_e4m3"}}});
  both("kivi", {SIKV_KEY_CODEC, "kivi", {}}, {SIKV_VALUE_CODEC, "kivi", {}});
  both("fp16", {SIKV_KEY_CODEC, "fp16", {}}, {SIKV_VALUE_CODEC, "fp16", {}});
  time({SIKV_KEY_CODEC, "rot_lm", {{"bits", "4"}}});
  time({SIKV_VALUE_CODEC, "rot_lm", {{"bits", "3"}}});
  time({SIKV_KEY_CODEC, "sign_vq", {{"magnitude_bits", "4"}}});
  time({SIKV_KEY_CODEC, "sign_vq", {{"center", "median"}}});
  time({SIKV_VALUE_CODEC, "intq", {{"bits", "4"}}});
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 2) fail("usage: encode_cuda_bench PLUGIN_FOLDER [check] [time|quick] [CONTEXT]");
  int devices = 0;
  if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) fail("there is no GPU");
  const std::string folder = argv[1];
  bool checks = argc == 2, times = argc == 2, all = true;
  int context = 131072;
  for (int i = 2; i < argc; ++i) {
    const std::string word = argv[i];
    if (word == "check") {
      checks = true;
    } else if (word == "time" || word == "quick") {
      times = true;
      all = word == "time";
    } else {
      context = std::atoi(argv[i]);
    }
  }
  try {
    const int wrong = checks ? check_all(folder) : 0;
    std::fflush(stdout);
    if (times) time_all(folder, context, all);
    return wrong == 0 ? 0 : 1;
  } catch (const std::exception& error) {
    fail(error.what());
  }
}
