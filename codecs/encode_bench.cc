// Check, then time: fit and encode of a prompt's K and V on one thread, variant `cpu` against
// `ref`.
//
//   encode_bench [--seconds S] [--json FILE] [--variant V]
//
// A GB is 10^9 bytes of fp16 K and V, each counted once however often it is read. 16384 tokens of 8
// KV heads, normal with a mean of its own per channel, lie as a model writes them, [tokens, H, D]:
// a head's rows are H * D apart, and K and V together exceed the caches. `ref` is checked and timed
// on the first 2000 of them.

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <fstream>
#include <functional>
#include <memory>
#include <nlohmann/json.hpp>
#include <numeric>
#include <string>
#include <utility>
#include <vector>

#include "framework/base/random.h"
#include "plugins/abi/sikv_dtype.h"
#include "tests/support/plugins.h"
#include "tests/support/test_cache.h"

namespace sikv {
namespace {

using testing::TestCache;

constexpr int kHeads = 8;
constexpr int kTokens = 16384;
constexpr int kCheckedTokens = 2000;

#if defined(__clang__)
constexpr char kCompiler[] = __VERSION__;
#else
constexpr char kCompiler[] = "GCC " __VERSION__;
#endif

struct Flags {
  double seconds = 1.0;
  std::string variant = "cpu";
  std::string json;
};

// K or V of one sequence, [tokens, H, D] fp16.
class Prompt {
 public:
  Prompt(int head_dim, uint64_t seed) : head_dim_(head_dim) {
    Random random(seed);
    std::vector<float> mean(static_cast<size_t>(kHeads * head_dim));
    for (float& m : mean) m = static_cast<float>(2 * random.normal());
    data_.resize(size_t{kTokens} * mean.size());
    for (size_t i = 0; i < data_.size(); ++i) {
      data_[i] = sikv_float_to_fp16(mean[i % mean.size()] + static_cast<float>(random.normal()));
    }
  }

  sikv_rows rows(const int32_t* count) const {
    static constexpr int32_t kFirst = 0;
    const int64_t stride = int64_t{kHeads} * head_dim_;
    return {data_.data(), SIKV_FP16, *count, &kFirst, count, stride, head_dim_};
  }
  // Of the first `tokens`.
  double bytes(int tokens) const { return 2.0 * tokens * kHeads * head_dim_; }

 private:
  int head_dim_;
  std::vector<uint16_t> data_;
};

// Seconds this thread has run: neighbours on a shared machine do not count.
double thread_seconds() {
  timespec now;
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
  return static_cast<double>(now.tv_sec) + 1e-9 * static_cast<double>(now.tv_nsec);
}

double time(const std::function<void()>& work) {
  const double begin = thread_seconds();
  work();
  return thread_seconds() - begin;
}

double median(std::vector<double> times) {
  const auto middle = times.begin() + static_cast<ptrdiff_t>(times.size() / 2);
  std::nth_element(times.begin(), middle, times.end());
  return *middle;
}

// One side of a pair at work.
class Side {
 public:
  Side(sikv_kind kind, const std::string& id, const std::string& variant, const Prompt& prompt,
       int head_dim, int tokens)
      : kind_(kind),
        prompt_(prompt),
        tokens_(tokens),
        codec_(testing::make_codec(kind, id, {}, testing::make_shape(head_dim, SIKV_FP16, kHeads),
                                   testing::cpu(), variant)),
        cache_({.num_kv_heads = kHeads, .head_dim = head_dim, .encoded = {tokens}},
               kind == SIKV_KEY_CODEC ? codec_.describe() : sikv_layout{},
               kind == SIKV_KEY_CODEC ? sikv_layout{} : codec_.describe()) {}

  double fit() {
    return time([&] { codec_.fit(prompt_.rows(&tokens_), cache_.view(), nullptr, nullptr); });
  }
  double encode() {
    static constexpr int32_t kFirstSlots[kHeads] = {};
    return time([&] {
      codec_.encode(prompt_.rows(&tokens_), kFirstSlots, cache_.view(), nullptr, nullptr);
    });
  }
  // Seconds per token, of every 7th of each head, 128 at a time as a rerank asks for them.
  double decode() {
    constexpr int kCount = 128, kStep = 7;
    const int32_t count = kCount;
    int32_t slots[kCount];
    decoded_.resize(static_cast<size_t>(kCount * cache_.spec().head_dim));
    int64_t tokens = 0;
    const double seconds = time([&] {
      for (int row = 0; row < kHeads; ++row) {
        for (int first = 0; first + kCount * kStep <= tokens_; first += kCount * kStep) {
          for (int i = 0; i < kCount; ++i) slots[i] = first + kStep * i;
          codec_.decode({&cache_.view(), row, 1, count, 0, slots, &count, decoded_.data()},
                        nullptr);
          tokens += kCount;
        }
      }
    });
    return seconds / static_cast<double>(tokens);
  }

