// vpshufbitqmb, which picks a token's signs, comes with AVX3_DL.
#ifndef HWY_WANT_AVX3_DL
#define HWY_WANT_AVX3_DL
#endif

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/common/flash_cpu.cc"
#include "hwy/foreach_target.h"  // must come before highway.h
#include "hwy/highway.h"

#include "kernels/common/flash_cpu.h"
#include "kernels/common/simd_attention.h"
#include "kernels/common/simd_rotate_rows.h"
#include "kernels/common/simd_rows.h"
#include "kernels/common/stored_rows.h"

HWY_BEFORE_NAMESPACE();
namespace sikv {
namespace HWY_NAMESPACE {

#if HWY_TARGET == HWY_SCALAR

const FlashSimd* TargetFlashSimd() { return nullptr; }

#else

template <bool kInverse>
void Rotate(size_t head_dim, float* x) {
  RotateRows<kInverse>(head_dim, 1, x);
}

const FlashSimd* TargetFlashSimd() {
  static constexpr FlashSimd kSimd = {AttendRows, LoadRow, Rotate<false>, Rotate<true>};
  return &kSimd;
}

#endif

}  // namespace HWY_NAMESPACE
}  // namespace sikv
HWY_AFTER_NAMESPACE();

#if HWY_ONCE

#include <atomic>
#include <memory>

namespace sikv {

HWY_EXPORT(TargetFlashSimd);

const FlashSimd* flash_simd() { return HWY_DYNAMIC_DISPATCH(TargetFlashSimd)(); }

int32_t probe_flash_cpu(const sikv_device*, sikv_message* reason) {
  if (flash_simd() != nullptr) return 10;
  sdk::write_message(reason, "the processor has no vector instructions that Highway supports");
  return 0;
}

// One worker's memory.
struct FlashCpu::Worker {
  static int64_t floats(int group, int dim) {
    return int64_t{PaddedHeads(group)} * dim + HeadFloats(group, dim);
  }
  AttendScratch scratch;
  // [PaddedHeads(G), D] queries, [HeadFloats(G, D)]; behind the struct.
  float* queries() { return reinterpret_cast<float*>(this + 1); }
  float* heads(int group, int dim) { return queries() + PaddedHeads(group) * dim; }
};

// One call of run: the workspace, carved, and the tasks.
class FlashCpu::Run {
 public:
  Run(const FlashCpu& flash, const sikv_attend_args& args, const CacheView& view, void* workspace,
      Encoded encoded, const EncodedRows& rows)
      : flash_(flash),
        simd_(*flash_simd()),
        args_(args),
        view_(view),
        encoded_(encoded),
        rows_(rows) {
    size_t room = flash.workspace_bytes();
    auto* at = static_cast<std::byte*>(std::align(64, 1, workspace, room));
    workers_ = at;
    at += flash.worker_bytes() * static_cast<size_t>(flash.workers_);
    states_ = reinterpret_cast<float*>(at);
    at += flash.state_bytes() * static_cast<size_t>(flash.rows_);
    open_tasks_ = reinterpret_cast<int32_t*>(at);
    for (int row = 0; row < view.num_rows(); ++row) open_tasks_[row] = splits(row) + 1;
  }

  // Task i; tasks of the encoded tokens come first, they are the longest.
  void task(int64_t i, int32_t worker) {
    const int row = static_cast<int>(i % view_.num_rows());
    const int part = static_cast<int>(i / view_.num_rows());
    if (part < kMaxSplits && part >= splits(row)) return;
    Worker& local =
        *reinterpret_cast<Worker*>(workers_ + flash_.worker_bytes() * static_cast<size_t>(worker));
    load_queries(row, local.queries());
    if (part < kMaxSplits) {
      attend_encoded(row, part, local);
    } else {
      attend_exact(row, local);
    }
    std::atomic_ref<int32_t> open(open_tasks_[row]);
    if (open.fetch_sub(1, std::memory_order_acq_rel) == 1) finish(row, local);
  }
  int64_t num_tasks() const { return int64_t{view_.num_rows()} * (kMaxSplits + 1); }

 private:
  bool ranges(int row) const {
    return encoded_ == Encoded::kAll || SelectionRow(args_.selection, row).all();
  }
  int32_t visited(int row) const {
    return ranges(row) ? view_.encoded_len(row) : args_.selection.counts[row];
  }
  int splits(int row) const {
    return std::clamp((visited(row) + kSplitTokens - 1) / kSplitTokens, 1, kMaxSplits);
  }
  float* states(int row, int state) const {
    return states_ +
           (int64_t{row} * kStates + state) * flash_.group_ * FlashState::floats(flash_.dim_);
  }
  FlashState state(int row, int part, int g) const {
    return FlashState(states(row, part) + g * FlashState::floats(flash_.dim_), flash_.dim_);
  }

  // q [PaddedHeads(G), D] = the row's queries times the scale of the logits.
  void load_queries(int row, float* q) const {
    const int dim = flash_.dim_, n = flash_.group_ * dim;
    const int64_t first = QueryView(args_.q, view_, args_.num_query_heads).first_head(row) * dim;
    const auto* from = static_cast<const char*>(args_.q) + first * sikv_dtype_bytes(view_.dtype());
    simd_.load(from, view_.dtype(), static_cast<size_t>(n), q);
    for (int i = 0; i < n; ++i) q[i] *= args_.scale;
    std::fill(q + n, q + PaddedHeads(flash_.group_) * dim, 0.0f);
  }

