// Check, then time an attention kernel: one decode step of one layer over caches that are filled
// with random bytes (any code is a valid code), beside the time it takes to merely touch the cache
// lines that step needs.
//
//   <bench> [--pipeline KEYS+VALUES]... [--context T] [--budget K] [--pinned P] [--tail N]
//           [--kv-heads H] [--group G] [--head-dim D] [--dtype fp16|bf16|fp32] [--threads N]
//           [--variant NAME] [--copies C] [--seconds S] [--json FILE]
//
// Every repeat uses another of C caches and another selection, so that a step finds its tokens
// outside of the CPU's caches, as it does when every layer has its own.
#ifndef SIKV_KERNELS_COMMON_KERNEL_BENCH_H_
#define SIKV_KERNELS_COMMON_KERNEL_BENCH_H_

#include <CLI/CLI.hpp>
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <ctime>
#include <memory>
#include <nlohmann/json.hpp>
#include <numeric>
#include <ostream>
#include <random>
#include <set>
#include <stdexcept>
#include <string>
#include <vector>

#include "framework/base/error.h"
#include "framework/base/file.h"
#include "framework/device/device.h"
#include "framework/registry/instance.h"
#include "framework/report/environment.h"
#include "plugins/layouts/dtype_name.h"

namespace sikv::bench {

struct Config {
  std::vector<std::string> pipelines;  // "sign_vq+intq"
  std::string kernel, variant, dtype = "fp16", json;
  int64_t context = 131072;
  int budget = 2048;  // 0: everything
  int pinned = 64, tail = 128, kv_heads = 8, group = 4, head_dim = 128, threads = 2, copies = 2;
  double seconds = 2.0;
};

// "rot_lm:bits=4" -> id and options.
inline std::pair<std::string, std::vector<std::pair<std::string, std::string>>> parse_codec(
    const std::string& text) {
  std::vector<std::pair<std::string, std::string>> options;
  const size_t colon = text.find(':');
  for (size_t at = colon; at < text.size();) {
    const size_t end = std::min(text.find(':', at + 1), text.size());
    const std::string pair = text.substr(at + 1, end - at - 1);
    options.emplace_back(pair.substr(0, pair.find('=')), pair.substr(pair.find('=') + 1));
    at = end;
  }
  return {text.substr(0, colon), options};
}

// One layer of one sequence, every byte random, every number in it finite and small.
class RandomCache {
 public:
  RandomCache(Device& device, const Config& config, const sikv_layout& key,
              const sikv_layout& value, uint64_t seed)
      : device_(device), key_(key), value_(value), pages_(config.context / SIKV_PAGE_TOKENS) {
    if (key.line_bytes + value.line_bytes > 0) {
      throw Error("this bench makes planes, not lines: decode_bench times these");
    }
    std::mt19937_64 random(seed);
    view_.struct_size = sizeof view_;
    view_.num_sequences = 1;
    view_.num_kv_heads = config.kv_heads;
    view_.head_dim = config.head_dim;
    view_.dtype = dtype_from_name(config.dtype);
    view_.max_pages = static_cast<int32_t>(pages_);
    view_.max_encoded_len = static_cast<int32_t>(config.context);
    page_table_.resize(static_cast<size_t>(pages_ * config.kv_heads));
    std::iota(page_table_.begin(), page_table_.end(), 0);
    encoded_len_.assign(static_cast<size_t>(config.kv_heads), view_.max_encoded_len);
    view_.page_table = page_table_.data();
    view_.encoded_len = encoded_len_.data();
    fill_store(key_, view_.key, random);
    fill_store(value_, view_.value, random);

    const size_t row_bytes = static_cast<size_t>(config.head_dim * sikv_dtype_bytes(view_.dtype));
    view_.tail_capacity = SIKV_PAGE_TOKENS;
    view_.pinned_capacity = config.pinned;
    const size_t heads = static_cast<size_t>(config.kv_heads);
    view_.tail_k = numbers(SIKV_PAGE_TOKENS * heads * row_bytes, view_.dtype, random);
    view_.tail_v = numbers(SIKV_PAGE_TOKENS * heads * row_bytes, view_.dtype, random);
    view_.pinned_k = numbers(config.pinned * heads * row_bytes, view_.dtype, random);
    view_.pinned_v = numbers(config.pinned * heads * row_bytes, view_.dtype, random);
    tail_len_ = {config.tail};
    view_.tail_len = tail_len_.data();
    pinned_len_.assign(heads, config.pinned);
    for (size_t h = 0; h < heads; ++h) {
      for (int i = 0; i < config.pinned; ++i) pinned_slots_.push_back(i);
    }
    view_.pinned_len = pinned_len_.data();
    view_.pinned_slots = pinned_slots_.data();
  }
  RandomCache(const RandomCache&) = delete;

