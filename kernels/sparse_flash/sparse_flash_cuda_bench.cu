// Check, then time the CUDA attention kernels by themselves: caches made on the spot, any bytes are
// valid codes.
//
//   sparse_flash_cuda_bench [--sparse LIB] [--dense LIB] [--check | --time] [--exact P+T]
//                           [--quick | --dense-only]
//
// The check compares with attention in fp64 over tokens that the layouts' scalar code decodes, on
// awkward shapes, and prints the error beside that of a plain fp32 run. The times are those of one
// launch in a CUDA graph of 16 over as many layers as it takes that no byte is met twice within 160
// MB; bytes are those that one launch must read, in whole 32-byte sectors and without sharing.
#include <cuda_runtime.h>
#include <dlfcn.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "plugins/layouts/intq_v1.h"
#include "plugins/layouts/kivi_v1.h"
#include "plugins/layouts/raw_v1.h"
#include "plugins/layouts/rlm4_v1.h"
#include "plugins/layouts/sign4_v1.h"
#include "plugins/sdk/plugin.h"

namespace sikv::bench {
namespace {

void ok(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  std::printf("%s: %s\n", what, cudaGetErrorString(status));
  std::exit(1);
}

// ---- layouts ------------------------------------------------------------------------------------

struct Family {
  enum Kind { kSign, kRotated, kKivi, kRaw, kMinMax, kRotatedValue } kind;
  int bits = 0, group = 32;
  int32_t dtype = SIKV_FP16;  // of scales
  bool lines = false;         // kRotated, kRotatedValue
};

std::string name(const Family& f) {
  const char* names[] = {"sign4", "rlm4", "kivi", "raw", "intq", "rlm4v"};
  std::string text = names[f.kind];
  if (f.kind == Family::kRaw) return text;
  text += std::to_string(f.bits);
  if (f.group != 32) text += "/" + std::to_string(f.group);
  if (f.dtype != SIKV_FP16) text += "/" + std::string(dtype_name(f.dtype));
  if (f.lines) text += "/line";
  return text;
}

sikv_layout layout_of(const Family& f, bool key, int dim, int32_t dtype) {
  const sikv_role code = key ? SIKV_MAGNITUDE : SIKV_VALUE_CODE;
  const sikv_role scale = key ? SIKV_SCALE : SIKV_VALUE_SCALE;
  const std::string element(dtype_name(dtype)), scales(dtype_name(f.dtype));
  switch (f.kind) {
    case Family::kSign: {
      const sign4::Params p{dim, f.bits, f.group, f.dtype, dtype};
      LayoutBuilder b(sign4::kFamily, 1, dim);
      b.param("magnitude_bits", f.bits);
      if (f.bits == 16) b.param("dtype", element);
      if (sign4::has_scale(p)) b.param("scale_group", f.group).param("scale", scales);
      b.plane(SIKV_INDEX_CODE, SIKV_NIBBLE_TILES, 8, sign4::index_tile_bytes(p));
      if (f.bits != 0) b.plane(code, SIKV_PER_TOKEN, 1, sign4::magnitude_bytes(p));
      if (sign4::has_scale(p)) b.plane(scale, SIKV_PER_TOKEN, 1, sign4::scale_bytes(p));
      b.table(SIKV_CODEBOOK, dim * 16).table(SIKV_KEY_MEAN, dim).table(SIKV_KEY_SCALE, dim);
      return b.build();
    }
    case Family::kRotated: {
      const rlm4::Params p{dim, f.bits};
      LayoutBuilder b(f.lines ? rlm4::kKeyLineFamily : rlm4::kKeyFamily, 1, dim);
      b.param("bits", f.bits);
      b.plane(SIKV_INDEX_CODE, SIKV_NIBBLE_TILES, 8, rlm4::index_tile_bytes(p));
      if (f.lines) {
        const int line = rlm4::line_bytes(dim), scale_at = rlm4::line_key_scale(dim);
        b.in_line(code, line, 0, scale_at).in_line(scale, line, scale_at, rlm4::kScaleBytes);
      } else {
        b.plane(code, SIKV_PER_TOKEN, 1, rlm4::magnitude_bytes(p));
        b.plane(scale, SIKV_PER_TOKEN, 1, rlm4::kScaleBytes);
      }
      b.table(SIKV_CODEBOOK, dim * 16).table(SIKV_KEY_MEAN, dim);
      return b.build();
    }
    case Family::kKivi: {
      const kivi::Params p{dim, f.bits, f.group};
      LayoutBuilder b(kivi::kFamily, 1, dim);
      b.param("bits", f.bits).param("group", f.group);
      b.plane(code, SIKV_PER_TOKEN, 1, kivi::magnitude_bytes(p));
      b.plane(scale, SIKV_SHARED, f.group, kivi::scale_tile_bytes(p));
      return b.build();
    }
    case Family::kRaw: {
      LayoutBuilder b(raw::kFamily, 1, dim);
      b.param("dtype", element);
      b.plane(code, SIKV_PER_TOKEN, 1, raw::row_bytes({dim, dtype}));
      return b.build();
    }
    case Family::kMinMax: {
      const intq::Params p{dim, f.bits, f.group, f.dtype, dtype};
      LayoutBuilder b(intq::kFamily, 1, dim);
      b.param("bits", f.bits);
      if (f.bits == 16) b.param("dtype", element);
      if (f.bits != 16) b.param("scale_group", f.group).param("scale", scales);
      b.plane(code, SIKV_PER_TOKEN, 1, intq::code_bytes(p));
      if (f.bits != 16) b.plane(scale, SIKV_PER_TOKEN, 1, intq::scale_bytes(p));
      return b.build();
    }
    default: {
      const rlm4::Params p{dim, f.bits};
      LayoutBuilder b(f.lines ? rlm4::kValueLineFamily : rlm4::kValueFamily, 1, dim);
      b.param("bits", f.bits);
      b.plane(code, SIKV_PER_TOKEN, 1, rlm4::value_code_bytes(p));
      if (f.lines) {
        b.in_line(scale, rlm4::line_bytes(dim), rlm4::line_value_scale(dim), rlm4::kScaleBytes);
      } else {
        b.plane(scale, SIKV_PER_TOKEN, 1, rlm4::kScaleBytes);
      }
      b.table(SIKV_VALUE_MEAN, dim);
      return b.build();
    }
  }
}

// x [D] = one token, its pages' first bytes in planes [i] and its row's tables in tables [i].
void decode(const sikv_layout& raw_layout, uint8_t* const* planes, float* const* tables, int token,
            float* x) {
  const LayoutView layout(raw_layout);
  const auto plane = [&](sikv_role role) {
    return layout.plane(role) < 0 ? nullptr : planes[layout.plane(role)];
  };
  const auto table = [&](sikv_table_role role) { return tables[layout.table(role)]; };
  if (layout.is(sign4::kFamily, 1)) {
    sign4::unpack_1(sign4::read_params(layout),
                    {plane(SIKV_INDEX_CODE), plane(SIKV_MAGNITUDE), plane(SIKV_SCALE)}, token,
                    {table(SIKV_CODEBOOK), table(SIKV_KEY_MEAN), table(SIKV_KEY_SCALE)}, x);
  } else if (rlm4::is_keys(layout)) {
    rlm4::unpack_1(rlm4::read_params(layout),
                   rlm4::KeyPage{plane(SIKV_INDEX_CODE), plane(SIKV_MAGNITUDE), plane(SIKV_SCALE),
                                 rlm4::read_line(layout)},
                   token, table(SIKV_KEY_MEAN), x);
  } else if (layout.is(kivi::kFamily, 1)) {
    kivi::unpack_1(kivi::read_params(layout), {plane(SIKV_MAGNITUDE), plane(SIKV_SCALE)}, token, x);
  } else if (layout.is(raw::kFamily, 1)) {
    const bool key = layout.plane(SIKV_MAGNITUDE) >= 0;
    raw::unpack_1(raw::read_params(layout), plane(key ? SIKV_MAGNITUDE : SIKV_VALUE_CODE), token,
                  x);
  } else if (layout.is(intq::kFamily, 1)) {
    intq::unpack_1(intq::read_params(layout), {plane(SIKV_VALUE_CODE), plane(SIKV_VALUE_SCALE)},
                   token, x);
  } else {
    rlm4::unpack_1(
        rlm4::read_params(layout),
        rlm4::ValuePage{plane(SIKV_VALUE_CODE), plane(SIKV_VALUE_SCALE), rlm4::read_line(layout)},
        token, table(SIKV_VALUE_MEAN), x);
  }
}

// ---- memory -------------------------------------------------------------------------------------

template <typename T>
class Device {
 public:
  explicit Device(size_t n) : n_(n) {
    ok(cudaMalloc(&data_, std::max<size_t>(n * sizeof(T), 256)), "cudaMalloc");
  }
  explicit Device(const std::vector<T>& host) : Device(host.size()) {
    ok(cudaMemcpy(data_, host.data(), n_ * sizeof(T), cudaMemcpyHostToDevice), "cudaMemcpy");
  }
  Device(const Device&) = delete;
  Device(Device&& other) noexcept : data_(other.data_), n_(other.n_) { other.data_ = nullptr; }
  ~Device() { cudaFree(data_); }
  T* data() const { return data_; }
  size_t bytes() const { return n_ * sizeof(T); }
  std::vector<T> host() const {
    std::vector<T> values(n_);
    ok(cudaMemcpy(values.data(), data_, bytes(), cudaMemcpyDeviceToHost), "cudaMemcpy");
    return values;
  }

