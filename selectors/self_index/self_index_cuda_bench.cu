// Checks the cuda variant against `ref` on awkward caches of random codes, then times it.
//
//   self_index_cuda_bench [check|quick|replay|time|observe|variants|profile]... [--json FILE]
//
// Without a mode: check and time. quick and replay are parts of check, observe is one of time.
// --json: the rows of variants.
//
// A step of L layers, each on a cache of its own so that L2 is cold, is one CUDA graph; a time is
// the median over replays, divided by L. Bytes are what the step must move: codes of the index
// plane and, for the scan alone, the scores it writes.

#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <iterator>
#include <memory>
#include <numeric>
#include <ostream>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "framework/base/file.h"
#include "framework/base/random.h"
#include "kernels/common/cuda_launch.h"
#include "selectors/self_index/self_index_scan.cuh"
#include "tests/support/plugins.h"

namespace sikv::self_index {
namespace {

using testing::Choices;

void check(cudaError_t status) { cuda::check(status, "self_index_cuda_bench"); }

template <typename T>
T* device_copy(const std::vector<T>& host) {
  T* data = nullptr;
  check(cudaMalloc(&data, std::max<size_t>(host.size() * sizeof(T), 256)));
  check(cudaMemcpy(data, host.data(), host.size() * sizeof(T), cudaMemcpyHostToDevice));
  return data;
}

const Choices kLines = {{"layout", "lines"}};

struct Spec {
  const char* codec = "rot_lm";
  Choices choices = {};  // of the codec
  int head_dim = 128, heads = 8, group = 4;
  std::vector<int> lengths;  // [B] encoded
  int tail = 40, pinned = 64;
  int32_t dtype = SIKV_FP16;
  int layer = 0;
  uint64_t seed = 1;
  enum { kRandom, kConstant, kTies } codebook = kRandom;
};

// Random codes under random tables: what a selector reads, not what a codec wrote.
class Cache {
 public:
  // With `host`, planes are also in host memory.
  Cache(const Spec& spec, bool host) : spec_(spec), host_planes_(host) {
    sikv_shape shape = this->shape(1);
    codec_ = std::make_unique<CodecInstance>(
        testing::make_codec(SIKV_KEY_CODEC, spec.codec, spec.choices, shape));
    layout_ = codec_->describe();
    const int batch = static_cast<int>(spec.lengths.size()), rows = batch * spec.heads;
    const int longest = *std::max_element(spec.lengths.begin(), spec.lengths.end());
    const int max_pages = (longest + 255) / 256 + 1;
    Random random(spec.seed);
    std::vector<int32_t> order;
    for (int row = 0; row < rows; ++row) {
      encoded_.push_back(spec.lengths[row / spec.heads]);
      for (int p = 0; p * 256 < encoded_.back(); ++p) order.push_back(0);
    }
    std::iota(order.begin(), order.end(), 0);
    const int pages = static_cast<int>(order.size()) + 1;
    // Pages of a long prompt mostly lie in order; those of a check do not.
    if (host) {
      for (size_t i = order.size(); i > 1; --i) std::swap(order[i - 1], order[random.below(i)]);
    }
    page_table_.assign(static_cast<size_t>(rows) * max_pages, -1);
    size_t next = 0;
    for (int row = 0; row < rows; ++row) {
      for (int p = 0; p * 256 < encoded_[row]; ++p)
        page_table_[row * max_pages + p] = order[next++];
    }
    tail_len_.assign(batch, spec.tail);
    for (int row = 0; row < rows; ++row) {
      std::vector<int32_t> slots;
      while (static_cast<int>(slots.size()) < std::min(spec.pinned, encoded_[row])) {
        const auto slot = static_cast<int32_t>(random.below(encoded_[row]));
        if (std::find(slots.begin(), slots.end(), slot) == slots.end()) slots.push_back(slot);
      }
      std::sort(slots.begin(), slots.end());
      pinned_len_.push_back(static_cast<int32_t>(slots.size()));
      slots.resize(spec.pinned, -1);
      pinned_slots_.insert(pinned_slots_.end(), slots.begin(), slots.end());
    }
    const auto typed = [&](size_t n) {
      std::vector<uint8_t> bytes(n * sikv_dtype_bytes(spec.dtype));
      for (size_t i = 0; i < n; ++i) {
        sikv_store(bytes.data(), spec.dtype, i, static_cast<float>(random.normal()));
      }
      return bytes;
    };
    pinned_k_ = typed(static_cast<size_t>(rows) * spec.pinned * spec.head_dim);
    tail_k_ = typed(static_cast<size_t>(batch) * 256 * spec.heads * spec.head_dim);

    host_view_ = {};
    host_view_.struct_size = sizeof host_view_;
    host_view_.layer = spec.layer;
    host_view_.num_sequences = batch;
    host_view_.num_kv_heads = spec.heads;
    host_view_.head_dim = spec.head_dim;
    host_view_.dtype = spec.dtype;
    host_view_.max_pages = max_pages;
    host_view_.max_encoded_len = longest;
    host_view_.tail_capacity = 256;
    host_view_.pinned_capacity = spec.pinned;
    host_view_.key.layout = &layout_;
    host_view_.key.codec = &codec_->variant().codec();
    host_view_.key.codec_self = codec_->self();
    host_view_.value.layout = &layout_;
    device_view_ = host_view_;
    // One plane, or the lines, with a scale `stride` bytes after the other. Returns the device's.
    const auto fill = [&](std::vector<uint8_t>& data, int64_t bytes, size_t first, size_t stride) {
      const size_t total = static_cast<size_t>(bytes) * pages;
      // Enough random bytes that no two heads agree; a plane on the device repeats them.
      data.resize(host ? total : std::min<size_t>(total, 64 << 20));
      for (size_t j = 0; j + 8 <= data.size(); j += 8) {
        const uint64_t word = random.next();
        std::memcpy(&data[j], &word, 8);
      }
      for (size_t j = first; stride > 0 && j + 2 <= data.size(); j += stride) {
        sikv_store(&data[j], SIKV_FP16, 0, 0.5f + (data[j] & 63) / 64.0f);
      }
      uint8_t* device = nullptr;
      check(cudaMalloc(&device, total));
      for (size_t done = 0; done < total; done += data.size()) {
        check(cudaMemcpy(device + done, data.data(), std::min(data.size(), total - done),
                         cudaMemcpyHostToDevice));
      }
      device_memory_.push_back(device);
      return device;
    };
    const int scale = LayoutView(layout_).plane(SIKV_SCALE);
    std::vector<uint8_t>& host_lines = planes_[SIKV_MAX_PLANES];
    const int64_t line_bytes = int64_t{256} * layout_.line_bytes;
    uint8_t* const lines = line_bytes == 0 ? nullptr
                                           : fill(host_lines, line_bytes,
                                                  layout_.line_offset[scale], layout_.line_bytes);
    for (uint32_t i = 0; i < layout_.num_planes; ++i) {
      const sikv_plane& plane = layout_.planes[i];
      if (plane.organisation == SIKV_IN_LINE) {
        host_view_.key.page_stride_bytes[i] = line_bytes;
        host_view_.key.planes[i] = host_lines.data() + layout_.line_offset[i];
        device_view_.key.planes[i] = lines + layout_.line_offset[i];
      } else {
        const int64_t bytes = int64_t{256} / plane.tile_tokens * plane.bytes_per_tile;
        host_view_.key.page_stride_bytes[i] = bytes;
        device_view_.key.planes[i] = fill(planes_[i], bytes, 0, plane.role == SIKV_SCALE ? 2 : 0);
        host_view_.key.planes[i] = planes_[i].data();
      }
      device_view_.key.page_stride_bytes[i] = host_view_.key.page_stride_bytes[i];
    }
    for (uint32_t i = 0; i < layout_.num_tables; ++i) {
      std::vector<float>& table = tables_[i];
      table.resize(static_cast<size_t>(layout_.tables[i].count) * rows);
      for (size_t j = 0; j < table.size(); ++j) {
        table[j] = static_cast<float>(random.normal());
        if (layout_.tables[i].role != SIKV_CODEBOOK) continue;
        const size_t group = j % layout_.tables[i].count / 64;
        if (spec.codebook == Spec::kConstant || (spec.codebook == Spec::kTies && group != 3)) {
          table[j] = 0.0f;
        }
      }
      host_view_.key.tables[i] = table.data();
      device_view_.key.tables[i] = keep(device_copy(table));
    }
    const auto both = [&](auto sikv_cache_view::*field, auto& host_data) {
      host_view_.*field = host_data.data();
      device_view_.*field = keep(device_copy(host_data));
    };
    both(&sikv_cache_view::page_table, page_table_);
    both(&sikv_cache_view::encoded_len, encoded_);
    both(&sikv_cache_view::tail_len, tail_len_);
    both(&sikv_cache_view::pinned_slots, pinned_slots_);
    both(&sikv_cache_view::pinned_len, pinned_len_);
    both(&sikv_cache_view::pinned_k, pinned_k_);
    both(&sikv_cache_view::tail_k, tail_k_);
    if (!host) {
      for (auto& plane : planes_) plane = {};
    }
  }
  ~Cache() {
    for (void* data : device_memory_) cudaFree(data);
  }
  Cache(const Cache&) = delete;
  Cache& operator=(const Cache&) = delete;