  const sikv_cache_view& view() const { return view_; }

 private:
  void fill_store(const sikv_layout& layout, sikv_store_view& store, std::mt19937_64& random) {
    store.layout = &layout;
    const int32_t pages = view_.num_kv_heads * view_.max_pages;
    for (uint32_t i = 0; i < layout.num_planes; ++i) {
      const sikv_plane& plane = layout.planes[i];
      const int64_t page = int64_t{SIKV_PAGE_TOKENS} / plane.tile_tokens * plane.bytes_per_tile;
      const size_t bytes = static_cast<size_t>(page) * static_cast<size_t>(pages);
      const bool raw = std::string(layout.family) == "raw";
      const bool scales = plane.role == SIKV_SCALE || plane.role == SIKV_VALUE_SCALE;
      store.page_stride_bytes[i] = page;
      store.planes[i] = raw || scales
                            ? numbers(bytes, raw ? view_.dtype : int32_t{SIKV_FP16}, random)
                            : codes(bytes, random);
    }
    for (uint32_t i = 0; i < layout.num_tables; ++i) {
      store.tables[i] = static_cast<float*>(
          numbers(layout.tables[i].count * static_cast<size_t>(view_.num_kv_heads) * sizeof(float),
                  SIKV_FP32, random));
    }
  }

  void* codes(size_t bytes, std::mt19937_64& random) {
    auto* data = allocate(bytes);
    for (size_t i = 0; i + 8 <= bytes; i += 8) {
      const uint64_t word = random();
      std::memcpy(data + i, &word, 8);
    }
    return data;
  }
  // Multiples of 1/64 in (0, 1].
  void* numbers(size_t bytes, int32_t dtype, std::mt19937_64& random) {
    auto* data = allocate(bytes);
    const auto count = static_cast<int64_t>(bytes) / sikv_dtype_bytes(dtype);
    for (int64_t i = 0; i < count; i += 8) {
      uint64_t word = random();
      for (int64_t j = i; j < std::min(i + 8, count); ++j, word >>= 8) {
        sikv_store(data, dtype, j, static_cast<float>(word % 64 + 1) / 64.0f);
      }
    }
    return data;
  }
  uint8_t* allocate(size_t bytes) {
    memory_.emplace_back(device_, std::max<size_t>(bytes, 64));
    return memory_.back().as<uint8_t>();
  }

  Device& device_;
  sikv_layout key_, value_;
  int64_t pages_;
  sikv_cache_view view_{};
  std::vector<int32_t> page_table_, encoded_len_, tail_len_, pinned_len_, pinned_slots_;
  std::vector<DeviceBuffer> memory_;
};

// Random slots behind the pinned ones, ascending, per KV head.
inline std::vector<int32_t> random_slots(const Config& config, uint64_t seed) {
  std::mt19937_64 random(seed);
  std::vector<int32_t> slots;
  for (int h = 0; h < config.kv_heads; ++h) {
    std::set<int32_t> chosen;
    while (static_cast<int>(chosen.size()) < config.budget) {
      chosen.insert(static_cast<int32_t>(
          config.pinned +
          static_cast<int64_t>(random() % static_cast<uint64_t>(config.context - config.pinned))));
    }
    slots.insert(slots.end(), chosen.begin(), chosen.end());
  }
  return slots;
}

// The bytes a step must read, as runs, cut into parts for the threads.
class Touch {
 public:
  Touch(const sikv_cache_view& view, const sikv_selection& selection) {
    for (int32_t row = 0; row < view.num_kv_heads; ++row) {
      for (const sikv_store_view* store : {&view.key, &view.value}) {
        for (uint32_t p = 0; p < store->layout->num_planes; ++p)
          add_plane(view, selection, row, *store, p);
      }
    }
  }