 private:
  T* data_ = nullptr;
  size_t n_;
};

enum class Fill { kBytes, kNumbers, kScales, kPairs };

__device__ uint64_t scramble(uint64_t x) {
  x += 0x9e3779b97f4a7c15u;
  x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9u;
  x = (x ^ x >> 27) * 0x94d049bb133111ebu;
  return x ^ x >> 31;
}

// kNumbers: about N(0, 1); kScales: in [0.5, 1.5); kPairs: such a scale and a zero near -1.5 of it.
__global__ void fill(uint8_t* out, int64_t n, int32_t dtype, Fill what, uint64_t seed) {
  for (int64_t i = blockIdx.x * int64_t{blockDim.x} + threadIdx.x; i < n;
       i += int64_t{gridDim.x} * blockDim.x) {
    const uint64_t bits = scramble(seed * 0x100000001b3u + static_cast<uint64_t>(i));
    if (what == Fill::kBytes) {
      out[i] = static_cast<uint8_t>(bits);
      continue;
    }
    const auto u = [&](int k) { return static_cast<float>(bits >> (16 * k) & 0xffffu) / 65536.0f; };
    float x = (u(0) + u(1) + u(2) + u(3) - 2.0f) * 1.7320508f;
    if (what == Fill::kScales) x = 0.5f + u(0);
    if (what == Fill::kPairs) x = i % 2 == 0 ? 0.5f + u(0) : -0.7f - 1.6f * u(0);
    sikv_store(out, dtype, i, x);
  }
}

// Scales a line apart.
__global__ void fill_scales(uint8_t* out, int64_t n, int line, uint64_t seed) {
  for (int64_t i = blockIdx.x * int64_t{blockDim.x} + threadIdx.x; i < n;
       i += int64_t{gridDim.x} * blockDim.x) {
    const auto bits = static_cast<uint32_t>(scramble(seed + static_cast<uint64_t>(i)) & 0xffffu);
    sikv_store(out + i * line, SIKV_FP16, 0, 0.5f + static_cast<float>(bits) / 65536.0f);
  }
}

Device<uint8_t> filled(int64_t n, int32_t dtype, Fill what, uint64_t seed) {
  const int64_t width = what == Fill::kBytes ? 1 : sikv_dtype_bytes(dtype);
  Device<uint8_t> memory(static_cast<size_t>(n * width));
  fill<<<4096, 256>>>(memory.data(), n, dtype, what, seed);
  ok(cudaGetLastError(), "fill");
  return memory;
}

// ---- a layer ------------------------------------------------------------------------------------

struct Shape {
  std::vector<int> encoded, tail;  // [B]
  int heads = 2, group = 4, dim = 128, pinned = 0;
  int32_t dtype = SIKV_FP16;
  int rows() const { return static_cast<int>(encoded.size()) * heads; }
};

class Layer {
 public:
  Layer(const Shape& shape, const Family& key, const Family& value, uint64_t seed)
      : shape(shape),
        key_layout(layout_of(key, true, shape.dim, shape.dtype)),
        value_layout(layout_of(value, false, shape.dim, shape.dtype)) {
    std::mt19937_64 random(seed);
    const int rows = shape.rows(), batch = static_cast<int>(shape.encoded.size());
    const int longest = *std::max_element(shape.encoded.begin(), shape.encoded.end());
    view.struct_size = sizeof view;
    view.num_sequences = batch;
    view.num_kv_heads = shape.heads;
    view.head_dim = shape.dim;
    view.dtype = shape.dtype;
    view.max_pages = std::max((longest + 255) / 256, 1);
    view.max_encoded_len = longest;
    std::vector<int32_t> table(static_cast<size_t>(rows * view.max_pages)), lengths, tails, pins;
    for (size_t i = 0; i < table.size(); ++i) table[i] = static_cast<int32_t>(i);
    std::shuffle(table.begin(), table.end(), random);
    for (int row = 0; row < rows; ++row) {
      const int encoded = shape.encoded[static_cast<size_t>(row / shape.heads)];
      lengths.push_back(encoded);
      pins.push_back(std::min(shape.pinned, encoded));
    }
    tails.assign(shape.tail.begin(), shape.tail.end());
    std::vector<int32_t> slots(static_cast<size_t>(rows * std::max(shape.pinned, 1)));
    for (int row = 0; row < rows; ++row) {
      const auto r = static_cast<size_t>(row);
      for (int i = 0; i < pins[r]; ++i) {
        slots[r * static_cast<size_t>(shape.pinned) + static_cast<size_t>(i)] =
            static_cast<int32_t>(int64_t{i} * lengths[r] / pins[r]);
      }
    }
    view.page_table = keep(table);
    view.encoded_len = keep(lengths);
    view.tail_len = keep(tails);
    view.pinned_len = keep(pins);
    view.pinned_slots = keep(slots);
    view.pinned_capacity = shape.pinned;
    view.tail_capacity = SIKV_PAGE_TOKENS;
    const int64_t pinned = int64_t{rows} * shape.pinned * shape.dim;
    const int64_t tail = int64_t{rows} * SIKV_PAGE_TOKENS * shape.dim;
    view.pinned_k = keep(filled(pinned, shape.dtype, Fill::kNumbers, seed + 1));
    view.pinned_v = keep(filled(pinned, shape.dtype, Fill::kNumbers, seed + 2));
    view.tail_k = keep(filled(tail, shape.dtype, Fill::kNumbers, seed + 3));
    view.tail_v = keep(filled(tail, shape.dtype, Fill::kNumbers, seed + 4));
    build(key_layout, view.key, key, seed + 10);
    build(value_layout, view.value, value, seed + 20);
    ok(cudaMalloc(&fault, sizeof *fault), "cudaMalloc");
    ok(cudaMemset(fault, 0, sizeof *fault), "cudaMemset");
    view.fault = fault;
  }
  Layer(const Layer&) = delete;

