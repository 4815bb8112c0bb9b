// The last queries of every prompt, as a selector gets them to observe.
#ifndef SIKV_PLUGINS_SDK_PROMPT_QUERIES_H_
#define SIKV_PLUGINS_SDK_PROMPT_QUERIES_H_

#include <cstdint>

#include "plugins/abi/sikv_selector.h"
#include "plugins/sdk/view.h"

namespace sikv {

// [B, W, Hq, D]: a sequence's last W prompt positions; shorter prompts are padded in front, so that
// queries are counted from the end.
class PromptQueries {
 public:
  PromptQueries(const sikv_observe_args& args, int num_query_heads)
      : args_(args), heads_(num_query_heads), group_(heads_ / args.view->num_kv_heads) {}

  int count() const { return args_.num_queries; }  // W
  // out [G, D] = the heads that a row answers, of the query `back` before the prompt's end; 1 is the
  // last.
  void load_group(int row, int64_t back, float* out) const {
    const sikv_cache_view& view = *args_.view;
    const int64_t b = row / view.num_kv_heads, h = row % view.num_kv_heads;
    const int64_t query = (b + 1) * args_.num_queries - back;
    load_floats(args_.queries, view.dtype, (query * heads_ + h * group_) * view.head_dim,
                group_ * view.head_dim, out);
  }

 private:
  const sikv_observe_args& args_;
  int heads_, group_;
};

}  // namespace sikv

#endif  // SIKV_PLUGINS_SDK_PROMPT_QUERIES_H_