  sikv_shape shape(int layers) const {
    sikv_shape shape = testing::make_shape(spec_.head_dim, spec_.dtype, spec_.heads, spec_.group);
    shape.num_layers = layers;
    shape.max_sequences = static_cast<int32_t>(spec_.lengths.size());
    shape.max_tokens = *std::max_element(spec_.lengths.begin(), spec_.lengths.end()) + 256;
    return shape;
  }
  const sikv_cache_view& host() const { return host_view_; }
  const sikv_cache_view& device() const { return device_view_; }
  int rows() const { return host_view_.num_sequences * host_view_.num_kv_heads; }
  int64_t tokens() const { return std::accumulate(encoded_.begin(), encoded_.end(), int64_t{0}); }
  std::vector<uint8_t> queries(uint64_t seed) const {
    Random random(seed);
    const size_t n = spec_.lengths.size() * spec_.heads * spec_.group * spec_.head_dim;
    std::vector<uint8_t> bytes(n * sikv_dtype_bytes(spec_.dtype));
    for (size_t i = 0; i < n; ++i) {
      sikv_store(bytes.data(), spec_.dtype, i, static_cast<float>(random.normal()));
    }
    return bytes;
  }

 private:
  template <typename T>
  T* keep(T* data) {
    device_memory_.push_back(data);
    return data;
  }

  Spec spec_;
  bool host_planes_;
  std::unique_ptr<CodecInstance> codec_;
  sikv_layout layout_{};
  std::vector<int32_t> page_table_, encoded_, tail_len_, pinned_slots_, pinned_len_;
  std::vector<uint8_t> planes_[SIKV_MAX_PLANES + 1], pinned_k_, tail_k_;  // the last: lines
  std::vector<float> tables_[SIKV_MAX_TABLES];
  sikv_cache_view host_view_{}, device_view_{};
  std::vector<void*> device_memory_;
};

// One instance on the GPU, with its selection.
class GpuSelector {
 public:
  GpuSelector(const Choices& choices, const sikv_shape& shape, const sikv_layout& layout)
      : selector_(testing::make_instance<SelectorInstance>(
            *testing::find_gpu_variant(SIKV_SELECTOR, "self_index"), choices, shape,
            testing::gpu())) {
    const std::string refusal = selector_.refusal(layout);
    if (!refusal.empty()) throw Refused(refusal);
    plan_ = selector_.plan();
    rows_ = shape.max_sequences * shape.num_kv_heads;
    check(cudaMalloc(&workspace_, std::max<size_t>(plan_.workspace_bytes, 256)));
    check(cudaMemset(workspace_, 0xd7, std::max<size_t>(plan_.workspace_bytes, 256)));
    check(cudaMalloc(&slots_, slot_bytes()));
    check(cudaMalloc(&counts_, sizeof(int32_t) * rows_));
  }
  ~GpuSelector() {
    for (void* data : {static_cast<void*>(slots_), static_cast<void*>(counts_), workspace_}) {
      cudaFree(data);
    }
  }
  GpuSelector(const GpuSelector&) = delete;
  GpuSelector& operator=(const GpuSelector&) = delete;

