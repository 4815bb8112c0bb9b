// Check, then time: index scan + top-k selection of one query on one thread, beside the time it
// takes to merely read the codes.
//
//   simd_scan_bench [--json FILE] [--codes N]... [--k K]... [--head-dim D] [--seconds S]
//                   [--footprint-mb M] [--target NAME] [--order random|rising] [--page-stride B]
//                   [--pages consecutive|shuffled]
//
// Every repeat scans another copy of the planes; all copies together exceed the caches, as the
// planes of all heads and layers do in a decode step. Pages follow each other, as a prefill
// allocates them, or are shuffled, as in a pool long in use.

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/common/simd_scan_bench.cc"
#include "hwy/foreach_target.h"  // must come before highway.h
#include "hwy/highway.h"

#include "kernels/common/simd_scan.h"

HWY_BEFORE_NAMESPACE();
namespace sikv {
namespace HWY_NAMESPACE {

int64_t BenchScanSelect(const IndexPages& pages, int64_t tokens, int head_dim,
                        const uint8_t* tables, int64_t budget, void* scratch, int32_t* positions) {
  return ScanSelect(pages, tokens, head_dim, tables, Excluded(), budget, scratch, positions);
}

int64_t BenchTwoPass(const IndexPages& pages, int64_t tokens, int head_dim, const uint8_t* tables,
                     int64_t budget, uint16_t* scores, uint32_t* histogram, int32_t* positions) {
  ScanScores(pages, tokens, head_dim, tables, scores, histogram);
  return CountingSelect(scores, tokens, histogram, ScoreBins(head_dim), Excluded(), budget,
                        positions);
}

void BenchScan(const IndexPages& pages, int64_t tokens, int head_dim, const uint8_t* tables,
               uint16_t* scores) {
  ScanScores(pages, tokens, head_dim, tables, scores, nullptr);
}

int64_t BenchExact(const IndexPages& pages, int64_t tokens, int head_dim, const float* tables,
                   int64_t budget, float* scores, void* scratch, int32_t* positions) {
  ScanExact(pages, tokens, head_dim, tables, scores);
  return SelectFloat(scores, tokens, Excluded(), budget, scratch, positions);
}

// The floor: every line of the planes once, pages in the order of the scan.
uint64_t BenchRead(const IndexPages& pages, int64_t tokens, int head_dim) {
  const hn::ScalableTag<uint64_t> d;
  const int64_t num_pages = (tokens + kScanPageTokens - 1) / kScanPageTokens;
  const int64_t page_bytes = kScanPageTokens * head_dim / 8;
  const int64_t step = static_cast<int64_t>(hn::Lanes(d) * sizeof(uint64_t));
  auto sum0 = hn::Zero(d), sum1 = hn::Zero(d), sum2 = hn::Zero(d), sum3 = hn::Zero(d);
  for (int64_t p = 0; p < num_pages; ++p) {
    const auto* from = PageAt(pages, p);
    const auto* next = PageAt(pages, HWY_MIN(p + kPrefetchPages, num_pages - 1));
    for (int64_t i = 0; i < page_bytes; i += 4 * step) {
      for (int64_t line = 0; line < 4 * step; line += 64) PrefetchLine(next + i + line);
      const auto load = [&](int64_t at) HWY_ATTR {
        return hn::LoadU(d, reinterpret_cast<const uint64_t*>(from + i + at));
      };
      sum0 = hn::Add(sum0, load(0));
      sum1 = hn::Add(sum1, load(step));
      sum2 = hn::Add(sum2, load(2 * step));
      sum3 = hn::Add(sum3, load(3 * step));
    }
  }
  return hn::GetLane(hn::SumOfLanes(d, hn::Add(hn::Add(sum0, sum1), hn::Add(sum2, sum3))));
}

}  // namespace HWY_NAMESPACE
}  // namespace sikv
HWY_AFTER_NAMESPACE();

#if HWY_ONCE

#include <sys/mman.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <functional>
#include <memory>
#include <numeric>
#include <random>
#include <sstream>
#include <string>
#include <vector>

