// Synthetic keys, values and queries with the features of real ones that matter to a self-indexing
// cache; the same bits for the same spec on every machine.
//
// T = context + steps tokens, queries for the last num_queries positions. Everything is drawn per
// (layer, KV head); w, c, S, mu belong to the model and are shared by all sequences. N is standard
// normal noise, D is head_dim.
//
// gaussian   k, v, q = N.
//
// clustered  Works in a whitened space, x for keys and y for queries:
//
//              k = mu + S x       S = 8 on D/32 outlier channels, 1 on the others; mu = S N: a mean
//                                 far from zero, as real keys have it
//              q = y / S          so q.k = y.x + q.mu, and the second term is the same for all keys
//              x = 0.7 c + 0.714 N      c: one of 64 centres (N) for each run of 16 tokens
//              y = a + sqrt(D) w        w: a unit vector; a is made orthogonal to it
//              a(t) = 0.9 a(t-1) + 0.436 (0.8 N + 0.6 N')   N: shared in the GQA group, N': the
//                                                           query head's own
//              v = 0.3 N + 0.7 c' + 0.714 N'                0.3 N: the head's mean
//
//            Scores y.x / sqrt(D) of ordinary tokens have variance 2, so their log-sum-exp is near
//            L = log T + 1. Positions i = 0..3 are sinks: x = (L - i) w + 0.1 N, with N orthogonal
//            to w, scores L - i with every query, up to small noise; the four hold about 60 % of
//            the mass. Their values are 0.02 N.
//
// needle     clustered, and for each decode step j one key at needle_positions[j]: distinct random
//            positions, the same in all layers and heads, behind the sinks and before the newest
//            min(256, context / 4) prompt tokens. With a unit vector u per step, orthogonal to w:
//
//              x = s/2 u          the needle's key
//              y                  of that step: its component along u is replaced by 2 sqrt(D), so
//                                 that the score is s
//              s = log T + 3 + 4 + 48 / sqrt(T)
//              v = 3 * a random sign per channel
//
//            Ordinary scores then have variance 6 and a log-sum-exp near log T + 3; the last term
//            covers its scatter where tokens are few. The needle holds 95 % of the mass as a rule;
//            the worst of 150 000 draws at contexts from 64 to 4096 held 67 %. To the queries of
//            other steps it is an ordinary token. Missing it moves the output by more than half
//            its length.
//
// tile_tokens > 0 draws only that many tokens and repeats them, with the signs of x and v - mean
// flipped at random per (sequence, tile, head, channel): a fill at the speed of memory for
// throughput runs. Sinks, needles and queries are as above.
#ifndef SIKV_FRAMEWORK_TRACE_SYNTH_H_
#define SIKV_FRAMEWORK_TRACE_SYNTH_H_

#include <cstdint>
#include <filesystem>
#include <memory>
#include <string_view>
#include <vector>

#include "framework/trace/trace.h"

namespace sikv {

enum class SynthKind { kGaussian, kClustered, kNeedle };

// From its name in lower case; anything else is an Error.
SynthKind parse_synth_kind(std::string_view name);
std::string_view synth_kind_name(SynthKind kind);

// Queries drawn of the last prompt positions, beside those of the steps.
inline constexpr int64_t kSynthPromptQueries = 64;

struct SynthSpec {
  SynthKind kind = SynthKind::kClustered;
  int64_t context = 4096;  // prompt tokens
  int64_t steps = 32;      // decode tokens after it
  int batch = 1;           // sequences
  int num_layers = 1;
  int num_query_heads = 8;
  int num_kv_heads = 2;
  int head_dim = 128;
  int32_t dtype = SIKV_FP16;
  uint64_t seed = 1;
  int64_t num_queries = 0;  // 0: kSynthPromptQueries (or all) and every step
  int64_t tile_tokens = 0;  // 0: every token is drawn; 4096 is a good size for throughput runs
};

class Synthesizer {
 public:
  // A spec that cannot be met is an Error.
  explicit Synthesizer(const SynthSpec& spec);
  ~Synthesizer();
  Synthesizer(Synthesizer&&) noexcept;
  Synthesizer& operator=(Synthesizer&&) noexcept;

  // As given, with num_queries filled in.
  const SynthSpec& spec() const;
  TraceMeta meta() const;

  // Overwrites `out`, reusing its memory. With tiles, visit all sequences of a layer before the
  // next layer: the drawn tile is kept.
  void fill(int sequence, int layer, TraceLayer& out);

  // [steps] for kind needle, else empty.
  std::vector<int64_t> needle_positions(int sequence) const;

  // [context + steps], below 32000.
  std::vector<int32_t> tokens(int sequence) const;

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

// One sequence, all layers.
void write_trace(const std::filesystem::path& path, Synthesizer& synthesizer, int sequence);

}  // namespace sikv

#endif  // SIKV_FRAMEWORK_TRACE_SYNTH_H_
