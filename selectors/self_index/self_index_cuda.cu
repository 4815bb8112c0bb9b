// The selector on a GPU: one launch scans and selects (self_index_scan.cuh), one more ranks the
// candidates by their decoded keys (self_index_rerank.cuh). What lives between steps is in device
// memory, and which rows are due is found there, so that a captured step serves any mix.

#include <algorithm>
#include <cmath>
#include <memory>
#include <string>
#include <vector>

#include "kernels/common/cuda_launch.h"
#include "kernels/common/warp_rows.cuh"
#include "plugins/sdk/scan_cost.h"
#include "plugins/sdk/select.h"
#include "selectors/self_index/self_index.h"
#include "selectors/self_index/self_index_cuda.h"
#include "selectors/self_index/self_index_engine.h"
#include "selectors/self_index/self_index_tables.h"

namespace sikv::self_index {
namespace {

// Device memory, zeroed on the default stream unless asked for without.
template <typename T>
class DeviceArray {
 public:
  DeviceArray() = default;
  explicit DeviceArray(int64_t n, bool zeroed = true) : bytes_(static_cast<size_t>(n) * sizeof(T)) {
    if (n == 0) return;
    const cudaError_t status = cudaMalloc(&data_, bytes_);
    if (status == cudaErrorMemoryAllocation) {
      cudaGetLastError();
      throw Refused("self_index needs " + std::to_string(bytes_ >> 20) +
                    " MB of device memory for its state and the GPU has less free: lower batch, "
                    "context or budget");
    }
    cuda::check(status, "self_index: cudaMalloc");
    if (zeroed) cuda::check(cudaMemset(data_, 0, bytes_), "self_index: cudaMemset");
  }
  DeviceArray(DeviceArray&& other) noexcept { swap(other); }
  DeviceArray& operator=(DeviceArray&& other) noexcept {
    swap(other);
    return *this;
  }
  ~DeviceArray() { cudaFree(data_); }

  T* data() const { return static_cast<T*>(data_); }
  size_t bytes() const { return bytes_; }

 private:
  void swap(DeviceArray& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(bytes_, other.bytes_);
  }
  void* data_ = nullptr;
  size_t bytes_ = 0;
};

// What a replay takes beside one query tile of one row, at most: all 48 queries of 8 rows of 128K
// tokens.
constexpr int64_t kReplayBytes = int64_t{256} << 20;

// What lies in the workspace of a step of `rows` rows.
struct Workspace {
  // `listed`: candidates of a row. Without a reranker nothing is needed.
  Workspace(Arena& arena, int rows, int64_t listed, int group, const Reranker* reranker) {
    if (reranker == nullptr) return;
    found = arena.take<int32_t>(rows);
    candidates = arena.take<int32_t>(rows * listed);
    logits = arena.take<float>(rows * reranker->most() * padded_heads(group));
    sums = arena.take<float2>(reranker->num_sums(rows) * group);
  }

  int32_t* found = nullptr;       // [rows]
  int32_t* candidates = nullptr;  // [rows, listed]
  float* logits = nullptr;        // [rows, most, padded_heads(G)]
  float2* sums = nullptr;         // [num_sums, G]
};

class SelfIndexCuda final : public Selector {
 public:
  explicit SelfIndexCuda(const CreateArgs& args)
      : config_(args.options),
        shape_(args.shape),
        device_(args.device),
        group_(args.group()),
        capacity_(selection_capacity(config_.budget, args.shape)),
        scanned_(std::min<int64_t>(shape_.max_tokens, config_.candidates(capacity_))) {
    if (shape_.head_dim != 64 && shape_.head_dim != 96 && shape_.head_dim != 128 &&
        shape_.head_dim != 256) {
      throw Refused("self_index on a GPU takes head_dim 64, 96, 128 or 256, not " +
                    std::to_string(shape_.head_dim) + ": run on device cpu");
    }
    if (group_ > kMaxGroup) {
      throw Refused("self_index on a GPU takes up to 16 query heads per KV head, not " +
                    std::to_string(group_) + ": run on device cpu");
    }
  }

  void accepts(const LayoutView& layout) override {
    check_layout(layout, config_);
    cuda::RowStore keys;
    cuda::read_key_layout(layout, keys);
    // Copies of every eighth token or more would save little over reading them where they lie.
    packs_ = config_.pooled() && cuda::tile_reads(keys) && scanned_ * 8 <= shape_.max_tokens;
    packed_scale_bytes_ = keys.kind == cuda::RowKind::kSignLevels ? 2 : 16;
  }