  Shape shape;
  sikv_layout key_layout, value_layout;
  sikv_cache_view view{};
  sikv_fault* fault = nullptr;
  int64_t bytes = 0;  // of all planes

 private:
  const int32_t* keep(const std::vector<int32_t>& values) {
    ints_.push_back(std::make_unique<Device<int32_t>>(values));
    return ints_.back()->data();
  }
  uint8_t* keep(Device<uint8_t> memory) {
    memory_.push_back(std::make_unique<Device<uint8_t>>(std::move(memory)));
    return memory_.back()->data();
  }
  void build(const sikv_layout& layout, sikv_store_view& store, const Family& family,
             uint64_t seed) {
    store.layout = &layout;
    const int64_t pages = int64_t{shape.rows()} * view.max_pages;
    if (layout.line_bytes > 0 && lines_ == nullptr) {
      lines_ = keep(filled(pages * SIKV_PAGE_TOKENS * layout.line_bytes, 0, Fill::kBytes, seed));
      bytes += pages * SIKV_PAGE_TOKENS * layout.line_bytes;
    }
    for (uint32_t i = 0; i < layout.num_planes; ++i) {
      const sikv_plane& plane = layout.planes[i];
      const int64_t page = int64_t{SIKV_PAGE_TOKENS} / plane.tile_tokens * plane.bytes_per_tile;
      const bool scales = plane.role == SIKV_SCALE || plane.role == SIKV_VALUE_SCALE;
      if (plane.organisation == SIKV_IN_LINE) {
        store.page_stride_bytes[i] = int64_t{SIKV_PAGE_TOKENS} * layout.line_bytes;
        store.planes[i] = lines_ + layout.line_offset[i];
        if (!scales) continue;
        fill_scales<<<4096, 256>>>(lines_ + layout.line_offset[i], pages * SIKV_PAGE_TOKENS,
                                   static_cast<int>(layout.line_bytes), seed + i);
        ok(cudaGetLastError(), "fill_scales");
        continue;
      }
      const bool rotated = family.kind == Family::kRotated || family.kind == Family::kRotatedValue;
      const bool rows =
          family.kind == Family::kRaw || (family.bits == 16 && plane.role != SIKV_INDEX_CODE);
      const int32_t dtype = rows ? shape.dtype : family.dtype;
      const Fill what = rows      ? Fill::kNumbers
                        : !scales ? Fill::kBytes
                        : rotated ? Fill::kScales
                                  : Fill::kPairs;
      const int64_t width = what == Fill::kBytes ? 1 : sikv_dtype_bytes(dtype);
      store.page_stride_bytes[i] = page;
      store.planes[i] = keep(filled(pages * page / width, dtype, what, seed + i));
      bytes += pages * page;
    }
    for (uint32_t i = 0; i < layout.num_tables; ++i) {
      const sikv_side_table& table = layout.tables[i];
      const int64_t n = int64_t{shape.rows()} * table.count;
      const Fill what = table.role == SIKV_KEY_SCALE ? Fill::kScales : Fill::kNumbers;
      store.tables[i] = reinterpret_cast<float*>(keep(filled(n, SIKV_FP32, what, seed + 5 + i)));
    }
  }

