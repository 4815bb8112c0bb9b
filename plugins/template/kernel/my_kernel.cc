// my_kernel: attention over pinned, selected and tail tokens, one pass, any codec.
//
// A worker takes a KV head, decodes its tokens a block at a time and keeps a running softmax for
// each query head of the group: | m largest logit | l sum of exp(logit - m) | sum of exp(...) v |.
// All of it lives in the workspace that plan asked for: run allocates nothing.
#include <algorithm>
#include <array>
#include <cmath>
#include <limits>

#include "plugins/sdk/plugin.h"

namespace {

constexpr sikv_option_spec kOptions[] = {
    sikv::int_option("block", "32", 1, 64, "tokens decoded at a time"),
};
constexpr size_t kLargestBlock = 64;

class MyKernel final : public sikv::Kernel {
 public:
  explicit MyKernel(const sikv::CreateArgs& args)
      : host_(args.host),
        workers_(std::max(args.device.num_threads, 1)),
        head_dim_(args.shape.head_dim),
        group_(args.group()),
        block_(static_cast<size_t>(args.options.integer("block"))) {}

  uint64_t plan(int32_t) override {
    return static_cast<uint64_t>(workers_) * worker_floats() * sizeof(float);
  }

  void run(const sikv_attend_args& args, const sikv::CacheView& view,
           sikv::Launch launch) override {
    sikv::parallel_for(host_, view.num_rows(), [&](int64_t row, int32_t worker) {
      float* scratch = static_cast<float*>(launch.workspace) + worker * worker_floats();
      attend(args, view, static_cast<int>(row), scratch);
    });
  }

 private:
  // q [G, D], state [G, D + 2], k and v [block, D].
  int64_t worker_floats() const {
    return int64_t{group_} * (2 * head_dim_ + 2) + 2 * static_cast<int64_t>(block_) * head_dim_;
  }

  void attend(const sikv_attend_args& args, const sikv::CacheView& view, int row,
              float* scratch) const {
    const sikv::QueryView queries(args.q, view, args.num_query_heads);
    float* const q = scratch;
    float* const states = q + group_ * head_dim_;
    float* const k = states + group_ * (head_dim_ + 2);
    float* const v = k + static_cast<int64_t>(block_) * head_dim_;
    queries.load_group(row, q);
    std::fill_n(states, group_ * (head_dim_ + 2), 0.0f);
    for (int g = 0; g < group_; ++g) {
      states[g * (head_dim_ + 2)] = -std::numeric_limits<float>::infinity();
    }
    // One token of k and v, for every query head of the group.
    const auto add = [&](const float* key, const float* value) {
      for (int g = 0; g < group_; ++g) {
        float logit = 0.0f;
        for (int d = 0; d < head_dim_; ++d) logit += q[g * head_dim_ + d] * key[d];
        add_token(logit * args.scale, value, states + g * (head_dim_ + 2));
      }
    };

    const int pinned = static_cast<int>(view.pinned_slots(row).size());
    for (int i = 0; i < pinned; ++i) {
      view.load_pinned_k(row, i, k);
      view.load_pinned_v(row, i, v);
      add(k, v);
    }
    std::array<int32_t, kLargestBlock> slots;
    size_t waiting = 0;
    const auto flush = [&] {
      view.key().decode(row, {slots.data(), waiting}, k);
      view.value().decode(row, {slots.data(), waiting}, v);
      for (size_t i = 0; i < waiting; ++i) add(k + i * head_dim_, v + i * head_dim_);
      waiting = 0;
    };
    sikv::for_each_selected(view, sikv::SelectionRow(args.selection, row), row, [&](int32_t slot) {
      slots[waiting++] = slot;
      if (waiting == block_) flush();
    });
    flush();
    for (int i = 0; i < view.tail_len(row / view.num_kv_heads()); ++i) {
      view.load_tail_k(row, i, k);
      view.load_tail_v(row, i, v);
      add(k, v);
    }

    for (int g = 0; g < group_; ++g) {
      const float* state = states + g * (head_dim_ + 2);
      const int64_t head = queries.first_head(row) + g;
      for (int d = 0; d < head_dim_; ++d) {
        args.out[head * head_dim_ + d] = state[1] == 0.0f ? 0.0f : state[2 + d] / state[1];
      }
      args.lse[head] = state[0] + std::log(state[1]);  // -inf where nothing was attended to
    }
  }

  void add_token(float logit, const float* value, float* state) const {
    if (logit > state[0]) {
      const float down = std::exp(state[0] - logit);
      for (int i = 1; i < head_dim_ + 2; ++i) state[i] *= down;
      state[0] = logit;
    }
    const float weight = std::exp(logit - state[0]);
    state[1] += weight;
    for (int d = 0; d < head_dim_; ++d) state[2 + d] += weight * value[d];
  }

  const sikv_host& host_;
  int workers_, head_dim_, group_;
  size_t block_;
};

std::unique_ptr<sikv::Kernel> make(const sikv::CreateArgs& args) {
  return std::make_unique<MyKernel>(args);
}

}  // namespace

SIKV_PLUGIN("my_kernel", "0.1.0", SIKV_CPU, SIKV_KIND_BIT(SIKV_KERNEL),
            sikv::kernel<make, kOptions>("ref"))