  uint64_t lines() const {
    uint64_t lines = 0;
    for (const Run& run : runs_) lines += (run.bytes + 63) / 64;
    return lines;
  }

  // Reads a byte of each line.
  void read(const sikv_host& host) {
    host.parallel_for(
        host.context, kParts,
        [](void* arg, int64_t i, int32_t) {
          auto& touch = *static_cast<Touch*>(arg);
          const auto n = static_cast<int64_t>(touch.runs_.size());
          uint64_t sum = 0;
          for (int64_t j = n * i / kParts; j < n * (i + 1) / kParts; ++j) {
            const Run& run = touch.runs_[static_cast<size_t>(j)];
            for (uint32_t b = 0; b < run.bytes; b += 64) sum += run.at[b];
          }
          touch.sink_ += sum;
        },
        this);
  }

 private:
  static constexpr int64_t kParts = 32;
  struct Run {
    const uint8_t* at;
    uint32_t bytes;
  };

  void add_plane(const sikv_cache_view& view, const sikv_selection& selection, int32_t row,
                 const sikv_store_view& store, uint32_t p) {
    const sikv_plane& plane = store.layout->planes[p];
    const auto page = [&](int32_t i) {
      return static_cast<const uint8_t*>(store.planes[p]) +
             view.page_table[row * view.max_pages + i] * store.page_stride_bytes[p];
    };
    if (selection.counts[row] == SIKV_SELECT_ALL) {
      for (int32_t i = 0; i < view.max_pages; ++i) {
        runs_.push_back({page(i), SIKV_PAGE_TOKENS / plane.tile_tokens * plane.bytes_per_tile});
      }
      return;
    }
    for (int32_t i = 0; i < selection.counts[row]; ++i) {
      const int32_t slot = selection.slots[int64_t{row} * selection.capacity + i];
      const uint32_t tile = static_cast<uint32_t>(slot % SIKV_PAGE_TOKENS) / plane.tile_tokens;
      runs_.push_back(
          {page(slot / SIKV_PAGE_TOKENS) + tile * plane.bytes_per_tile, plane.bytes_per_tile});
    }
  }

  std::vector<Run> runs_;
  std::atomic<uint64_t> sink_{0};
};

// us; `cpu` is what all threads together spent, median as well: on a machine that others use too it
// still tells two kernels apart.
struct Timing {
  double median = 0, least = 0, cpu = 0;
};

template <typename Body>
Timing time_repeats(double seconds, Body&& body) {
  using Clock = std::chrono::steady_clock;
  const auto cpu_seconds = [] {
    timespec now{};
    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &now);
    return static_cast<double>(now.tv_sec) + 1e-9 * static_cast<double>(now.tv_nsec);
  };
  std::vector<double> times, cpu;
  for (int i = 0; i < 4; ++i) body(i);
  const auto end = Clock::now() + std::chrono::duration<double>(seconds);
  for (int i = 0; times.size() < 20 || Clock::now() < end; ++i) {
    const auto start = Clock::now();
    const double cpu_start = cpu_seconds();
    body(i);
    cpu.push_back(1e6 * (cpu_seconds() - cpu_start));
    times.push_back(std::chrono::duration<double, std::micro>(Clock::now() - start).count());
  }
  std::sort(times.begin(), times.end());
  std::sort(cpu.begin(), cpu.end());
  return {times[times.size() / 2], times.front(), cpu[cpu.size() / 2]};
}