  std::vector<std::unique_ptr<Device<int32_t>>> ints_;
  std::vector<std::unique_ptr<Device<uint8_t>>> memory_;
  uint8_t* lines_ = nullptr;  // of keys and values
};

// ---- a kernel -----------------------------------------------------------------------------------

class Kernel {
 public:
  Kernel(const std::string& path, const Shape& shape, int capacity) {
    void* library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
    if (library == nullptr) {
      std::printf("%s\n", dlerror());
      std::exit(1);
    }
    const auto tables =
        reinterpret_cast<sikv_plugin_tables_fn>(dlsym(library, "sikv_plugin_tables"));
    table_ = static_cast<const sikv_kernel_table*>(tables()->entries[0].table);
    cudaDeviceProp properties;
    ok(cudaGetDeviceProperties(&properties, 0), "cudaGetDeviceProperties");
    sikv_device device{};
    device.struct_size = sizeof device;
    device.type = SIKV_CUDA;
    device.compute_capability = properties.major * 10 + properties.minor;
    device.multiprocessors = properties.multiProcessorCount;
    const sikv_shape model{sizeof(sikv_shape),
                           1,
                           shape.heads * shape.group,
                           shape.heads,
                           shape.dim,
                           shape.dtype,
                           static_cast<int32_t>(shape.encoded.size()),
                           1 << 20,
                           0.0};
    static const sikv_host host{};
    const sikv_create_args args{sizeof args, 0, nullptr, &model, &device, &host, nullptr, nullptr};
    call([&](sikv_message* why) { return table_->create(&args, &self_, why); });
    uint64_t bytes = 0;
    call([&](sikv_message* why) { return table_->plan(self_, capacity, &bytes, why); });
    workspace_ = std::make_unique<Device<uint8_t>>(bytes);
    ok(cudaMemset(workspace_->data(), 0xa5, bytes), "cudaMemset");
  }
  Kernel(const Kernel&) = delete;
  ~Kernel() { table_->destroy(self_); }

  void run(const sikv_attend_args& args, cudaStream_t stream) {
    call([&](sikv_message* why) {
      return table_->run(self_, &args, workspace_->data(), stream, why);
    });
  }