  Plan plan() override {
    cuda::check(cudaSetDevice(device_.ordinal), "self_index: cudaSetDevice");
    const int rows = shape_.max_sequences * shape_.num_kv_heads;
    scanner_ =
        std::make_unique<Scanner>(device_, shape_.head_dim, config_.integer_scores(),
                                  config_.group == Group::kMean ? 1 : group_, shape_.max_tokens);
    if (config_.rerank > 1 || config_.pooled()) {
      const int64_t most = scanned_ + (config_.pooled() ? kNewSlots : 0);
      reranker_ = std::make_unique<Reranker>(device_, most);
    }
    teams_ = DeviceArray<TeamState>(rows);
    counts_ = DeviceArray<RowCounts>(rows);
    if (config_.pooled()) {
      const int64_t all = int64_t{shape_.num_layers} * rows;
      states_ = DeviceArray<PoolState>(all);
      steps_ = DeviceArray<int64_t>(all);
      pools_ = DeviceArray<int32_t>(all * scanned_);
      order_ = DeviceArray<int32_t>(rows + 1);
      if (packs_) {
        packed_signs_ = DeviceArray<uint32_t>(all * scanned_ * 4);
        packed_levels_ = DeviceArray<uint64_t>(all * scanned_ * 4);
        packed_scales_ = DeviceArray<uint8_t>(all * scanned_ * packed_scale_bytes_);
      }
      if (config_.refreshes()) {
        scan_queries_ = DeviceArray<float>(all * shape_.head_dim);
        prompt_means_ = DeviceArray<float>(all * shape_.head_dim);
      }
    }
    Arena counting(nullptr);
    Workspace(counting, rows, listed(), group_, reranker_.get());
    return {capacity_, counting.used()};
  }

  void begin_sequence(int sequence) override {
    if (!config_.pooled()) return;
    const auto clear = [&](auto* data, size_t each) {
      if (data == nullptr) return;
      const size_t heads = static_cast<size_t>(shape_.num_kv_heads);
      const size_t size = sizeof(*data) * each * heads;
      cuda::check(cudaMemset2DAsync(data + static_cast<size_t>(sequence) * heads * each,
                                    size * static_cast<size_t>(shape_.max_sequences), 0, size,
                                    static_cast<size_t>(shape_.num_layers)),
                  "self_index: cudaMemset2DAsync");
    };
    clear(states_.data(), 1);
    clear(prompt_means_.data(), static_cast<size_t>(shape_.head_dim));
  }

  // Steps are counted on the device, by every run. Where the caller's count does not go on from
  // there (a new prompt), it is taken over.
  void begin_step(int64_t step) override {
    if (replay_memory_.bytes() > 0) replay_memory_ = {};  // the prompt is over
    if (config_.pooled() && step != next_step_) {
      cuda::check(cudaDeviceSynchronize(), "self_index: waiting for the last step");
      const std::vector<int64_t> steps(steps_.bytes() / sizeof(int64_t), step);
      cuda::check(cudaMemcpy(steps_.data(), steps.data(), steps_.bytes(), cudaMemcpyHostToDevice),
                  "self_index: cudaMemcpy");
    }
    next_step_ = step + 1;
  }

  void observe(const sikv_observe_args& args, const CacheView& view, Launch launch) override {
    if (!config_.auto_schedule && !config_.refreshes()) return;
    const cudaStream_t stream = cuda::stream(launch);
    const int count = std::min(config_.window, args.num_queries);
    Step step = make_step(view.raw());
    if (config_.refreshes()) run_learn_mean(args, count, group_, step.pool.prompt_mean, stream);
    if (config_.auto_schedule) replay(args, view, step, count, stream);
  }

  void run(const sikv_select_args& args, const CacheView& view, Launch launch) override {
    const cudaStream_t stream = cuda::stream(launch);
    const int rows = view.num_rows();
    if (rows == 0) return;
    Arena arena(static_cast<std::byte*>(launch.workspace));
    const Workspace workspace(arena, rows, listed(), group_, reranker_.get());
    Step step = make_step(view.raw());
    step.q = args.q;
    step.q_stride = int64_t{args.num_query_heads} * shape_.head_dim;
    step.scale = args.scale;
    step.counts = counts_.data();
    ScanArgs scan = make_scan(view.raw(), step);
    if (reranker_ == nullptr) {
      scan.slots = args.selection.slots;
      scan.capacity = args.selection.capacity;
      scan.found = args.selection.counts;
      scanner_->run(scan, stream);
      return;
    }
    scan.slots = workspace.candidates;
    scan.capacity = scanned_;
    scan.found = workspace.found;
    scanner_->run(scan, stream);

    RerankArgs rerank{};
    rerank.view = view.raw();
    rerank.step = step;
    rerank.keys = cuda::key_rows(view.raw().key);
    rerank.candidates = workspace.candidates;
    rerank.capacity = scanned_;
    rerank.found = workspace.found;
    rerank.selection = args.selection;
    rerank.logits = workspace.logits;
    rerank.sums = workspace.sums;
    reranker_->run(rerank, stream);
  }

