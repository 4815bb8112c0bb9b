// SIMD: a copy is decoded once for up to four heads, two channels of a byte going to the two halves
// of the query.
#include <algorithm>
#include <array>
#include <bit>
#include <numeric>
#include <vector>

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "selectors/twilight/twilight_cpu.cc"
#include "hwy/foreach_target.h"  // must come before highway.h
#include "hwy/highway.h"

#include "kernels/common/prefetch.h"
#include "kernels/common/simd_rows.h"
#include "kernels/common/simd_softmax.h"
#include "selectors/twilight/twilight.h"

HWY_BEFORE_NAMESPACE();
namespace sikv::twilight {
namespace HWY_NAMESPACE {

#if HWY_TARGET == HWY_SCALAR

bool Runs() { return false; }
void CopyLogits(const uint8_t*, std::span<const int32_t>, const float*, int, int, float*, int64_t) {
}
void ExactLogits(const ExactKeys&, const float*, int, int, float*, int64_t) {}

#else

namespace hn = hwy::HWY_NAMESPACE;
namespace simd = sikv::HWY_NAMESPACE;
using simd::DF;
using simd::kLanes;
using simd::VF;

bool Runs() { return true; }

// Heads whose sums stay in registers beside the decoded channels.
constexpr int kMostHeads = 4;
// Copies requested ahead: candidates lie anywhere, so each is a miss.
constexpr size_t kAhead = 8;

// sums [G] = q . codes of one copy, without scale and zero.
template <int kHeads>
HWY_INLINE void CodeSums(const uint8_t* codes, const float* HWY_RESTRICT q, size_t dim,
                         float* HWY_RESTRICT sums) {
  const DF d;
  const hn::RebindToUnsigned<DF> du;
  const hn::RebindToSigned<DF> di;
  const hn::Rebind<uint8_t, DF> d8;
  VF low_sums[kHeads], high_sums[kHeads];
  for (int h = 0; h < kHeads; ++h) low_sums[h] = high_sums[h] = hn::Zero(d);
  for (size_t i = 0; i < dim / 2; i += kLanes) {
    const auto bytes = hn::PromoteTo(du, hn::LoadU(d8, codes + i));
    const VF low = hn::ConvertTo(d, hn::BitCast(di, hn::And(bytes, hn::Set(du, 15))));
    const VF high = hn::ConvertTo(d, hn::BitCast(di, hn::ShiftRight<4>(bytes)));
    for (int h = 0; h < kHeads; ++h) {
      const float* const head = q + static_cast<size_t>(h) * dim + i;
      low_sums[h] = hn::MulAdd(low, hn::LoadU(d, head), low_sums[h]);
      high_sums[h] = hn::MulAdd(high, hn::LoadU(d, head + dim / 2), high_sums[h]);
    }
  }
  for (int h = 0; h < kHeads; ++h) {
    sums[h] = hn::GetLane(hn::SumOfLanes(d, hn::Add(low_sums[h], high_sums[h])));
  }
}

template <int kHeads>
void CopyLogitsOf(const uint8_t* copies, std::span<const int32_t> positions, const float* q,
                  int head_dim, float* logits, int64_t stride) {
  const auto dim = static_cast<size_t>(head_dim);
  const int64_t bytes = copy_bytes(head_dim);
  // min adds its product with the sum of the query's channels.
  std::array<float, kHeads> q_sums;
  for (int h = 0; h < kHeads; ++h) {
    q_sums[static_cast<size_t>(h)] =
        std::accumulate(q + h * head_dim, q + (h + 1) * head_dim, 0.0f);
  }
  for (size_t t = 0; t < positions.size(); ++t) {
    const uint8_t* ahead = copies + bytes * positions[std::min(t + kAhead, positions.size() - 1)];
    for (int64_t line = 0; line < bytes; line += 64) PrefetchLine(ahead + line);
    const uint8_t* copy = copies + bytes * positions[t];
    const auto scale = simd::LoadBytes<float>(copy), zero = simd::LoadBytes<float>(copy + 4);
    std::array<float, kHeads> sums;
    CodeSums<kHeads>(copy + kHeaderBytes, q, dim, sums.data());
    for (int h = 0; h < kHeads; ++h) {
      const auto i = static_cast<size_t>(h);
      logits[h * stride + static_cast<int64_t>(t)] = scale * sums[i] + zero * q_sums[i];
    }
  }
}

void CopyLogits(const uint8_t* copies, std::span<const int32_t> positions, const float* q,
                int group, int head_dim, float* logits, int64_t stride) {
  constexpr decltype(&CopyLogitsOf<1>) kByHeads[kMostHeads] = {CopyLogitsOf<1>, CopyLogitsOf<2>,
                                                               CopyLogitsOf<3>, CopyLogitsOf<4>};
  for (int g = 0; g < group; g += kMostHeads) {
    kByHeads[std::min(group - g, kMostHeads) - 1](copies, positions, q + g * head_dim, head_dim,
                                                  logits + g * stride, stride);
  }
}

void ExactLogits(const ExactKeys& keys, const float* q, int group, int head_dim, float* logits,
                 int64_t stride) {
  const DF d;
  const auto dim = static_cast<size_t>(head_dim);
  alignas(64) std::array<float, kMaxHeadDim> key;
  const auto* data = static_cast<const uint8_t*>(keys.data);
  const int64_t element = sikv_dtype_bytes(keys.dtype);
  for (int t = 0; t < keys.count; ++t) {
    simd::LoadRow(data + (keys.first + t * keys.stride) * element, keys.dtype, dim, key.data());
    for (int g = 0; g < group; ++g) {
      VF sum = hn::Zero(d);
      for (size_t i = 0; i < dim; i += kLanes) {
        sum = hn::MulAdd(hn::Load(d, key.data() + i),
                         hn::LoadU(d, q + static_cast<size_t>(g) * dim + i), sum);
      }
      logits[g * stride + t] = hn::GetLane(hn::SumOfLanes(d, sum));
    }
  }
}

#endif  // HWY_TARGET != HWY_SCALAR

void Softmax(float* logits, int64_t stride, int group, int64_t n, float* weights) {
  if (n > 0) sikv::HWY_NAMESPACE::MeanSoftmax(logits, stride, group, n, weights);
}

}  // namespace HWY_NAMESPACE
}  // namespace sikv::twilight
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace sikv::twilight {

HWY_EXPORT(Runs);
HWY_EXPORT(CopyLogits);
HWY_EXPORT(ExactLogits);
HWY_EXPORT(Softmax);

namespace {

void copy_logits(const uint8_t* copies, std::span<const int32_t> positions, const float* q,
                 int group, int head_dim, float* logits, int64_t stride) {
  HWY_DYNAMIC_DISPATCH(CopyLogits)(copies, positions, q, group, head_dim, logits, stride);
}
void exact_logits(const ExactKeys& keys, const float* q, int group, int head_dim, float* logits,
                  int64_t stride) {
  HWY_DYNAMIC_DISPATCH(ExactLogits)(keys, q, group, head_dim, logits, stride);
}
void mean_softmax(float* logits, int64_t stride, int group, int64_t n, float* weights) {
  HWY_DYNAMIC_DISPATCH(Softmax)(logits, stride, group, n, weights);
}

// One pass by buckets of 1/8 octave instead of a sort: all buckets above the one in which the sum
// passes `mass` are kept, and only that one is sorted.
void smallest_set(std::span<const float> weights, double mass, uint8_t* kept) {
  constexpr int kShift = 20;  // leaves 3 bits of mantissa
  constexpr size_t kBuckets = (std::bit_cast<uint32_t>(2.0f) >> kShift) + 1;  // weights are below 2
  const auto bucket = [](float weight) { return std::bit_cast<uint32_t>(weight) >> kShift; };
  std::array<double, kBuckets> masses{};
  for (const float weight : weights) masses[bucket(weight)] += weight;
  double sum = 0.0;
  size_t whole = kBuckets;  // buckets from here on are kept
  while (whole > 0 && sum + masses[whole - 1] < mass) sum += masses[--whole];

  std::vector<size_t> last;
  for (size_t i = 0; i < weights.size(); ++i) {
    kept[i] = bucket(weights[i]) >= whole ? 1 : 0;
    if (bucket(weights[i]) + 1 == whole) last.push_back(i);
  }
  std::stable_sort(last.begin(), last.end(),
                   [&](size_t a, size_t b) { return weights[a] > weights[b]; });
  for (size_t i = 0; i < last.size() && sum < mass; ++i) {
    kept[last[i]] = 1;
    sum += weights[last[i]];
  }
}

constexpr Math kMath = {copy_logits, exact_logits, mean_softmax, smallest_set};

}  // namespace

std::unique_ptr<ScoringSelector> make_cpu(const CreateArgs& args) { return make(args, kMath); }

int32_t probe_cpu(const sikv_device*, sikv_message* reason) {
  if (HWY_DYNAMIC_DISPATCH(Runs)()) return 10;
  sdk::write_message(reason, "this CPU has no vectors that the kernels are written for");
  return 0;
}

}  // namespace sikv::twilight
#endif  // HWY_ONCE