// Layouts of one pipeline, with the kernel's variants on them.
class Bench {
 public:
  Bench(const Config& config, const std::string& pipeline, const Registry& registry, Device& device)
      : config_(config), device_(device) {
    shape_ = {sizeof shape_,
              1,
              config.kv_heads * config.group,
              config.kv_heads,
              config.head_dim,
              dtype_from_name(config.dtype),
              1,
              static_cast<int32_t>(config.context) + 256,
              0};
    const size_t plus = pipeline.find('+');
    const sikv_layout key = layout(registry, SIKV_KEY_CODEC, pipeline.substr(0, plus));
    const sikv_layout value = layout(registry, SIKV_VALUE_CODEC, pipeline.substr(plus + 1));
    for (int i = 0; i < config.copies; ++i) {
      caches_.push_back(std::make_unique<RandomCache>(device_, config, key, value, 1 + i));
    }
    for (int i = 0; i < 16; ++i) selections_.push_back(random_slots(config, 100 + i));
    counts_.assign(static_cast<size_t>(config.kv_heads),
                   config.budget == 0 ? SIKV_SELECT_ALL : config.budget);
    std::mt19937_64 random(7);
    std::normal_distribution<float> normal;
    const int heads = shape_.num_query_heads;
    query_.resize(static_cast<size_t>(heads * config.head_dim * 4));
    for (int i = 0; i < heads * config.head_dim; ++i) {
      sikv_store(query_.data(), shape_.dtype, i, normal(random));
    }
    out_.resize(static_cast<size_t>(heads * config.head_dim));
    lse_.resize(static_cast<size_t>(heads));
    const Variant& chosen =
        registry.choose(SIKV_KERNEL, config.kernel, device_.info(), config.variant);
    variant_ = chosen.variant;
    kernel_ = make(chosen);
    ref_ = make(registry.find(SIKV_KERNEL, config.kernel, "ref"));
  }

  // Largest difference from `ref` relative to the largest output; throws where that is too much.
  double check() {
    run(*ref_, 0);
    const std::vector<float> expected = out_, expected_lse = lse_;
    run(*kernel_, 0);
    double error = 0, largest = 0;
    for (size_t i = 0; i < out_.size(); ++i) {
      error = std::max(error, std::abs(double{out_[i]} - expected[i]));
      largest = std::max(largest, std::abs(double{expected[i]}));
    }
    for (size_t i = 0; i < lse_.size(); ++i) {
      error = std::max(error, std::abs(double{lse_[i]} - expected_lse[i]) / 10);
    }
    if (!(error <= 1e-4 * largest)) throw std::runtime_error("the result differs from ref's");
    return error / largest;
  }

  Timing time_kernel() {
    return time_repeats(config_.seconds, [&](int i) { run(*kernel_, i); });
  }
  // The floor, and the lines it touches.
  std::pair<Timing, uint64_t> time_touch() {
    std::vector<std::unique_ptr<Touch>> touches;
    for (int i = 0; i < 16; ++i) touches.push_back(std::make_unique<Touch>(view(i), selection(i)));
    const Timing timing = time_repeats(config_.seconds, [&](int i) {
      touches[static_cast<size_t>(i) % 16]->read(device_.host());
    });
    return {timing, touches[0]->lines()};
  }
  const std::string& variant() const { return variant_; }

 private:
  sikv_layout layout(const Registry& registry, sikv_kind kind, const std::string& text) {
    const auto [id, options] = parse_codec(text);
    const Variant& variant = registry.find(kind, id, "ref");
    const CodecInstance codec(variant, OptionSet::parse(variant.options, options, id), shape_,
                              device_.info(), device_.host());
    return codec.describe();
  }
  std::unique_ptr<KernelInstance> make(const Variant& variant) {
    auto kernel =
        std::make_unique<KernelInstance>(variant, OptionSet::parse(variant.options, {}, variant.id),
                                         shape_, device_.info(), device_.host());
    const uint64_t bytes = kernel->plan(config_.budget);
    if (bytes > workspace_.bytes()) workspace_ = DeviceBuffer(device_, bytes);
    return kernel;
  }
  const sikv_cache_view& view(int i) const {
    return caches_[static_cast<size_t>(i) % caches_.size()]->view();
  }
  sikv_selection selection(int i) {
    return {selections_[static_cast<size_t>(i) % selections_.size()].data(), counts_.data(),
            config_.budget, 0};
  }
  void run(KernelInstance& kernel, int i) {
    const float scale = 1.0f / std::sqrt(static_cast<float>(config_.head_dim));
    const sikv_attend_args args{
        sizeof args, shape_.num_query_heads, &view(i),    query_.data(), scale,
        0,           selection(i),           out_.data(), lse_.data(),   nullptr};
    kernel.run(args, workspace_.as<>(), nullptr);
  }