  void attend(const RowSource& keys, const RowSource& values, const SlotRange& slots, Worker& local,
              float* states) const {
    simd_.attend({&keys, &values, slots, flash_.group_, flash_.dim_, local.queries(),
                  &local.scratch, local.heads(flash_.group_, flash_.dim_), states});
  }

  void attend_encoded(int row, int split, Worker& local) const {
    const int64_t count = visited(row);
    const auto begin = static_cast<int32_t>(count * split / splits(row));
    const auto end = static_cast<int32_t>(count * (split + 1) / splits(row));
    SlotRange slots{nullptr, begin, end - begin, {}};
    if (!ranges(row)) {
      slots.listed = SelectionRow(args_.selection, row).slots().data() + begin;
    } else if (encoded_ == Encoded::kSelected) {
      slots.skip = view_.pinned_slots(row);
    }
    rows_.prepare(row, local.queries());
    attend(rows_.keys(row), rows_.values(row), slots, local, states(row, split));
  }

  void attend_exact(int row, Worker& local) const {
    const sikv_cache_view& raw = view_.raw();
    const int64_t bytes = int64_t{flash_.dim_} * sikv_dtype_bytes(raw.dtype);
    const auto dense = [&](const void* data, int64_t first, int64_t step) {
      return exact_rows(static_cast<const uint8_t*>(data) + first * bytes, raw.dtype,
                        step * flash_.dim_);
    };
    const int b = row / raw.num_kv_heads, h = row % raw.num_kv_heads;
    const int64_t pinned = int64_t{row} * raw.pinned_capacity;
    const int64_t tail = int64_t{b} * raw.tail_capacity * raw.num_kv_heads + h;
    const int32_t num_pinned = encoded_ == Encoded::kAll ? 0 : raw.pinned_len[row];
    attend(dense(raw.pinned_k, pinned, 1), dense(raw.pinned_v, pinned, 1),
           {nullptr, 0, num_pinned, {}}, local, states(row, kMaxSplits));
    attend(dense(raw.tail_k, tail, raw.num_kv_heads), dense(raw.tail_v, tail, raw.num_kv_heads),
           {nullptr, 0, raw.tail_len[b], {}}, local, states(row, kMaxSplits + 1));
  }

  void finish(int row, Worker& local) const {
    load_queries(row, local.queries());
    for (int g = 0; g < flash_.group_; ++g) {
      FlashState total = state(row, 0, g);
      for (int split = 1; split < splits(row); ++split) total.merge(state(row, split, g));
    }
    float* const shift = local.heads(flash_.group_, flash_.dim_);
    std::fill_n(shift, flash_.group_, 0.0f);
    // Rows that never had a token have no side tables either.
    const bool any = state(row, 0, 0).sum() > 0.0f;
    if (any) rows_.shift(row, local.queries(), shift);
    for (int g = 0; g < flash_.group_; ++g) {
      FlashState total = state(row, 0, g);
      total.shift_logits(shift[g]);
      if (any) rows_.restore(row, total.sum(), total.acc());
      total.merge(state(row, kMaxSplits, g));
      total.merge(state(row, kMaxSplits + 1, g));
      const int64_t head = QueryView(args_.q, view_, args_.num_query_heads).first_head(row) + g;
      args_.lse[head] = total.finish(args_.out + head * flash_.dim_);
    }
  }

  const FlashCpu& flash_;
  const FlashSimd& simd_;
  const sikv_attend_args& args_;
  const CacheView& view_;
  Encoded encoded_;
  const EncodedRows& rows_;
  std::byte* workers_;
  float* states_;        // [rows, kStates, G, FlashState::floats(D)]
  int32_t* open_tasks_;  // [rows]
};

FlashCpu::FlashCpu(const CreateArgs& args)
    : host_(args.host),
      group_(args.group()),
      dim_(args.shape.head_dim),
      rows_(args.shape.max_sequences * args.shape.num_kv_heads),
      workers_(args.device.num_threads) {}

size_t FlashCpu::worker_bytes() const {
  const auto bytes =
      sizeof(Worker) + sizeof(float) * static_cast<size_t>(Worker::floats(group_, dim_));
  return (bytes + 63) / 64 * 64;
}
size_t FlashCpu::state_bytes() const {
  return sizeof(float) * static_cast<size_t>(kStates * group_ * FlashState::floats(dim_));
}

uint64_t FlashCpu::workspace_bytes() const {
  return 64 + worker_bytes() * static_cast<size_t>(workers_) +
         (state_bytes() + sizeof(int32_t)) * static_cast<size_t>(rows_);
}

void FlashCpu::run(const sikv_attend_args& args, const CacheView& view, void* workspace,
                   Encoded encoded, const EncodedRows& rows) const {
  Run run(*this, args, view, workspace, encoded, rows);
  parallel_for(host_, run.num_tasks(), [&](int64_t i, int32_t worker) { run.task(i, worker); });
}

}  // namespace sikv

#endif  // HWY_ONCE