namespace sikv {

HWY_EXPORT(BenchScanSelect);
HWY_EXPORT(BenchTwoPass);
HWY_EXPORT(BenchScan);
HWY_EXPORT(BenchExact);
HWY_EXPORT(BenchRead);

namespace {

#if defined(__clang__)
constexpr char kCompiler[] = __VERSION__;
#else
constexpr char kCompiler[] = "GCC " __VERSION__;
#endif

struct Flags {
  std::vector<int64_t> codes;
  std::vector<int64_t> budgets;
  int head_dim = 128;
  double seconds = 1.0;
  int64_t footprint_mb = 256;
  int64_t page_stride = 0;  // 0: pages back to back
  std::string order = "random";
  std::string pages = "consecutive";
  std::string target;
  std::string json;
};

struct Plane {
  std::unique_ptr<uint8_t, decltype(&free)> bytes{nullptr, &free};
  std::vector<int32_t> table;
  int64_t stride;
  IndexPages pages() const { return {bytes.get(), stride, table.data()}; }
};

// In huge pages, as a cache on the CPU is.
template <class T>
std::unique_ptr<T, decltype(&free)> Aligned(size_t count) {
  constexpr size_t kHugePage = 2 << 20;
  const size_t bytes = (count * sizeof(T) + kHugePage - 1) / kHugePage * kHugePage;
  void* data = aligned_alloc(kHugePage, bytes);
  madvise(data, bytes, MADV_HUGEPAGE);
  return {static_cast<T*>(data), &free};
}

Plane MakePlane(int64_t codes, const Flags& flags, std::mt19937_64& rng) {
  Plane plane;
  const int64_t num_pages = (codes + kScanPageTokens - 1) / kScanPageTokens;
  const int64_t page_bytes = kScanPageTokens * flags.head_dim / 8;
  plane.stride = flags.page_stride == 0 ? page_bytes : flags.page_stride;
  plane.bytes = Aligned<uint8_t>(static_cast<size_t>(num_pages * plane.stride));
  plane.table.resize(num_pages);
  std::iota(plane.table.begin(), plane.table.end(), 0);
  if (flags.pages == "shuffled") std::shuffle(plane.table.begin(), plane.table.end(), rng);
  for (int64_t p = 0; p < num_pages; ++p) {
    uint8_t* page = plane.bytes.get() + plane.table[p] * plane.stride;
    for (int64_t i = 0; i < page_bytes; i += 8) {
      const uint64_t word = rng();
      memcpy(page + i, &word, 8);
    }
    if (flags.order == "rising") {
      // The later a token, the more of its groups hold the nibble of the highest table entry.
      for (int64_t i = 0; i < page_bytes; ++i) {
        const int group = static_cast<int>(i % flags.head_dim / 4);
        if (group < flags.head_dim / 4 * p / num_pages) page[i] = 0xFF;
      }
    }
  }
  return plane;
}

double Median(std::vector<double> times) {
  std::nth_element(times.begin(), times.begin() + times.size() / 2, times.end());
  return times[times.size() / 2];
}

// Median microseconds of run(i), i = 0, 1, 2, ...
double Time(double seconds, const std::function<void(size_t)>& run) {
  using Clock = std::chrono::steady_clock;
  std::vector<double> times;
  size_t i = 0;
  for (; i < 3; ++i) run(i);
  const auto deadline = Clock::now() + std::chrono::duration<double>(seconds);
  while (times.size() < 15 || Clock::now() < deadline) {
    const auto begin = Clock::now();
    run(i++);
    times.push_back(std::chrono::duration<double, std::micro>(Clock::now() - begin).count());
  }
  return Median(std::move(times));
}

std::vector<int32_t> Reference(const Plane& plane, int64_t codes, int head_dim,
                               const uint8_t* tables, int64_t budget) {
  std::vector<int> scores(codes);
  for (int64_t t = 0; t < codes; ++t) {
    const uint8_t* tile = plane.bytes.get() + plane.table[t / kScanPageTokens] * plane.stride +
                          t % kScanPageTokens / kTileTokens * head_dim;
    for (int g = 0; g < head_dim / 4; ++g) {
      scores[t] += tables[16 * g + (tile[4 * g + t % 8 / 2] >> (4 * (t % 2)) & 15)];
    }
  }
  std::vector<int32_t> order(codes);
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(),
                   [&](int32_t a, int32_t b) { return scores[a] > scores[b]; });
  order.resize(std::min(budget, codes));
  std::sort(order.begin(), order.end());
  return order;
}

bool Parse(int argc, char** argv, Flags* flags) {
  for (int i = 1; i + 1 < argc; i += 2) {
    const std::string name = argv[i];
    const std::string value = argv[i + 1];
    if (name == "--json") {
      flags->json = value;
    } else if (name == "--codes") {
      flags->codes.push_back(std::stoll(value));
    } else if (name == "--k") {
      flags->budgets.push_back(std::stoll(value));
    } else if (name == "--head-dim") {
      flags->head_dim = std::stoi(value);
    } else if (name == "--seconds") {
      flags->seconds = std::stod(value);
    } else if (name == "--footprint-mb") {
      flags->footprint_mb = std::stoll(value);
    } else if (name == "--target") {
      flags->target = value;
    } else if (name == "--order") {
      flags->order = value;
    } else if (name == "--pages") {
      flags->pages = value;
    } else if (name == "--page-stride") {
      flags->page_stride = std::stoll(value);
    } else {
      fprintf(stderr, "unknown option %s\n", name.c_str());
      return false;
    }
  }
  if (argc % 2 == 0 || !ScanSupports(flags->head_dim)) {
    fprintf(stderr, "usage: see the top of kernels/common/simd_scan_bench.cc\n");
    return false;
  }
  if (flags->codes.empty()) flags->codes = {131072, 1048576};
  if (flags->budgets.empty()) flags->budgets = {100, 2048, 9830};
  return true;
}

int Run(const Flags& flags) {
  if (!flags.target.empty()) {
    int64_t found = 0;
    for (int64_t left = hwy::SupportedTargets() & HWY_TARGETS; left != 0; left &= left - 1) {
      if (flags.target == hwy::TargetName(left & -left)) found = left & -left;
    }
    if (found == 0) {
      fprintf(stderr, "target %s is not available here\n", flags.target.c_str());
      return 2;
    }
    hwy::SetSupportedTargetsForTest(found);
  }
  const int64_t chosen = hwy::SupportedTargets() & HWY_TARGETS;
  const char* target = hwy::TargetName(chosen & -chosen);

  std::mt19937_64 rng(1);
  const int groups = flags.head_dim / 4;
  // Tables of a query against sign-pattern means: a sum of four independent channels per group.
  std::normal_distribution<float> normal;
  std::vector<float> exact(16 * groups);
  for (int g = 0; g < groups; ++g) {
    for (int i = 0; i < 4; ++i) {
      const float product = normal(rng);
      for (int c = 0; c < 16; ++c) exact[16 * g + c] += c >> i & 1 ? product : -product;
    }
  }
  if (flags.order == "rising") {
    for (int g = 0; g < groups; ++g) {
      std::swap(exact[16 * g + 15],
                *std::max_element(exact.begin() + 16 * g, exact.begin() + 16 * g + 16));
    }
  }
  std::vector<uint8_t> tables(16 * groups);
  // The rule of selectors/self_index/self_index_tables.h.
  float widest = 0;
  for (int g = 0; g < groups; ++g) {
    const auto [low, high] = std::minmax_element(&exact[16 * g], &exact[16 * g] + 16);
    widest = std::max(widest, *high - *low);
  }
  for (int g = 0; g < groups; ++g) {
    const float low = *std::min_element(&exact[16 * g], &exact[16 * g] + 16);
    for (int c = 0; c < 16; ++c) {
      tables[16 * g + c] =
          static_cast<uint8_t>(std::nearbyint((exact[16 * g + c] - low) * (63.0f / widest)));
    }
  }

  std::ostringstream json;
  double bandwidth = 0;
  const char* comma = "";
  for (int64_t codes : flags.codes) {
    const double bytes = static_cast<double>(codes) * flags.head_dim / 8;
    const auto copies =
        std::max<size_t>(2, (flags.footprint_mb << 20) / static_cast<int64_t>(bytes));
    std::vector<Plane> planes;
    for (size_t i = 0; i < copies; ++i) planes.push_back(MakePlane(codes, flags, rng));
    const int64_t top = *std::max_element(flags.budgets.begin(), flags.budgets.end());
    auto positions = Aligned<int32_t>(top);
    auto scratch = Aligned<uint8_t>(std::max(RunningSelectBytes(top), SelectFloatBytes(top)));
    auto scores = Aligned<uint16_t>(codes);
    auto exact_scores = Aligned<float>(codes);
    std::vector<uint32_t> histogram(ScoreBins(flags.head_dim));

    const auto plane = [&](size_t i) { return planes[i % copies].pages(); };
    volatile uint64_t sink = 0;
    const double read_us = Time(flags.seconds, [&](size_t i) {
      sink = sink + HWY_DYNAMIC_DISPATCH(BenchRead)(plane(i), codes, flags.head_dim);
    });
    const double scan_us = Time(flags.seconds, [&](size_t i) {
      HWY_DYNAMIC_DISPATCH(BenchScan)
      (plane(i), codes, flags.head_dim, tables.data(), scores.get());
    });
    bandwidth = std::max(bandwidth, bytes / read_us / 1e3);
    printf("%s, D %d, %lld codes: read %.1f us (%.1f GB/s), scan alone %.1f us\n", target,
           flags.head_dim, static_cast<long long>(codes), read_us, bytes / read_us / 1e3, scan_us);
    for (int64_t k : flags.budgets) {
      const auto want = Reference(planes[0], codes, flags.head_dim, tables.data(), k);
      const int64_t count = HWY_DYNAMIC_DISPATCH(BenchScanSelect)(
          plane(0), codes, flags.head_dim, tables.data(), k, scratch.get(), positions.get());
      if (count != static_cast<int64_t>(want.size()) ||
          !std::equal(want.begin(), want.end(), positions.get())) {
        fprintf(stderr, "wrong selection at %lld codes, k %lld\n", static_cast<long long>(codes),
                static_cast<long long>(k));
        return 1;
      }
      const double us = Time(flags.seconds, [&](size_t i) {
        HWY_DYNAMIC_DISPATCH(BenchScanSelect)
        (plane(i), codes, flags.head_dim, tables.data(), k, scratch.get(), positions.get());
      });
      const double two_pass_us = Time(flags.seconds / 2, [&](size_t i) {
        HWY_DYNAMIC_DISPATCH(BenchTwoPass)
        (plane(i), codes, flags.head_dim, tables.data(), k, scores.get(), histogram.data(),
         positions.get());
      });
      const double exact_us = Time(flags.seconds / 2, [&](size_t i) {
        HWY_DYNAMIC_DISPATCH(BenchExact)
        (plane(i), codes, flags.head_dim, exact.data(), k, exact_scores.get(), scratch.get(),
         positions.get());
      });
      printf(
          "  k %5lld: %7.1f us, %5.1f GB/s, %3.0f%% of read; with score array %.1f us; "
          "fp32 tables %.1f us\n",
          static_cast<long long>(k), us, bytes / us / 1e3, 100 * read_us / us, two_pass_us,
          exact_us);
      json << comma << "\n    {\"codes\": " << codes << ", \"k\": " << k
           << ", \"median_us\": " << us << ", \"gb_per_s\": " << bytes / us / 1e3
           << ", \"read_bandwidth_share\": " << read_us / us << ", \"two_pass_us\": " << two_pass_us
           << ", \"exact_us\": " << exact_us << "}";
      comma = ",";
    }
  }
  if (!flags.json.empty()) {
    std::ofstream(flags.json) << "{\n  \"compiler\": \"" << kCompiler << "\",\n  \"target\": \""
                              << target << "\",\n  \"pages\": \"" << flags.pages
                              << "\",\n  \"head_dim\": " << flags.head_dim
                              << ",\n  \"read_bandwidth_gb_s\": " << bandwidth << ",\n  \"rows\": ["
                              << json.str() << "\n  ]\n}\n";
  }
  return 0;
}

}  // namespace
}  // namespace sikv

int main(int argc, char** argv) {
  sikv::Flags flags;
  if (!sikv::Parse(argc, argv, &flags)) return 2;
  return sikv::Run(flags);
}

#endif  // HWY_ONCE