  SelectorInstance& selector() { return selector_; }
  void run(const sikv_cache_view& view, int query_heads, const void* q, cudaStream_t stream) {
    selector_.run({sizeof(sikv_select_args),
                   query_heads,
                   &view,
                   q,
                   1.0f / std::sqrt(static_cast<float>(view.head_dim)),
                   0,
                   {slots_, counts_, plan_.capacity, 0},
                   nullptr},
                  workspace_, stream);
  }
  void poison() {
    check(cudaMemset(slots_, 0xd7, slot_bytes()));
    check(cudaMemset(counts_, 0xd7, sizeof(int32_t) * rows_));
  }
  std::vector<std::vector<int32_t>> selection() const {
    check(cudaDeviceSynchronize());
    std::vector<int32_t> slots(slot_bytes() / 4), counts(rows_);
    check(cudaMemcpy(slots.data(), slots_, slot_bytes(), cudaMemcpyDeviceToHost));
    check(cudaMemcpy(counts.data(), counts_, counts.size() * 4, cudaMemcpyDeviceToHost));
    std::vector<std::vector<int32_t>> out;
    for (int row = 0; row < rows_; ++row) {
      const auto begin = slots.begin() + int64_t{row} * plan_.capacity;
      out.emplace_back(begin, begin + std::clamp(counts[row], 0, plan_.capacity));
    }
    return out;
  }

 private:
  size_t slot_bytes() const { return (size_t{4} * rows_ * plan_.capacity + 255) / 256 * 256; }
  SelectorInstance selector_;
  SelectorInstance::Plan plan_{};
  int rows_ = 0;
  void* workspace_ = nullptr;
  int32_t *slots_ = nullptr, *counts_ = nullptr;
};

// ---- check --------------------------------------------------------------------------------------

// Steps of the reference and of the GPU on one cache; false and a line if they differ. Scans must
// agree exactly; of reranked tokens `slack` may differ where probabilities agree to fp32 rounding.
bool compare(const char* name, const Spec& spec, const Choices& choices, int slack, int steps = 2,
             int observed = 0) {
  const Cache cache(spec, true);
  const sikv_shape shape = cache.shape(1);
  auto ref = testing::make_instance<SelectorInstance>(
      testing::find_variant(SIKV_SELECTOR, "self_index", "ref"), choices, shape);
  if (!ref.refusal(*cache.host().key.layout).empty()) return true;
  const SelectorInstance::Plan plan = ref.plan();
  std::vector<uint64_t> workspace(plan.workspace_bytes / 8 + 64);
  auto* aligned =
      reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(workspace.data()) + 63) / 64 * 64);
  GpuSelector gpu(choices, shape, *cache.host().key.layout);
  for (int b = 0; b < shape.max_sequences; ++b) {
    ref.begin_sequence(b);
    gpu.selector().begin_sequence(b);
  }
  // A prompt of the encoded tokens and the tail, whose exact keys are random too.
  if (observed > 0) {
    Random random(spec.seed + 77);
    std::vector<int32_t> lens, firsts;
    int32_t total = 0;
    for (int length : spec.lengths) {
      firsts.push_back(total);
      lens.push_back(length + spec.tail);
      total += lens.back();
    }
    const auto normals = [&](size_t n) {
      std::vector<uint8_t> out(n * sikv_dtype_bytes(spec.dtype));
      for (size_t i = 0; i < n; ++i) {
        sikv_store(out.data(), spec.dtype, i, static_cast<float>(random.normal()));
      }
      return out;
    };
    const int64_t stride = int64_t{spec.heads} * spec.head_dim;
    const auto keys = normals(static_cast<size_t>(total) * stride);
    const auto queries = normals(lens.size() * observed * shape.num_query_heads * spec.head_dim);
    sikv_rows rows{keys.data(),   spec.dtype,  *std::max_element(lens.begin(), lens.end()),
                   firsts.data(), lens.data(), stride,
                   spec.head_dim};
    ref.observe({sizeof(sikv_observe_args), observed, &cache.host(), rows, rows, queries.data(),
                 lens.data(), nullptr, 0, 0},
                aligned, nullptr);
    void* device[] = {device_copy(keys), device_copy(firsts), device_copy(lens),
                      device_copy(queries)};
    rows.data = device[0];
    rows.first = static_cast<const int32_t*>(device[1]);
    rows.count = static_cast<const int32_t*>(device[2]);
    gpu.selector().observe({sizeof(sikv_observe_args), observed, &cache.device(), rows, rows,
                            device[3], rows.count, nullptr, 0, 0},
                           nullptr, nullptr);
    check(cudaDeviceSynchronize());
    for (void* data : device) check(cudaFree(data));
  }
  const auto fail = [&](const std::string& what) {
    std::printf("FAILED %s %s: %s\n", name, testing::describe("", choices).c_str(), what.c_str());
    return false;
  };
  for (int step = 0; step < steps; ++step) {
    const std::vector<uint8_t> q = cache.queries(1000 + step);
    std::vector<int32_t> slots(static_cast<size_t>(cache.rows()) * plan.capacity + 1),
        counts(cache.rows());
    ref.begin_step(step);
    ref.run({sizeof(sikv_select_args),
             shape.num_query_heads,
             &cache.host(),
             q.data(),
             1.0f / std::sqrt(static_cast<float>(spec.head_dim)),
             0,
             {slots.data(), counts.data(), plan.capacity, 0},
             nullptr},
            aligned, nullptr);
    uint8_t* device_q = device_copy(q);
    gpu.poison();
    gpu.selector().begin_step(step);
    gpu.run(cache.device(), shape.num_query_heads, device_q, nullptr);
    const auto first = gpu.selection();
    check(cudaFree(device_q));
    for (int row = 0; row < cache.rows(); ++row) {
      const auto begin = slots.begin() + int64_t{row} * plan.capacity;
      const std::vector<int32_t> want(begin, begin + counts[row]);
      const std::vector<int32_t>& got = first[row];
      const std::string where = "step " + std::to_string(step) + " row " + std::to_string(row);
      if (got.size() != want.size()) {
        return fail(where + ": " + std::to_string(got.size()) + " slots, not " +
                    std::to_string(want.size()));
      }
      if (!std::is_sorted(got.begin(), got.end())) return fail(where + ": not ascending");
      std::vector<int32_t> common;
      std::set_intersection(got.begin(), got.end(), want.begin(), want.end(),
                            std::back_inserter(common));
      if (common.size() + slack < want.size()) {
        return fail(where + ": " + std::to_string(want.size() - common.size()) + " of " +
                    std::to_string(want.size()) + " slots differ");
      }
    }
  }
  const auto value = [](const SelectorInstance& selector, std::string_view name) {
    for (const sikv_counter& counter : selector.counters()) {
      if (std::string_view(counter.name) == name) return counter.value;
    }
    return -1.0;
  };
  for (const char* name : {"rows", "scans", "runs", "scan_bytes"}) {
    const double want = value(ref, name), got = value(gpu.selector(), name);
    if (got != want) {
      return fail(std::to_string(got) + " " + name + ", not " + std::to_string(want));
    }
  }
  return true;
}

