#include "selectors/pqcache/pqcache.h"
#include "selectors/pqcache/product_quantiser.h"

namespace sikv::pqcache {
namespace {

struct State {
  ProductQuantiser quantiser;
  std::vector<uint8_t> codes;  // [pages, subspaces, 256]
  int64_t count = 0;

  int64_t tokens() const { return count; }
  uint64_t bytes() const { return quantiser.bytes() + codes.size(); }
};

class PqCache : public KeySelector<State> {
 public:
  PqCache(const CreateArgs& args, const RowMath& math, CodeLogits code_logits)
      : KeySelector(args, math, args.options.integer("fit_tokens")),
        subspaces_(static_cast<int>(args.options.integer("subspaces"))),
        entries_(1 << args.options.integer("bits")),
        iterations_(static_cast<int>(args.options.integer("iterations"))),
        sinks_(args.options.integer("sinks")),
        recent_(args.options.number("recent")),
        code_logits_(code_logits) {
    if (args.shape.head_dim % subspaces_ != 0) {
      throw Refused("heads of " + std::to_string(args.shape.head_dim) +
                    " channels cannot be cut into " + std::to_string(subspaces_) +
                    " equal parts; choose `subspaces` so that it divides them");
    }
  }

 protected:
  // On all but the sinks, which are unlike other keys and never ranked; on them where there is
  // nothing else.
  void fit(const PromptRow& prompt, State& state) override {
    const int dim = prompt.head_dim;
    const int skipped = prompt.count > sinks_ ? static_cast<int>(sinks_) : 0;
    state.quantiser =
        ProductQuantiser(std::span(prompt.keys).subspan(static_cast<size_t>(skipped * dim)),
                         prompt.count - skipped, dim, subspaces_, entries_, iterations_);
  }

  void add(const float* keys, int count, int64_t first, State& state) override {
    state.count = std::max(state.count, first + count);
    const int64_t page_bytes = int64_t{subspaces_} * SIKV_PAGE_TOKENS;
    const int64_t pages = (state.count + SIKV_PAGE_TOKENS - 1) / SIKV_PAGE_TOKENS;
    state.codes.resize(static_cast<size_t>(pages * page_bytes));
    for (int t = 0; t < count; ++t) {
      uint8_t codes[8];
      state.quantiser.encode(keys + t * shape().head_dim, codes);
      const int64_t position = first + t, page = position / SIKV_PAGE_TOKENS;
      uint8_t* at = state.codes.data() + page * page_bytes + position % SIKV_PAGE_TOKENS;
      for (int s = 0; s < subspaces_; ++s) at[s * SIKV_PAGE_TOKENS] = codes[s];
    }
  }

  int score(const RowQuery& query, const State& state, float* logits, int64_t stride) override {
    const int tables = subspaces_ * entries_;
    std::vector<float> all(static_cast<size_t>(query.group * tables)), q;
    for (int g = 0; g < query.group; ++g) {
      q.assign(query.heads + g * query.head_dim, query.heads + (g + 1) * query.head_dim);
      for (float& x : q) x *= query.scale;
      state.quantiser.tables(q.data(), all.data() + g * tables);
    }
    code_logits_({state.codes.data(), all.data(), subspaces_, entries_, query.group, query.tokens},
                 logits, stride);
    return query.group;
  }

  uint64_t scan_bytes(const RowQuery& query, const State& state) const override {
    return state.quantiser.bytes() + static_cast<uint64_t>(query.tokens * subspaces_);
  }

  void force(const RowQuery& query, float* scores) const override {
    const int n = query.view.encoded_len(query.row);
    int64_t room = query.budget;
    for (int slot = 0; slot < n && query.view.position(query.row, slot) < sinks_; ++slot) {
      if (take(query, slot, scores)) --room;
    }
    take_newest(query, static_cast<int64_t>(recent_ * static_cast<double>(query.budget)), room,
                scores);
  }

 private:
  int subspaces_, entries_, iterations_;
  int64_t sinks_;
  double recent_;
  CodeLogits code_logits_;
};

void code_logits(const CodeRequest& request, float* logits, int64_t stride) {
  for (int g = 0; g < request.group; ++g) {
    for (int64_t i = 0; i < request.tokens; ++i) {
      const int64_t page = i / SIKV_PAGE_TOKENS, t = i % SIKV_PAGE_TOKENS;
      const uint8_t* codes = request.codes + page * request.subspaces * SIKV_PAGE_TOKENS + t;
      const float* table = request.tables + g * request.subspaces * request.entries;
      float sum = 0.0f;
      for (int s = 0; s < request.subspaces; ++s) {
        sum += table[s * request.entries + codes[s * SIKV_PAGE_TOKENS]];
      }
      logits[g * stride + i] = sum;
    }
  }
}

}  // namespace

std::unique_ptr<Selector> make(const CreateArgs& args, const RowMath& math,
                               CodeLogits code_logits) {
  return std::make_unique<PqCache>(args, math, code_logits);
}

std::unique_ptr<Selector> make_ref(const CreateArgs& args) {
  return make(args, kRefRowMath, code_logits);
}

}  // namespace sikv::pqcache