 private:
  template <typename Call>
  static void call(Call&& call) {
    sikv_message why{};
    if (call(&why) == SIKV_OK) return;
    std::printf("%s\n", why.text);
    std::exit(1);
  }
  const sikv_kernel_table* table_;
  void* self_ = nullptr;
  std::unique_ptr<Device<uint8_t>> workspace_;
};

float scale_of(const Shape& shape) { return 1.0f / std::sqrt(static_cast<float>(shape.dim)); }

// ---- check --------------------------------------------------------------------------------------

template <typename T>
void attend(const std::vector<float>& k, const std::vector<float>& v, const float* q, float scale,
            int dim, double* out, double* lse) {
  const size_t n = k.size() / static_cast<size_t>(dim);
  std::vector<T> weights(n), sum_v(static_cast<size_t>(dim), T(0));
  T top = -std::numeric_limits<T>::infinity(), sum = T(0);
  for (size_t t = 0; t < n; ++t) {
    T dot = T(0);
    for (int d = 0; d < dim; ++d) {
      dot += static_cast<T>(q[d]) * static_cast<T>(k[t * static_cast<size_t>(dim) + d]);
    }
    weights[t] = static_cast<T>(scale) * dot;
    top = std::max(top, weights[t]);
  }
  for (size_t t = 0; t < n; ++t) {
    const T weight = std::exp(weights[t] - top);
    sum += weight;
    for (int d = 0; d < dim; ++d) {
      sum_v[static_cast<size_t>(d)] += weight * static_cast<T>(v[t * static_cast<size_t>(dim) + d]);
    }
  }
  for (int d = 0; d < dim; ++d) {
    out[d] = n == 0 ? 0.0 : static_cast<double>(sum_v[static_cast<size_t>(d)] / sum);
  }
  *lse = n == 0 ? -INFINITY : static_cast<double>(top + std::log(sum));
}

enum class Select { kAll, kNothing, kOne, kThird };

struct Errors {
  double kernel = 0, plain = 0, kernel_lse = 0, plain_lse = 0;
};

// Relative to the largest element of out, and absolute for lse (or relative where it is above 1).
Errors check(const std::string& library, const Shape& shape, const Family& key, const Family& value,
             Select select, bool dense, uint64_t seed) {
  const Layer layer(shape, key, value, seed);
  std::mt19937_64 random(seed);
  const int rows = shape.rows(), dim = shape.dim, heads = rows * shape.group;
  const int capacity = select == Select::kAll ? 0 : std::max(layer.view.max_encoded_len, 1);
  const auto pinned = [&](int row) {
    std::vector<int32_t> all(static_cast<size_t>(rows * shape.pinned));
    ok(cudaMemcpy(all.data(), layer.view.pinned_slots, all.size() * 4, cudaMemcpyDeviceToHost),
       "cudaMemcpy");
    const int n = std::min(shape.pinned, shape.encoded[static_cast<size_t>(row / shape.heads)]);
    const auto first = all.begin() + row * shape.pinned;
    return std::vector<int32_t>(first, first + n);
  };
  std::vector<int32_t> slots(static_cast<size_t>(rows * capacity)), counts;
  std::vector<std::vector<int32_t>> chosen;
  for (int row = 0; row < rows; ++row) {
    const std::vector<int32_t> pins = pinned(row);
    std::vector<int32_t> list;
    for (int s = 0; s < shape.encoded[static_cast<size_t>(row / shape.heads)]; ++s) {
      if (!dense && std::binary_search(pins.begin(), pins.end(), s)) continue;
      if (select == Select::kNothing) continue;
      if (select == Select::kOne && !list.empty()) continue;
      if (select == Select::kThird && random() % 3 != 0) continue;
      list.push_back(s);
    }
    counts.push_back(select == Select::kAll ? SIKV_SELECT_ALL : static_cast<int32_t>(list.size()));
    if (select != Select::kAll) {
      std::copy(list.begin(), list.end(), slots.begin() + int64_t{row} * capacity);
    }
    chosen.push_back(std::move(list));
  }
  const Device<int32_t> slots_d(slots), counts_d(counts);
  const Device<uint8_t> q = filled(int64_t{heads} * dim, shape.dtype, Fill::kNumbers, seed + 99);
  const Device<float> out(std::vector<float>(static_cast<size_t>(heads * dim), NAN)),
      lse(std::vector<float>(static_cast<size_t>(heads), NAN));
  Kernel kernel(library, shape, capacity);
  const sikv_attend_args args{sizeof args,
                              shape.heads * shape.group,
                              &layer.view,
                              q.data(),
                              scale_of(shape),
                              0,
                              {slots_d.data(), counts_d.data(), capacity, 0},
                              out.data(),
                              lse.data(),
                              nullptr};
  std::vector<float> got, got_lse;
  for (int repeat = 0; repeat < 2; ++repeat) {
    kernel.run(args, nullptr);
    ok(cudaDeviceSynchronize(), "run");
    const std::vector<float> again = out.host();
    if (repeat > 0 && std::memcmp(again.data(), got.data(), again.size() * 4) != 0) {
      std::printf("two runs differ\n");
    }
    got = again;
    got_lse = lse.host();
  }

  // The same on the host.
  const auto copy = [](const void* from, size_t bytes) {
    std::vector<uint8_t> to(bytes);
    ok(cudaMemcpy(to.data(), from, bytes, cudaMemcpyDeviceToHost), "cudaMemcpy");
    return to;
  };
  const int max_pages = layer.view.max_pages;
  const std::vector<uint8_t> table =
      copy(layer.view.page_table, static_cast<size_t>(rows * max_pages) * 4);
  const auto page_of = [&](int row, int page) {
    return reinterpret_cast<const int32_t*>(table.data())[row * max_pages + page];
  };
  struct Store {
    std::vector<std::vector<uint8_t>> planes;
    std::vector<std::vector<uint8_t>> tables;
  };
  const auto copy_store = [&](const sikv_layout& layout, const sikv_store_view& view) {
    Store store;
    for (uint32_t i = 0; i < layout.num_planes; ++i) {
      const bool in_line = layout.planes[i].organisation == SIKV_IN_LINE;
      const size_t offset = in_line ? layout.line_offset[i] : 0;
      store.planes.push_back(copy(view.planes[i], static_cast<size_t>(view.page_stride_bytes[i]) *
                                                          static_cast<size_t>(rows * max_pages) -
                                                      offset));
    }
    for (uint32_t i = 0; i < layout.num_tables; ++i) {
      store.tables.push_back(
          copy(view.tables[i], size_t{4} * layout.tables[i].count * static_cast<size_t>(rows)));
    }
    return store;
  };
  Store keys = copy_store(layer.key_layout, layer.view.key),
        values = copy_store(layer.value_layout, layer.view.value);
  const auto token = [&](Store& store, const sikv_layout& layout, const sikv_store_view& view,
                         int row, int slot, float* x) {
    uint8_t* planes[SIKV_MAX_PLANES] = {};
    float* tables[SIKV_MAX_TABLES] = {};
    for (uint32_t i = 0; i < layout.num_planes; ++i) {
      planes[i] = store.planes[i].data() + page_of(row, slot / 256) * view.page_stride_bytes[i];
    }
    for (uint32_t i = 0; i < layout.num_tables; ++i) {
      tables[i] = reinterpret_cast<float*>(store.tables[i].data()) + row * layout.tables[i].count;
    }
    decode(layout, planes, tables, slot % 256, x);
  };
  const size_t width = static_cast<size_t>(sikv_dtype_bytes(shape.dtype));
  const size_t pinned_bytes = static_cast<size_t>(rows * shape.pinned * dim) * width;
  const size_t tail_bytes = static_cast<size_t>(rows * SIKV_PAGE_TOKENS * dim) * width;
  const std::vector<uint8_t> pinned_k = copy(layer.view.pinned_k, pinned_bytes),
                             pinned_v = copy(layer.view.pinned_v, pinned_bytes),
                             tail_k = copy(layer.view.tail_k, tail_bytes),
                             tail_v = copy(layer.view.tail_v, tail_bytes),
                             q_h = copy(q.data(), q.bytes());
  Errors errors;
  double largest = 0;
  for (int row = 0; row < rows; ++row) {
    std::vector<float> k, v, x(static_cast<size_t>(dim));
    for (int slot : chosen[static_cast<size_t>(row)]) {
      token(keys, layer.key_layout, layer.view.key, row, slot, x.data());
      k.insert(k.end(), x.begin(), x.end());
      token(values, layer.value_layout, layer.view.value, row, slot, x.data());
      v.insert(v.end(), x.begin(), x.end());
    }
    const auto exact = [&](const std::vector<uint8_t>& from, int64_t index,
                           std::vector<float>& to) {
      for (int d = 0; d < dim; ++d)
        to.push_back(sikv_load(from.data(), shape.dtype, index * dim + d));
    };
    const int b = row / shape.heads, h = row % shape.heads;
    if (!dense) {
      for (size_t i = 0; i < pinned(row).size(); ++i) {
        exact(pinned_k, int64_t{row} * shape.pinned + static_cast<int64_t>(i), k);
        exact(pinned_v, int64_t{row} * shape.pinned + static_cast<int64_t>(i), v);
      }
    }
    for (int t = 0; t < shape.tail[static_cast<size_t>(b)]; ++t) {
      const int64_t at = (int64_t{b} * SIKV_PAGE_TOKENS + t) * shape.heads + h;
      exact(tail_k, at, k);
      exact(tail_v, at, v);
    }
    for (int g = 0; g < shape.group; ++g) {
      const int64_t head = int64_t{row} * shape.group + g;
      for (int d = 0; d < dim; ++d)
        x[static_cast<size_t>(d)] = sikv_load(q_h.data(), shape.dtype, head * dim + d);
      std::vector<double> want(static_cast<size_t>(dim)), plain(want);
      double want_lse, plain_lse;
      attend<double>(k, v, x.data(), scale_of(shape), dim, want.data(), &want_lse);
      attend<float>(k, v, x.data(), scale_of(shape), dim, plain.data(), &plain_lse);
      const auto grow = [](double& worst, double error) {
        if (!(error <= worst)) worst = std::isnan(error) ? INFINITY : error;
      };
      for (int d = 0; d < dim; ++d) {
        const auto i = static_cast<size_t>(d);
        largest = std::max(largest, std::abs(want[i]));
        grow(errors.kernel, std::abs(got[static_cast<size_t>(head * dim + d)] - want[i]));
        grow(errors.plain, std::abs(plain[i] - want[i]));
      }
      const double got_l = got_lse[static_cast<size_t>(head)];
      if (want_lse != got_l) {
        grow(errors.kernel_lse, std::abs(got_l - want_lse) / std::max(1.0, std::abs(want_lse)));
        grow(errors.plain_lse, std::abs(plain_lse - want_lse) / std::max(1.0, std::abs(want_lse)));
      }
    }
  }
  if (largest > 0) errors.kernel /= largest, errors.plain /= largest;
  return errors;
}

int check_all(const std::string& sparse, const std::string& dense) {
  using F = Family;
  const F key_lines{F::kRotated, 3, 32, SIKV_FP16, true};
  const F value_lines{F::kRotatedValue, 2, 32, SIKV_FP16, true};
  const std::vector<F> keys = {
      {F::kRotated, 3}, {F::kSign, 2},     key_lines,         {F::kRotated, 2},
      {F::kRotated, 4}, {F::kSign, 0},     {F::kSign, 3},     {F::kSign, 4},
      {F::kSign, 8},    {F::kSign, 16},    {F::kSign, 2, 16}, {F::kSign, 2, 32, SIKV_FP8_E4M3},
      {F::kKivi, 2},    {F::kKivi, 4, 64}, {F::kRaw}};
  const std::vector<F> values = {{F::kRotatedValue, 2},
                                 {F::kMinMax, 2},
                                 value_lines,
                                 {F::kRotatedValue, 3},
                                 {F::kRotatedValue, 4},
                                 {F::kMinMax, 4},
                                 {F::kMinMax, 8},
                                 {F::kMinMax, 16},
                                 {F::kMinMax, 2, 16},
                                 {F::kMinMax, 2, 32, SIKV_FP8_E5M2},
                                 {F::kRaw}};
  const std::vector<Shape> shapes = {{{1}, {0}, 1, 1, 64, 0, SIKV_FP16},
                                     {{3, 1}, {2, 1}, 2, 3, 96, 1, SIKV_BF16},
                                     {{31, 33, 0}, {0, 1, 5}, 1, 4, 128, 4, SIKV_FP32},
                                     {{255, 256, 257}, {1, 0, 255}, 2, 1, 128, 16, SIKV_FP16},
                                     {{1003}, {33}, 1, 8, 256, 64, SIKV_BF16},
                                     {{0, 0}, {7, 1}, 2, 3, 64, 3, SIKV_FP32},
                                     {{33, 3}, {0, 0}, 1, 4, 96, 64, SIKV_FP16},
                                     {{512, 31}, {256, 1}, 2, 8, 128, 5, SIKV_BF16},
                                     {{3000, 100}, {17, 0}, 2, 4, 128, 64, SIKV_FP16},
                                     {{300}, {1}, 1, 16, 128, 7, SIKV_FP16},
                                     {{700, 20}, {3, 3}, 1, 5, 128, 7, SIKV_BF16},
                                     {{0}, {0}, 1, 4, 128, 0, SIKV_FP16}};
  int failures = 0, cases = 0;
  double worst = 0;
  const auto judge = [&](const char* what, const Errors& e, const F& k, const F& v, size_t shape,
                         Select select) {
    ++cases;
    const double limit = 2 * e.plain + 8 * 0x1p-24, limit_lse = 2 * e.plain_lse + 8 * 0x1p-24;
    worst = std::max({worst, e.kernel / limit, e.kernel_lse / limit_lse});
    if (e.kernel <= limit && e.kernel_lse <= limit_lse) return;
    if (++failures > 40) return;
    std::printf("%s %s+%s shape %zu select %d: out %.2e (plain %.2e), lse %.2e (plain %.2e)\n",
                what, name(k).c_str(), name(v).c_str(), shape, static_cast<int>(select), e.kernel,
                e.plain, e.kernel_lse, e.plain_lse);
  };
  for (size_t s = 0; s < shapes.size(); ++s) {
    for (size_t i = 0; i < keys.size(); ++i) {
      for (size_t j = 0; j < values.size(); ++j) {
        if (values[j].lines && !keys[i].lines) continue;
        const bool fast = i < 3 && j < 3;
        if (!fast && i != (j * 3 + s) % keys.size() && j != (i + s) % values.size()) continue;
        const bool divides = shapes[s].dim % 32 == 0;
        if (!divides) continue;
        for (const Select select : {Select::kAll, Select::kNothing, Select::kOne, Select::kThird}) {
          if (!fast && select != Select::kThird && select != Select::kAll) continue;
          judge("sparse", check(sparse, shapes[s], keys[i], values[j], select, false, 7 * s + i),
                keys[i], values[j], s, select);
        }
      }
    }
    judge("dense", check(dense, shapes[s], {F::kRaw}, {F::kRaw}, Select::kAll, true, s), {F::kRaw},
          {F::kRaw}, s, Select::kAll);
  }
  for (int dim : {64, 96, 128, 256}) {
    for (const int32_t dtype : {SIKV_FP16, SIKV_BF16, SIKV_FP32}) {
      for (int group : {1, 3, 4, 8, 12}) {
        const Shape shape{{1000, 40}, {9, 0}, 1, group, dim, 0, dtype};
        judge("dense", check(dense, shape, {F::kRaw}, {F::kRaw}, Select::kAll, true, 5), {F::kRaw},
              {F::kRaw}, static_cast<size_t>(dim * 100 + group * 4 + dtype), Select::kAll);
      }
    }
  }
  std::printf(
      "check: %d of %d cases beyond twice plain fp32's error + 8 roundings; worst %.2f of it\n",
      failures, cases, worst);
  return failures;
}

// ---- times --------------------------------------------------------------------------------------

// us per launch of `launches` launches in a graph; least and median of `repeats`.
template <typename Body>
std::pair<double, double> time_graph(int launches, Body&& body) {
  cudaStream_t stream;
  ok(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "cudaStreamCreate");
  cudaGraph_t graph;
  cudaGraphExec_t exec;
  ok(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal), "capture");
  for (int i = 0; i < launches; ++i) body(i, stream);
  ok(cudaStreamEndCapture(stream, &graph), "capture");
  ok(cudaGraphInstantiate(&exec, graph, 0), "instantiate");
  cudaEvent_t from, to;
  ok(cudaEventCreate(&from), "event");
  ok(cudaEventCreate(&to), "event");
  std::vector<double> times;
  for (int i = 0; i < 9; ++i) {
    ok(cudaEventRecord(from, stream), "record");
    ok(cudaGraphLaunch(exec, stream), "launch");
    ok(cudaEventRecord(to, stream), "record");
    ok(cudaEventSynchronize(to), "graph");
    float ms = 0;
    ok(cudaEventElapsedTime(&ms, from, to), "elapsed");
    if (i >= 2) times.push_back(ms * 1e3 / launches);
  }
  std::sort(times.begin(), times.end());
  cudaGraphExecDestroy(exec);
  cudaGraphDestroy(graph);
  cudaEventDestroy(from);
  cudaEventDestroy(to);
  cudaStreamDestroy(stream);
  return {times[times.size() / 2], times.front()};
}

// TB/s read and written by large copies on a stream (as a node of a graph they run slower).
double copy_rate() {
  const size_t bytes = size_t{1} << 30;
  const Device<uint8_t> a(bytes), b(bytes);
  cudaStream_t stream;
  cudaEvent_t from, to;
  ok(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "cudaStreamCreate");
  ok(cudaEventCreate(&from), "event");
  ok(cudaEventCreate(&to), "event");
  ok(cudaMemset(a.data(), 1, bytes), "cudaMemset");
  ok(cudaDeviceSynchronize(), "cudaMemset");
  double best = 0;
  for (int i = 0; i < 5; ++i) {
    constexpr int kCopies = 4;
    ok(cudaEventRecord(from, stream), "record");
    for (int n = 0; n < kCopies; ++n) {
      ok(cudaMemcpyAsync(b.data(), a.data(), bytes, cudaMemcpyDeviceToDevice, stream), "copy");
    }
    ok(cudaEventRecord(to, stream), "record");
    ok(cudaEventSynchronize(to), "copy");
    float ms = 0;
    ok(cudaEventElapsedTime(&ms, from, to), "elapsed");
    best = std::max(best, 2e-9 * kCopies * static_cast<double>(bytes) / ms);
  }
  cudaEventDestroy(from);
  cudaEventDestroy(to);
  cudaStreamDestroy(stream);
  return best;
}

constexpr int kLaunches = 16;

void time_all(const std::string& sparse, const std::string& dense, int pinned, int tail, bool quick,
              bool dense_only) {
  const double copy = copy_rate();
  std::printf("device-to-device copy: %.2f TB/s read + written; pinned %d, tail %d\n", copy, pinned,
              tail);
  struct Size {
    int batch, context;
  };
  for (const Size size :
       std::vector<Size>{{8, 131072}, {16, 65536}, {8, 32768}, {1, 131072}, {1, 32768}}) {
    if (quick && size.batch * size.context != 8 * 131072 && size.batch * size.context != 32768) {
      continue;
    }
    if (quick && size.batch == 16) continue;
    const auto batch = static_cast<size_t>(size.batch);
    const Shape shape{std::vector<int>(batch, size.context),
                      std::vector<int>(batch, tail),
                      8,
                      4,
                      128,
                      pinned,
                      SIKV_FP16};
    const int heads = shape.rows() * shape.group;
    const Device<uint8_t> q = filled(int64_t{heads} * 128, SIKV_FP16, Fill::kNumbers, 1);
    const Device<float> out(static_cast<size_t>(heads) * 128), lse(static_cast<size_t>(heads));
    const auto args_of = [&](const Layer& layer, const sikv_selection& selection) {
      return sikv_attend_args{sizeof(sikv_attend_args),
                              shape.heads * shape.group,
                              &layer.view,
                              q.data(),
                              scale_of(shape),
                              0,
                              selection,
                              out.data(),
                              lse.data(),
                              nullptr};
    };
    const double exact_bytes = double(shape.rows()) * (pinned + tail) * 512.0;
    double dense_us = 0;
    if (!quick) {
      std::vector<std::unique_ptr<Layer>> layers;
      int64_t bytes = 0;
      while (bytes < 160 << 20) {
        layers.push_back(std::make_unique<Layer>(shape, Family{Family::kRaw}, Family{Family::kRaw},
                                                 layers.size() + 1));
        bytes += layers.back()->bytes;
      }
      Kernel kernel(dense, shape, 0);
      const Device<int32_t> counts(std::vector<int32_t>(static_cast<size_t>(shape.rows()), -1));
      const auto [median, least] = time_graph(kLaunches, [&](int i, cudaStream_t stream) {
        const Layer& layer = *layers[static_cast<size_t>(i) % layers.size()];
        kernel.run(args_of(layer, {nullptr, counts.data(), 0, 0}), stream);
      });
      dense_us = median;
      const double must = double(shape.rows()) * (size.context + tail) * 512.0;
      std::printf("%2d x %4dK  dense            %8.1f us (least %.1f)  %.2f TB/s, %.0f%% of copy\n",
                  size.batch, size.context / 1024, median, least, must / median * 1e-6,
                  must / median * 1e-4 / copy);
    }
    if (dense_only) continue;
    const std::pair<Family, Family> pipelines[] = {
        {{Family::kRotated, 3}, {Family::kRotatedValue, 2}},
        {{Family::kRotated, 3, 32, SIKV_FP16, true},
         {Family::kRotatedValue, 2, 32, SIKV_FP16, true}},
        {{Family::kSign, 2}, {Family::kMinMax, 2}}};
    for (const auto& [key, value] : pipelines) {
      std::vector<std::unique_ptr<Layer>> layers;
      int64_t bytes = 0;
      while (bytes < 160 << 20) {
        layers.push_back(std::make_unique<Layer>(shape, key, value, layers.size() + 1));
        bytes += layers.back()->bytes;
      }
      for (const int budget : {512, 2048, size.context * 75 / 1000}) {
        std::mt19937_64 random(3);
        std::vector<std::unique_ptr<Device<int32_t>>> selections;
        for (int i = 0; i < kLaunches; ++i) {
          std::vector<int32_t> slots;
          for (int row = 0; row < shape.rows(); ++row) {
            for (int s = 0; s < budget; ++s) {
              const int64_t first = int64_t{size.context} * s / budget,
                            end = int64_t{size.context} * (s + 1) / budget;
              slots.push_back(static_cast<int32_t>(
                  first + static_cast<int64_t>(random() % static_cast<uint64_t>(end - first))));
            }
          }
          selections.push_back(std::make_unique<Device<int32_t>>(slots));
        }
        const Device<int32_t> counts(
            std::vector<int32_t>(static_cast<size_t>(shape.rows()), budget));
        Kernel kernel(sparse, shape, budget);
        const auto [median, least] = time_graph(kLaunches, [&](int i, cudaStream_t stream) {
          const auto n = static_cast<size_t>(i);
          kernel.run(args_of(*layers[n % layers.size()],
                             {selections[n]->data(), counts.data(), budget, 0}),
                     stream);
        });
        // Signs of a token: one 128-byte tile; the other planes a sector each. Of a line both.
        const int sectors = key.lines ? 3 : 8;
        const double must = double(shape.rows()) * budget * 32 * sectors + exact_bytes;
        std::printf(
            "%2d x %4dK  %10s+%-11s %5d %8.1f us (least %.1f)  %.2f TB/s of sectors, %.1fx\n",
            size.batch, size.context / 1024, name(key).c_str(), name(value).c_str(), budget, median,
            least, must / median * 1e-6, dense_us / median);
      }
    }
  }
}

}  // namespace
}  // namespace sikv::bench