  uint64_t state_bytes() const override {
    return teams_.bytes() + counts_.bytes() + states_.bytes() + steps_.bytes() + pools_.bytes() +
           packed_signs_.bytes() + packed_levels_.bytes() + packed_scales_.bytes() +
           scan_queries_.bytes() + prompt_means_.bytes() + order_.bytes() + replay_memory_.bytes();
  }

  void counters(const std::function<void(std::string_view, double)>& push) const override {
    std::vector<RowCounts> counts(counts_.bytes() / sizeof(RowCounts));
    cuda::check(cudaMemcpy(counts.data(), counts_.data(), counts_.bytes(), cudaMemcpyDeviceToHost),
                "self_index: cudaMemcpy");
    RowCounts sum{};
    for (const RowCounts& row : counts) {
      sum.rows += row.rows;
      sum.scans += row.scans;
      sum.read += row.read;
    }
    push("rows", static_cast<double>(sum.rows));
    push("scans", static_cast<double>(sum.scans));
    push("runs", static_cast<double>(sum.rows));
    push("scan_bytes", static_cast<double>(sum.read));
  }

 private:
  // Candidates of a row that the workspace holds.
  int64_t listed() const { return reranker_ != nullptr && !config_.pooled() ? scanned_ : 0; }

  Step make_step(const sikv_cache_view& view) const {
    Step step{};
    step.budget_count = config_.budget.count;
    step.budget_fraction = config_.budget.fraction;
    step.rerank = config_.rerank;
    step.six_bit = config_.six_bit;
    step.norm_weighting = config_.norm_weighting;
    step.max_over_heads = config_.group == Group::kMaxOverHeads;
    step.rotated = is_rotated(LayoutView(*view.key.layout));
    step.scan_every = config_.scan_every;
    step.stagger = config_.stagger;
    step.refresh_cosine = config_.refresh_cosine;
    const sikv_layout& keys = *view.key.layout;
    const auto page_bytes = [&](sikv_role role) {
      return plane_bytes(keys.planes[LayoutView(keys).plane(role)], SIKV_PAGE_TOKENS);
    };
    step.index_page_bytes =
        page_bytes(SIKV_INDEX_CODE) + (config_.norm_weighting ? page_bytes(SIKV_SCALE) : 0);
    step.key_page_bytes = stored_bytes(keys, SIKV_PAGE_TOKENS);
    step.exact_key_bytes = int64_t{shape_.head_dim} * sikv_dtype_bytes(shape_.dtype);
    step.group = group_;
    step.teams = teams_.data();
    if (config_.pooled()) {
      const int64_t first = int64_t{view.layer} * shape_.max_sequences * shape_.num_kv_heads;
      step.pool.state = states_.data() + first;
      step.pool.step = steps_.data() + first;
      step.pool.slots = pools_.data() + first * scanned_;
      step.pool.capacity = scanned_;
      step.pool.num_due = order_.data();
      step.pool.order = order_.data() + 1;
      if (packs_) {
        step.pool.packed = {packed_signs_.data() + first * scanned_ * 4,
                            packed_levels_.data() + first * scanned_ * 4,
                            packed_scales_.data() + first * scanned_ * packed_scale_bytes_};
      }
      if (config_.refreshes()) {
        step.pool.scan_query = scan_queries_.data() + first * shape_.head_dim;
        step.pool.prompt_mean = prompt_means_.data() + first * shape_.head_dim;
      }
    }
    return step;
  }

  ScanArgs make_scan(const sikv_cache_view& view, const Step& step) const {
    ScanArgs scan{};
    scan.view = view;
    scan.step = step;
    scan.pass = {0, view.num_sequences * view.num_kv_heads, 1};
    scan.index = cuda::plane_of(view.key, SIKV_INDEX_CODE);
    scan.weights = cuda::plane_of(view.key, SIKV_SCALE);
    scan.codebook = cuda::table_of(view.key, SIKV_CODEBOOK);
    return scan;
  }