  Config config_;
  Device& device_;
  sikv_shape shape_{};
  std::vector<std::unique_ptr<RandomCache>> caches_;
  std::vector<std::vector<int32_t>> selections_;
  std::vector<int32_t> counts_;
  std::vector<uint8_t> query_;
  std::vector<float> out_, lse_;
  std::string variant_;
  DeviceBuffer workspace_;
  std::unique_ptr<KernelInstance> kernel_, ref_;
};

inline int run(Config config, int argc, char** argv) {
  CLI::App app("Checks kernel " + config.kernel + " against ref, then times it.");
  app.add_option("--pipeline", config.pipelines, "KEYS+VALUES, such as rot_lm:bits=3+rot_lm");
  app.add_option("--context", config.context)->check(CLI::PositiveNumber);
  app.add_option("--budget", config.budget, "selected tokens per row; 0 selects all");
  app.add_option("--pinned", config.pinned);
  app.add_option("--tail", config.tail);
  app.add_option("--kv-heads", config.kv_heads);
  app.add_option("--group", config.group, "query heads per KV head");
  app.add_option("--head-dim", config.head_dim);
  app.add_option("--dtype", config.dtype)->check(CLI::IsMember({"fp16", "bf16", "fp32"}));
  app.add_option("--threads", config.threads);
  app.add_option("--variant", config.variant);
  app.add_option("--copies", config.copies, "caches used in turn");
  app.add_option("--seconds", config.seconds, "per timing");
  app.add_option("--json", config.json, "also write the result here");
  CLI11_PARSE(app, argc, argv);

  const Registry registry = Registry::standard();
  nlohmann::ordered_json rows = nlohmann::ordered_json::array();
  const std::unique_ptr<Device> device = open_cpu_device(config.threads);
  for (const std::string& pipeline : config.pipelines) {
    Bench bench(config, pipeline, registry, *device);
    const double error = bench.check();
    const Timing kernel = bench.time_kernel();
    const auto [touch, lines] = bench.time_touch();
    const double megabytes = static_cast<double>(lines) * 64e-6;
    std::printf(
        "%-24s %s D %d G %d: %.1f us (least %.1f, CPU %.1f), %.1f GB/s of lines; touching them "
        "%.1f us (least %.1f, CPU %.1f); error %.1e\n",
        pipeline.c_str(), bench.variant().c_str(), config.head_dim, config.group, kernel.median,
        kernel.least, kernel.cpu, megabytes / kernel.median * 1e3, touch.median, touch.least,
        touch.cpu, error);
    rows.push_back({{"pipeline", pipeline},
                    {"variant", bench.variant()},
                    {"context", config.context},
                    {"budget", config.budget},
                    {"median_us", kernel.median},
                    {"least_us", kernel.least},
                    {"cpu_us", kernel.cpu},
                    {"lines", lines},
                    {"touch_us", touch.median},
                    {"error", error}});
  }
  if (!config.json.empty()) {
    const std::vector<std::string> command(argv, argv + argc);
    const nlohmann::ordered_json result = {{"environment", environment(command, *device)},
                                           {"rows", rows}};
    write_atomically(config.json, [&](std::ostream& file) { file << result.dump(1) << '\n'; });
  }
  return 0;
}

}  // namespace sikv::bench

#endif  // SIKV_KERNELS_COMMON_KERNEL_BENCH_H_