int main(int argc, char** argv) {
  std::string folder(argv[0]);
  folder = folder.substr(0, folder.rfind('/') + 1) + "../lib/sikv/plugins/";
  std::string sparse = folder + "libsikv-kernel-sparse_flash-cuda.so",
              dense = folder + "libsikv-kernel-dense_attention-cuda.so";
  bool check = true, time = true, quick = false, dense_only = false;
  int pinned = 64, tail = 128;
  for (int i = 1; i < argc; ++i) {
    const std::string option = argv[i];
    const auto next = [&] { return std::string(i + 1 < argc ? argv[++i] : ""); };
    if (option == "--sparse") {
      sparse = next();
    } else if (option == "--dense") {
      dense = next();
    } else if (option == "--check") {
      time = false;
    } else if (option == "--time") {
      check = false;
    } else if (option == "--quick") {
      quick = true;
    } else if (option == "--dense-only") {
      dense_only = true;
    } else if (option == "--exact") {
      std::sscanf(next().c_str(), "%d+%d", &pinned, &tail);
    } else {
      std::printf("unknown option %s\n", option.c_str());
      return 2;
    }
  }
  const int failures = check ? sikv::bench::check_all(sparse, dense) : 0;
  if (time) sikv::bench::time_all(sparse, dense, pinned, tail, quick, dense_only);
  return failures == 0 ? 0 : 1;
}