// What is learned from a prompt's last queries: periods as the reference chooses them.
template <typename Test>
void check_replays(Test&& test) {
  const auto replay = [&](const Spec& prompt, const char* tolerance, const char* window,
                          int observed, Choices more = {}) {
    Choices choices = {{"budget", "64"},
                       {"rerank", "2"},
                       {"schedule", "auto"},
                       {"tolerance", tolerance},
                       {"window", window}};
    choices.insert(choices.end(), more.begin(), more.end());
    test("auto", prompt, choices, 1, 9, observed);
  };
  for (int dim : {64, 96, 128, 256}) {
    for (int32_t dtype : {SIKV_FP16, SIKV_BF16, SIKV_FP32}) {
      const Spec prompt{
          .head_dim = dim, .heads = 2, .group = 3, .lengths = {2560, 1024}, .dtype = dtype};
      for (const char* tolerance : {"0", "0.02", "0.05", "1"}) replay(prompt, tolerance, "12", 16);
    }
    test("refresh", Spec{.head_dim = dim, .heads = 2, .group = 3, .lengths = {2560, 1024}},
         {{"budget", "64"},
          {"rerank", "2"},
          {"scan_every", "8"},
          {"refresh_cosine", "0.05"},
          {"window", "12"}},
         1, 9, 16);
  }
  // Whole passes, several of them, and tokens of more blocks than one.
  const Spec prompt{.heads = 2, .lengths = {3000, 700}};
  for (const char* tolerance : {"0.01", "0.03"}) {
    for (const char* window : {"48", "47", "128"}) {
      replay(prompt, tolerance, window, 128, {{"tables", "6bit"}});
    }
    replay(prompt, tolerance, "48", 48, {{"group", "max_over_heads"}});
  }
  Spec heads{.heads = 1, .group = 16, .lengths = {900}};
  replay(heads, "0.02", "20", 48);
  heads.group = 1;
  replay(heads, "0.02", "20", 48);
  // A scan of several blocks a query, and more rows than one pass takes.
  replay({.heads = 1, .group = 1, .lengths = {70000}}, "0.02", "10", 10, {{"tables", "6bit"}});
  replay({.head_dim = 64, .heads = 8, .group = 1, .lengths = std::vector<int>(70, 512)}, "0.02",
         "9", 9);
}