  bool equals(const Side& other) const {
    for (int row = 0; row < kHeads; ++row) {
      if (cache_.row_bytes(kind_, row) != other.cache_.row_bytes(kind_, row)) return false;
    }
    return decoded_.size() == other.decoded_.size() &&
           std::memcmp(decoded_.data(), other.decoded_.data(), decoded_.size() * sizeof(float)) ==
               0;
  }

 private:
  sikv_kind kind_;
  const Prompt& prompt_;
  int32_t tokens_;
  CodecInstance codec_;
  TestCache cache_;
  std::vector<float> decoded_;
};

struct Times {
  double fit, encode, decode_ns;
};

// Keys and values of one pair, in turns.
struct Pair {
  Pair(const std::string& key_id, const std::string& value_id, const std::string& variant,
       const Prompt& k, const Prompt& v, int head_dim, int tokens)
      : keys(SIKV_KEY_CODEC, key_id, variant, k, head_dim, tokens),
        values(SIKV_VALUE_CODEC, value_id, variant, v, head_dim, tokens) {}

  // Medians; of `least` runs or more.
  Times time(double seconds, size_t least) {
    std::vector<double> fit, encode, decode;
    const double begin = thread_seconds();
    while (fit.size() < least || thread_seconds() - begin < seconds) {
      fit.push_back(keys.fit() + values.fit());
      encode.push_back(keys.encode() + values.encode());
      decode.push_back(keys.decode() + values.decode());
    }
    return {median(fit), median(encode), 1e9 * median(decode)};
  }

  Side keys, values;
};

int run(const Flags& flags) {
  const std::pair<const char*, const char*> pairs[] = {{"sign_vq", "intq"}, {"rot_lm", "rot_lm"}};
  auto rows = nlohmann::ordered_json::array();
  for (const int head_dim : {64, 128}) {
    const Prompt k(head_dim, 1), v(head_dim, 2);
    for (const auto& [key, value] : pairs) {
      Pair checked(key, value, flags.variant, k, v, head_dim, kCheckedTokens);
      Pair ref(key, value, "ref", k, v, head_dim, kCheckedTokens);
      checked.time(0, 1);
      const Times slow = ref.time(flags.seconds / 2, 1);
      if (!checked.keys.equals(ref.keys) || !checked.values.equals(ref.values)) {
        std::fprintf(stderr, "%s+%s, D %d: %s differs from ref\n", key, value, head_dim,
                     flags.variant.c_str());
        return 1;
      }
      Pair timed(key, value, flags.variant, k, v, head_dim, kTokens);
      timed.time(0, 1);
      const Times fast = timed.time(flags.seconds, 5);
      const double rate = 2e-9 * k.bytes(kTokens) / (fast.fit + fast.encode);
      const double ref_rate = 2e-9 * k.bytes(kCheckedTokens) / (slow.fit + slow.encode);
      std::printf(
          "%-8s %-7s D %3d: %.2f GB/s (fit %.2f ms, encode %.2f ms), ref %.4f: %.0fx; "
          "decode of K and V %.0f ns per token, ref %.0f\n",
          key, value, head_dim, rate, 1e3 * fast.fit, 1e3 * fast.encode, ref_rate, rate / ref_rate,
          fast.decode_ns, slow.decode_ns);
      rows.push_back({{"keys", key},
                      {"values", value},
                      {"head_dim", head_dim},
                      {"gb_per_s", rate},
                      {"fit_s", fast.fit},
                      {"encode_s", fast.encode},
                      {"ref_gb_per_s", ref_rate},
                      {"speedup", rate / ref_rate},
                      {"decode_ns", fast.decode_ns},
                      {"ref_decode_ns", slow.decode_ns}});
    }
  }
  if (!flags.json.empty()) {
    const nlohmann::ordered_json result = {
        {"compiler", kCompiler}, {"tokens", kTokens}, {"kv_heads", kHeads}, {"rows", rows}};
    std::ofstream(flags.json) << result.dump(1) << "\n";
  }
  return 0;
}

}  // namespace
}  // namespace sikv

int main(int argc, char** argv) {
  sikv::Flags flags;
  for (int i = 1; i + 1 < argc; i += 2) {
    const std::string name = argv[i];
    if (name == "--seconds") {
      flags.seconds = std::atof(argv[i + 1]);
    } else if (name == "--json") {
      flags.json = argv[i + 1];
    } else if (name == "--variant") {
      flags.variant = argv[i + 1];
    } else {
      argc = 0;
    }
  }
  if (argc % 2 == 0) {
    std::fprintf(stderr, "usage: encode_bench [--seconds S] [--json FILE] [--variant V]\n");
    return 2;
  }
  return sikv::run(flags);
}