  // Passes of as many queries as kReplayBytes allow for all rows, or of some queries for some rows.
  void replay(const sikv_observe_args& args, const CacheView& view, Step step, int count,
              cudaStream_t stream) {
    const int rows = view.num_rows(), tokens = std::max(args.keys.max_count, 1);
    ReplayArgs replay{};
    replay.view = view.raw();
    replay.keys = args.keys;
    replay.num_queries = count;
    replay.most_tokens = tokens;
    replay.capacity = scanned_;
    const int block = attend_tokens(shape_.head_dim);
    replay.blocks = (tokens + block - 1) / block;
    const int64_t list_bytes = int64_t{4} * (tokens + scanned_) +
                               static_cast<int64_t>(sizeof(TeamState)) +
                               int64_t{8} * group_ * (replay.blocks + 1);
    const int64_t lists = kReplayBytes / list_bytes;
    const auto whole_tiles = [](int64_t n) { return n / kQueryTile * kQueryTile; };
    const int most = std::min(kPassQueries, static_cast<int>(whole_tiles(count + kQueryTile - 1)));
    const int queries =
        std::max(kQueryTile, static_cast<int>(std::min<int64_t>(whole_tiles(lists / rows), most)));
    const int pass_rows = static_cast<int>(std::clamp<int64_t>(lists / queries, 1, rows));

    TeamState* teams = nullptr;
    int32_t *candidates = nullptr, *found = nullptr;
    const auto carve = [&](Arena arena) {
      const int64_t n = int64_t{pass_rows} * queries, sums = int64_t{pass_rows} * group_;
      teams = arena.take<TeamState>(n);
      replay.sums = arena.take<float2>(sums * replay.blocks * kPassQueries);
      replay.weights = arena.take<float2>(sums * kPassQueries);
      replay.probability = arena.take<float>(n * tokens);
      replay.candidates = candidates = arena.take<int32_t>(n * scanned_);
      replay.found = found = arena.take<int32_t>(n);
      replay.dropped = arena.take<double>(int64_t{rows} * count * kNumPeriods);
      return arena.used();
    };
    const size_t bytes = carve(Arena(nullptr));
    if (bytes > replay_memory_.bytes()) {
      replay_memory_ = {};
      replay_memory_ = DeviceArray<std::byte>(static_cast<int64_t>(bytes), false);
    }
    carve(Arena(replay_memory_.data()));
    const size_t team_bytes = sizeof(TeamState) * static_cast<size_t>(pass_rows * queries);
    cuda::check(cudaMemsetAsync(teams, 0, team_bytes, stream), "self_index: cudaMemsetAsync");

    const Pool pool = step.pool;
    const int64_t position = int64_t{shape_.num_query_heads} * shape_.head_dim;
    step.pool = {};
    step.teams = teams;
    step.scale = 1.0f / std::sqrt(static_cast<float>(shape_.head_dim));
    step.q_stride = args.num_queries * position;
    step.query_stride = position;
    step.prompt_len = args.prompt_len;
    for (int row = 0; row < rows; row += pass_rows) {
      for (int i = 0; i < count; i += queries) {
        step.q = static_cast<const std::byte*>(args.queries) +
                 (args.num_queries - count + i) * position * sikv_dtype_bytes(view.dtype());
        replay.pass = {row, std::min(pass_rows, rows - row), std::min(queries, count - i)};
        replay.step = step;
        replay.first_query = i;
        ScanArgs scan = make_scan(view.raw(), step);
        scan.pass = replay.pass;
        scan.slots = candidates;
        scan.capacity = scanned_;
        scan.found = found;
        scanner_->run(scan, stream);
        run_replay(replay, stream);
      }
    }
    replay.step.pool = pool;
    run_choose_period(replay, config_.tolerance, stream);
  }

  Config config_;
  sikv_shape shape_;
  sikv_device device_;
  int group_;
  int32_t capacity_;
  int64_t scanned_;     // candidates of one scan
  bool packs_ = false;  // the pool has copies of its keys
  int packed_scale_bytes_ = 0;
  int64_t next_step_ = 0;
  std::unique_ptr<Scanner> scanner_;
  std::unique_ptr<Reranker> reranker_;
  DeviceArray<TeamState> teams_;
  DeviceArray<RowCounts> counts_;
  DeviceArray<int32_t> order_;  // with a pool: how many rows are due, [rows] which
  // [layers, rows, ...], with a pool
  DeviceArray<PoolState> states_;
  DeviceArray<int64_t> steps_;
  DeviceArray<int32_t> pools_;
  DeviceArray<uint32_t> packed_signs_;
  DeviceArray<uint64_t> packed_levels_;
  DeviceArray<uint8_t> packed_scales_;
  DeviceArray<float> scan_queries_, prompt_means_;
  DeviceArray<std::byte> replay_memory_;  // while a prompt's layers are observed
};

std::unique_ptr<Selector> make_cuda(const CreateArgs& args) {
  return std::make_unique<SelfIndexCuda>(args);
}

}  // namespace
}  // namespace sikv::self_index

SIKV_PLUGIN("self_index", "1.0.0", SIKV_CUDA, SIKV_KIND_BIT(SIKV_SELECTOR),
            sikv::selector<sikv::self_index::make_cuda, sikv::self_index::kOptions,
                           sikv::cuda::probe>("cuda"))