// quick: few small cases, for the tools that watch every access; replay: those of check_replays.
int run_checks(std::string_view mode) {
  const bool quick = mode == "quick";
  int failed = 0, done = 0;
  const auto test = [&](const char* name, const Spec& spec, const Choices& choices, int slack = 0,
                        int steps = 2, int observed = 0) {
    ++done;
    failed += compare(name, spec, choices, slack, steps, observed) ? 0 : 1;
  };
  const auto end = [&] {
    std::printf("%s: %d of %d cases equal ref\n", std::string(mode).c_str(), done - failed, done);
    return failed;
  };
  if (mode == "replay") {
    check_replays(test);
    return end();
  }
  const std::vector<int> ragged = {1, 31, 257, 3000, 5000};
  const std::pair<const char*, Choices> codecs[] = {
      {"rot_lm", {}}, {"rot_lm", kLines}, {"sign_vq", {}}};
  for (const auto& [codec, codec_choices] : codecs) {
    for (int dim : {64, 96, 128, 256}) {
      for (int group : {1, 3, 4}) {
        if (quick && (dim != 128 || group == 1)) continue;
        Spec spec{.codec = codec,
                  .choices = codec_choices,
                  .head_dim = dim,
                  .heads = 2,
                  .group = group,
                  .lengths = ragged};
        for (const char* budget : {"0", "1", "96", "0.075", "1000000"}) {
          test("ragged", spec, {{"budget", budget}, {"tables", "6bit"}});
        }
        test("exact", spec, {{"budget", "96"}});
        test("max", spec, {{"budget", "96"}, {"tables", "6bit"}, {"group", "max_over_heads"}});
        test("norm", spec, {{"budget", "96"}, {"weighting", "norm"}, {"group", "max_over_heads"}});
        test("rerank", spec, {{"budget", "96"}, {"tables", "6bit"}, {"rerank", "4"}}, 1);
        test("pool", spec,
             {{"budget", "96"},
              {"tables", "6bit"},
              {"rerank", "4"},
              {"scan_every", "4"},
              {"stagger", "true"},
              {"refresh_cosine", "0.1"}},
             1, 6);
      }
    }
  }
  Spec spec{.heads = 2, .lengths = {70000, 20000}};
  if (quick) return end();
  for (auto codebook : {Spec::kRandom, Spec::kConstant, Spec::kTies}) {
    spec.codebook = codebook;
    for (const char* budget : {"1", "2048", "0.1"}) {
      test("long", spec, {{"budget", budget}, {"tables", "6bit"}});
      test("long exact", spec, {{"budget", budget}});
    }
    test("long rerank", spec, {{"budget", "2048"}, {"tables", "6bit"}, {"rerank", "4"}}, 2);
    test("long rerank", spec, {{"budget", "0.1"}, {"tables", "6bit"}, {"rerank", "4"}}, 2);
  }
  // So many candidates that rows due for a scan get more blocks than the others.
  const Spec many{.heads = 4, .lengths = {70000, 66000, 70000}};
  for (const char* refresh : {"0", "0.05"}) {
    test("many", many,
         {{"budget", "2048"},
          {"tables", "6bit"},
          {"rerank", "4"},
          {"scan_every", "4"},
          {"stagger", "true"},
          {"refresh_cosine", refresh}},
         2, 6);
  }
  spec.group = 16;
  test("16 heads", spec, {{"budget", "512"}, {"tables", "6bit"}, {"rerank", "4"}}, 2);
  spec.pinned = 0;
  test("no pinned", spec, {{"budget", "512"}, {"tables", "6bit"}});
  check_replays(test);
  return end();
}

// ---- time ---------------------------------------------------------------------------------------

// Median time of `graph` in microseconds over replays.
float time_graph(cudaGraphExec_t graph, cudaStream_t stream, int replays,
                 std::vector<float>* all = nullptr) {
  std::vector<cudaEvent_t> events(replays + 1);
  for (cudaEvent_t& event : events) check(cudaEventCreate(&event));
  for (int i = 0; i < 3; ++i) check(cudaGraphLaunch(graph, stream));
  check(cudaEventRecord(events[0], stream));
  for (int i = 0; i < replays; ++i) {
    check(cudaGraphLaunch(graph, stream));
    check(cudaEventRecord(events[i + 1], stream));
  }
  check(cudaStreamSynchronize(stream));
  std::vector<float> us;
  for (int i = 0; i < replays; ++i) {
    float ms = 0;
    check(cudaEventElapsedTime(&ms, events[i], events[i + 1]));
    us.push_back(ms * 1000);
  }
  for (cudaEvent_t& event : events) cudaEventDestroy(event);
  if (all != nullptr) *all = us;
  std::sort(us.begin(), us.end());
  return us[us.size() / 2];
}

template <typename Body>
cudaGraphExec_t capture(cudaStream_t stream, Body&& body) {
  cudaGraph_t graph = nullptr;
  cudaGraphExec_t exec = nullptr;
  check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
  body();
  check(cudaStreamEndCapture(stream, &graph));
  check(cudaGraphInstantiate(&exec, graph, 0));
  check(cudaGraphDestroy(graph));
  return exec;
}

template <typename Body>
float time_steps(cudaStream_t stream, int layers, Body&& body, int replays = 24) {
  cudaGraphExec_t graph = capture(stream, [&] {
    for (int l = 0; l < layers; ++l) body(l);
  });
  const float us = time_graph(graph, stream, replays) / layers;
  check(cudaGraphExecDestroy(graph));
  return us;
}

__global__ void copy_kernel(uint4* to, const uint4* from, int64_t n) {
  const int64_t stride = int64_t{gridDim.x} * blockDim.x;
  int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  for (; i + 3 * stride < n; i += 4 * stride) {
    const uint4 a = from[i], b = from[i + stride], c = from[i + 2 * stride],
                d = from[i + 3 * stride];
    to[i] = a, to[i + stride] = b, to[i + 2 * stride] = c, to[i + 3 * stride] = d;
  }
  for (; i < n; i += stride) to[i] = from[i];
}

// Bytes read and written per second by a copy of 1 GB, in TB/s.
double copy_bandwidth(cudaStream_t stream) {
  const size_t bytes = size_t{1} << 30;
  uint4 *from = nullptr, *to = nullptr;
  check(cudaMalloc(&from, bytes));
  check(cudaMalloc(&to, bytes));
  check(cudaMemset(from, 0x3c, bytes));
  const float us = time_steps(stream, 1, [&](int) {
    copy_kernel<<<132 * 8, 512, 0, stream>>>(to, from, static_cast<int64_t>(bytes / 16));
  });
  check(cudaFree(from));
  check(cudaFree(to));
  return 2.0 * bytes / us * 1e-6;
}

struct Size {
  int batch, context;
};
constexpr Size kSizes[] = {{8, 131072}, {16, 65536}, {8, 32768}, {1, 131072}, {1, 32768}};

struct Timed {
  std::vector<std::unique_ptr<Cache>> caches;
  uint8_t* q;
  int heads;
  explicit Timed(Size size, const Choices& choices = {}) {
    Spec spec{.choices = choices, .lengths = std::vector<int>(size.batch, size.context)};
    const double megabytes = size.batch * 8.0 * size.context * 16 / 1e6;
    const int layers = std::clamp(static_cast<int>(std::ceil(200 / megabytes)), 2, 24);
    for (int l = 0; l < layers; ++l) {
      spec.layer = l;
      spec.seed = 7 + l;
      caches.push_back(std::make_unique<Cache>(spec, false));
    }
    q = device_copy(caches[0]->queries(3));
    heads = spec.heads * spec.group;
  }
  ~Timed() { cudaFree(q); }
  int layers() const { return static_cast<int>(caches.size()); }
};

