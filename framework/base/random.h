// Seeded random numbers that are bit-identical on every platform and compiler: integer arithmetic,
// and floating point from + - * / and sqrt only, which IEEE 754 fixes exactly. (std:: distributions
// and libm's log, sin and cos differ between libraries.) Build users of this file that must
// stay identical too without fused multiply-add contraction (-ffp-contract=off) and without
// fast-math.
#ifndef SIKV_FRAMEWORK_BASE_RANDOM_H_
#define SIKV_FRAMEWORK_BASE_RANDOM_H_

#include <cstdint>
#include <span>

namespace sikv {

// The finaliser of splitmix64: a bijection of 64-bit words that scatters neighbouring inputs.
constexpr uint64_t mix64(uint64_t x) {
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
  return x ^ (x >> 31);
}

// splitmix64: advances `state` and returns the next word.
constexpr uint64_t splitmix64(uint64_t& state) { return mix64(state += 0x9e3779b97f4a7c15ull); }

// A seed for part `index` of what `seed` stands for; nest it to address (layer, head, token, ...).
constexpr uint64_t derive_seed(uint64_t seed, uint64_t index) {
  return mix64(seed ^ mix64(index + 0x9e3779b97f4a7c15ull));
}

// Quantile function of the standard normal distribution, 0 < p < 1 (algorithm AS 241, Wichura 1988;
// relative error about 1e-16).
double normal_quantile(double p);

class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed) {}

  uint64_t next() { return splitmix64(state_); }

  // Uniform in [0, 1), 53 bits.
  double uniform() { return static_cast<double>(next() >> 11) * 0x1p-53; }

  // Standard normal.
  double normal();

  // Uniform in [0, n) without bias; n >= 1.
  uint64_t below(uint64_t n);

  // Standard normals, two from each word (32 bits each, so never beyond 6.4 sigma): the fast way to
  // many. The stream differs from that of normal().
  void fill_normal(std::span<float> out);

 private:
  uint64_t state_;
};

}  // namespace sikv

#endif  // SIKV_FRAMEWORK_BASE_RANDOM_H_