// Mean time of a step in which a row is due when its query has turned, as two of five random ones
// have from another. `share` of the rows was scanned.
float time_refresh(const Timed& timed, const char* budget, cudaStream_t stream, float* share) {
  constexpr int kQueries = 8;
  GpuSelector gpu({{"budget", budget},
                   {"tables", "6bit"},
                   {"rerank", "4"},
                   {"scan_every", "64"},
                   {"refresh_cosine", "-0.0224"}},
                  timed.caches[0]->shape(timed.layers()), *timed.caches[0]->host().key.layout);
  std::vector<cudaGraphExec_t> graphs;
  std::vector<uint8_t*> queries;
  for (int i = 0; i < kQueries; ++i) {
    queries.push_back(device_copy(timed.caches[0]->queries(900 + i)));
    graphs.push_back(capture(stream, [&] {
      for (int l = 0; l < timed.layers(); ++l)
        gpu.run(timed.caches[l]->device(), timed.heads, queries.back(), stream);
    }));
  }
  const auto counter = [&](std::string_view name) {
    for (const sikv_counter& c : gpu.selector().counters()) {
      if (std::string_view(c.name) == name) return c.value;
    }
    return 0.0;
  };
  std::vector<cudaEvent_t> events(2);
  for (cudaEvent_t& event : events) check(cudaEventCreate(&event));
  constexpr int kRounds = 4;
  for (int i = 0; i < kQueries; ++i) check(cudaGraphLaunch(graphs[i], stream));
  check(cudaStreamSynchronize(stream));
  const double rows = counter("rows"), scans = counter("scans");
  check(cudaEventRecord(events[0], stream));
  for (int i = 0; i < kRounds * kQueries; ++i) {
    check(cudaGraphLaunch(graphs[i % kQueries], stream));
  }
  check(cudaEventRecord(events[1], stream));
  check(cudaStreamSynchronize(stream));
  *share = static_cast<float>((counter("scans") - scans) / (counter("rows") - rows));
  float ms = 0;
  check(cudaEventElapsedTime(&ms, events[0], events[1]));
  for (cudaEvent_t event : events) check(cudaEventDestroy(event));
  for (cudaGraphExec_t graph : graphs) check(cudaGraphExecDestroy(graph));
  for (uint8_t* q : queries) check(cudaFree(q));
  return ms * 1000 / (kRounds * kQueries * timed.layers());
}

std::vector<std::pair<Size, bool>> sizes_and_layouts() {
  std::vector<std::pair<Size, bool>> all;
  for (const Size size : kSizes) {
    for (const bool lines : {false, true}) all.emplace_back(size, lines);
  }
  return all;
}

// What a layer's prompt of one sequence costs with schedule: auto.
void run_replay_times(cudaStream_t stream) {
  constexpr int kQueries = 48;
  for (int context : {32768, 131072}) {
    const Spec spec{.lengths = {context}};
    const Cache cache(spec, false);
    GpuSelector gpu({{"budget", "2048"}, {"tables", "6bit"}, {"rerank", "4"}, {"schedule", "auto"}},
                    cache.shape(1), *cache.host().key.layout);
    gpu.selector().begin_sequence(0);
    const int32_t length = context + spec.tail;
    const int64_t stride = int64_t{spec.heads} * spec.head_dim;
    // Numbers of 64K elements, over and over: the time does not hang on them.
    Random random(5);
    std::vector<uint16_t> numbers(1 << 16);
    for (size_t i = 0; i < numbers.size(); ++i) {
      sikv_store(numbers.data(), spec.dtype, i, static_cast<float>(random.normal()));
    }
    std::vector<uint16_t> keys(static_cast<size_t>(length * stride));
    std::vector<uint16_t> queries(static_cast<size_t>(kQueries * spec.group * stride));
    for (std::vector<uint16_t>* all : {&keys, &queries}) {
      for (size_t i = 0; i < all->size(); ++i) (*all)[i] = numbers[(i + i / 65521) % 65536];
    }
    void* device[] = {device_copy(keys), device_copy(std::vector<int32_t>{0}),
                      device_copy(std::vector<int32_t>{length}), device_copy(queries)};
    const auto* count = static_cast<const int32_t*>(device[2]);
    const sikv_rows rows{
        device[0], spec.dtype, length,       static_cast<const int32_t*>(device[1]),
        count,     stride,     spec.head_dim};
    std::vector<float> us;
    cudaEvent_t from, to;
    check(cudaEventCreate(&from));
    check(cudaEventCreate(&to));
    for (int i = 0; i < 9; ++i) {
      check(cudaEventRecord(from, stream));
      gpu.selector().observe({sizeof(sikv_observe_args), kQueries, &cache.device(), rows, rows,
                              device[3], count, nullptr, 0, 0},
                             nullptr, stream);
      check(cudaEventRecord(to, stream));
      check(cudaStreamSynchronize(stream));
      float ms = 0;
      check(cudaEventElapsedTime(&ms, from, to));
      us.push_back(ms * 1000);
    }
    std::sort(us.begin(), us.end());
    std::printf("1 x %3dK schedule auto: %.0f us a layer for %d queries\n", context / 1024,
                us[us.size() / 2], kQueries);
    check(cudaEventDestroy(from));
    check(cudaEventDestroy(to));
    for (void* data : device) check(cudaFree(data));
  }
}

void run_times(cudaStream_t stream) {
  const double copy = copy_bandwidth(stream);
  std::printf("copy %.3f TB/s\n", copy);
  std::printf("%9s %-6s %-8s %8s  %8s %6s  %8s | %9s %9s %9s\n", "B x T", "layout", "budget",
              "select", "TB/s", "share", "rerank 4", "pool mean", "max", "refresh");
  for (const auto& [size, lines] : sizes_and_layouts()) {
    Timed timed(size, lines ? kLines : Choices{});
    for (const char* budget : {"2048", "512", "0.075"}) {
      const auto time = [&](Choices choices) {
        choices.push_back({"budget", budget});
        choices.push_back({"tables", "6bit"});
        GpuSelector gpu(choices, timed.caches[0]->shape(timed.layers()),
                        *timed.caches[0]->host().key.layout);
        return time_steps(stream, timed.layers(), [&](int l) {
          gpu.run(timed.caches[l]->device(), timed.heads, timed.q, stream);
        });
      };
      const float select = time({}), rerank = time({{"rerank", "4"}});
      // Every layer is at the same phase unless staggered; a replay is one step.
      std::vector<float> pool;
      {
        GpuSelector gpu({{"budget", budget},
                         {"tables", "6bit"},
                         {"rerank", "4"},
                         {"scan_every", "4"},
                         {"stagger", "true"}},
                        timed.caches[0]->shape(timed.layers()),
                        *timed.caches[0]->host().key.layout);
        cudaGraphExec_t graph = capture(stream, [&] {
          for (int l = 0; l < timed.layers(); ++l)
            gpu.run(timed.caches[l]->device(), timed.heads, timed.q, stream);
        });
        time_graph(graph, stream, 24, &pool);
        check(cudaGraphExecDestroy(graph));
      }
      const float mean =
          std::accumulate(pool.begin(), pool.end(), 0.0f) / pool.size() / timed.layers();
      const float most = *std::max_element(pool.begin(), pool.end()) / timed.layers();
      float share = 0;
      const float refresh = time_refresh(timed, budget, stream, &share);
      const double bytes = timed.caches[0]->tokens() * 16.0;
      std::printf("%3d x %3dK %-6s %-8s %8.1f  %8.3f %5.0f%%  %8.1f | %9.1f %9.1f %9.1f (%.2f)\n",
                  size.batch, size.context / 1024, lines ? "lines" : "planes", budget, select,
                  bytes / select * 1e-6, 100 * bytes / select * 1e-6 / copy, rerank, mean, most,
                  refresh, share);
      std::fflush(stdout);
    }
  }
}

// One step after the other without a graph, for profilers.
void run_profile(cudaStream_t stream) {
  for (const auto& [size, lines] : sizes_and_layouts()) {
    if (size.context != 131072) continue;
    Timed timed(size, lines ? kLines : Choices{});
    for (const Choices& extra : {Choices{}, Choices{{"rerank", "4"}},
                                 Choices{{"rerank", "4"}, {"scan_every", "4"}, {"stagger", "true"}},
                                 Choices{{"rerank", "4"}, {"scan_every", "64"}}}) {
      Choices choices = extra;
      choices.push_back({"budget", "2048"});
      choices.push_back({"tables", "6bit"});
      std::printf("%d x %dK %s %s\n", size.batch, size.context / 1024, lines ? "lines" : "planes",
                  testing::describe("self_index", choices).c_str());
      GpuSelector gpu(choices, timed.caches[0]->shape(timed.layers()),
                      *timed.caches[0]->host().key.layout);
      for (int i = 0; i < 3 * std::min(timed.layers(), 3); ++i) {
        gpu.run(timed.caches[i % std::min(timed.layers(), 3)]->device(), timed.heads, timed.q,
                stream);
        check(cudaStreamSynchronize(stream));
      }
    }
  }
}

// ---- variants of the scan -----------------------------------------------------------------------

// Tables, scores and histogram; the scores go to memory, as separate stages would need them.
template <int kThreads, bool kStore>
__global__ void __launch_bounds__(kThreads, 1024 / kThreads)
    scan_alone(const __grid_constant__ ScanArgs args, uint16_t* scores) {
  constexpr int D = 128;
  extern __shared__ uint4 dynamic[];
  auto* tables = reinterpret_cast<uint8_t*>(dynamic);
  auto* histogram = reinterpret_cast<uint32_t*>(tables + 4 * D);
  auto* keys = reinterpret_cast<uint16_t*>(histogram + ScanShape<D>::kBins);
  const int row = blockIdx.y, first = blockIdx.x * args.chunk;
  const Chunk chunk{row, first, min(args.chunk, args.view.encoded_len[row] - first)};
  for (int i = threadIdx.x; i < 4 * D; i += kThreads) tables[i] = i * 2654435761u >> 26;
  for (int i = threadIdx.x; i < ScanShape<D>::kBins; i += kThreads) histogram[i] = 0;
  __syncthreads();
  scan_integer<D, kThreads>(args, chunk, tables, keys, histogram);
  __syncthreads();
  if (kStore) {
    const auto* from = reinterpret_cast<const uint4*>(keys);
    auto* to = reinterpret_cast<uint4*>(scores + int64_t{row} * args.view.max_encoded_len + first);
    for (int i = threadIdx.x; i < chunk.tokens / 8; i += kThreads) to[i] = from[i];
  } else if (histogram[0] == 0xffffffffu) {
    scores[0] = keys[0];
  }
}

struct ScanRow {
  Size size;
  int threads, chunk;
  unsigned blocks;
  float us;       // scores written
  int64_t bytes;  // codes, and scores of two bytes
  double tb_per_s() const { return bytes / us * 1e-6; }
};

template <int kThreads>
void time_variant(const Timed& timed, Size size, cudaStream_t stream, double copy,
                  std::vector<ScanRow>& rows_timed) {
  const int rows = timed.caches[0]->rows();
  TeamState* teams = nullptr;
  int32_t *slots = nullptr, *found = nullptr;
  uint16_t* scores = nullptr;
  check(cudaMalloc(&teams, sizeof(TeamState) * rows));
  check(cudaMemset(teams, 0, sizeof(TeamState) * rows));
  check(cudaMalloc(&slots, int64_t{rows} * 2048 * 4));
  check(cudaMalloc(&found, rows * 4));
  check(cudaMalloc(&scores, int64_t{rows} * size.context * 2));
  const auto args_of = [&](int l, int chunk) {
    ScanArgs args{};
    args.view = timed.caches[l]->device();
    args.step.budget_count = 2048;
    args.step.rerank = 1;
    args.step.six_bit = args.step.rotated = true;
    args.step.q = timed.q;
    args.step.q_stride = int64_t{timed.heads} * 128;
    args.step.group = 4;
    args.step.teams = teams;
    args.index = cuda::plane_of(timed.caches[l]->host().key, SIKV_INDEX_CODE);
    args.index.base = cuda::plane_of(timed.caches[l]->device().key, SIKV_INDEX_CODE).base;
    args.codebook = cuda::table_of(timed.caches[l]->device().key, SIKV_CODEBOOK);
    args.chunk = chunk;
    args.pass = {0, rows, 1};
    args.slots = slots;
    args.capacity = 2048;
    args.found = found;
    return args;
  };
  const int resident = 132 * 1024 / kThreads;
  const int64_t tokens = int64_t{size.context} * rows;
  for (int waves : {1, 2, 4}) {
    const int chunk = static_cast<int>((tokens / (resident * waves) + 255) / 256 * 256);
    const auto bytes = static_cast<size_t>(scan_shared_bytes<128>(true, 1, chunk));
    if (bytes > 220 * 1024u / (1024 / kThreads)) continue;
    const dim3 grid((size.context + chunk - 1) / chunk, rows);
    const auto time = [&](auto kernel, auto&&... rest) {
      check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 static_cast<int>(bytes)));
      return time_steps(stream, timed.layers(), [&](int l) {
        kernel<<<grid, kThreads, bytes, stream>>>(args_of(l, chunk), rest...);
        check(cudaGetLastError());
      });
    };
    const float no_store = time(scan_alone<kThreads, false>, scores);
    const float store = time(scan_alone<kThreads, true>, scores);
    const float select = time(scan_select<128, kThreads, true>);
    const ScanRow& row = rows_timed.emplace_back(
        ScanRow{size, kThreads, chunk, grid.x * grid.y, store, tokens * 18});
    std::printf(
        "%3d x %3dK threads %4d chunk %6d blocks %5d: scan %6.1f us, with scores written %6.1f us "
        "(%.3f TB/s, %.0f%% of copy), scan + select %6.1f us\n",
        size.batch, size.context / 1024, kThreads, chunk, row.blocks, no_store, store,
        row.tb_per_s(), 100 * row.tb_per_s() / copy, select);
    std::fflush(stdout);
  }
  for (void* data : {static_cast<void*>(teams), static_cast<void*>(slots),
                     static_cast<void*>(found), static_cast<void*>(scores)}) {
    check(cudaFree(data));
  }
}

void write_scans(const std::filesystem::path& file, double copy, const std::vector<ScanRow>& rows) {
  write_atomically(file, [&](std::ostream& out) {
    out << "{\n \"copy_tb_per_s\": " << copy << ",\n \"rows\": [";
    const char* separator = "\n";
    for (const ScanRow& row : rows) {
      out << std::exchange(separator, ",\n") << "  {\"batch\": " << row.size.batch
          << ", \"context\": " << row.size.context << ", \"threads\": " << row.threads
          << ", \"chunk\": " << row.chunk << ", \"blocks\": " << row.blocks
          << ", \"median_us\": " << row.us << ", \"bytes\": " << row.bytes
          << ", \"tb_per_s\": " << row.tb_per_s() << "}";
    }
    out << "\n ]\n}\n";
  });
}

void run_variants(cudaStream_t stream, const std::filesystem::path& json) {
  const double copy = copy_bandwidth(stream);
  std::vector<ScanRow> rows;
  for (const Size size : kSizes) {
    const Timed timed(size);
    time_variant<256>(timed, size, stream, copy, rows);
    time_variant<512>(timed, size, stream, copy, rows);
    time_variant<1024>(timed, size, stream, copy, rows);
  }
  if (!json.empty()) write_scans(json, copy, rows);
}

}  // namespace
}  // namespace sikv::self_index

int main(int argc, char** argv) {
  using namespace sikv::self_index;
  constexpr std::string_view kModes[] = {"check",   "quick",    "replay", "time",
                                         "observe", "variants", "profile"};
  std::vector<std::string_view> modes;
  std::filesystem::path json;
  for (int i = 1; i < argc; ++i) {
    const std::string_view argument = argv[i];
    if (argument == "--json" && i + 1 < argc) {
      json = argv[++i];
    } else if (std::find(std::begin(kModes), std::end(kModes), argument) != std::end(kModes)) {
      modes.push_back(argument);
    } else {
      std::fprintf(stderr,
                   "self_index_cuda_bench: '%s' is neither a mode nor --json FILE: choose among "
                   "check, quick, replay, time, observe, variants, profile\n",
                   argv[i]);
      return 2;
    }
  }
  if (!json.empty() && std::find(modes.begin(), modes.end(), "variants") == modes.end()) {
    std::fprintf(stderr,
                 "self_index_cuda_bench: --json takes the rows of the mode variants: add it\n");
    return 2;
  }
  if (!sikv::testing::gpu_missing().empty()) {
    std::printf("SKIPPED: %s\n", sikv::testing::gpu_missing().c_str());
    return 0;
  }
  if (modes.empty()) modes = {"check", "time"};
  try {
    cudaStream_t stream = nullptr;
    check(cudaStreamCreate(&stream));
    int failed = 0;
    for (std::string_view mode : modes) {
      if (mode == "check" || mode == "quick" || mode == "replay") failed += run_checks(mode);
      if (mode == "time") {
        run_times(stream);
        run_replay_times(stream);
      }
      if (mode == "observe") run_replay_times(stream);
      if (mode == "profile") run_profile(stream);
      if (mode == "variants") run_variants(stream, json);
    }
    return failed == 0 ? 0 : 1;
  } catch (const std::exception& error) {
    std::printf("FAILED: %s\n", error.what());
    return 1;
  }
}
