#include "tests/support/test_cache.h"

#include <algorithm>
#include <cstring>
#include <numeric>
#include <utility>

#include "framework/base/error.h"
#include "framework/base/random.h"
#include "framework/cache/ledger.h"
#include "tests/support/device_call.h"
#include "tests/support/plugins.h"

namespace sikv::testing {
namespace {

constexpr uint8_t kPagePoison = 0xa5;
constexpr uint8_t kFloatPoison = 0xff;  // NaN in every input type
constexpr uint8_t kGuardByte = 0x5a;
constexpr size_t kAlignment = 128;
constexpr size_t kGuardBytes = 128;
constexpr int kSparePages = 2;

int find(const sikv_layout& layout, sikv_role role) {
  int i = 0;
  while (i < static_cast<int>(layout.num_planes) && layout.planes[i].role != role) ++i;
  SIKV_ASSERT(i < static_cast<int>(layout.num_planes));
  return i;
}

std::vector<int> total_tokens(const CacheSpec& spec) {
  std::vector<int> total = spec.encoded;
  for (size_t b = 0; b < spec.tail.size(); ++b) total[b] += spec.tail[b];
  return total;
}

}  // namespace

// ---- guarded memory -----------------------------------------------------------------------------

TestCache::Guarded::Guarded(size_t bytes, uint8_t fill)
    : bytes_(bytes), storage_(bytes + 2 * kGuardBytes + kAlignment, kGuardByte) {
  std::memset(data(), fill, bytes);
}

void* TestCache::Guarded::data() const {
  const auto first = reinterpret_cast<uintptr_t>(storage_.data()) + kGuardBytes;
  return reinterpret_cast<void*>((first + kAlignment - 1) / kAlignment * kAlignment);
}

bool TestCache::Guarded::intact() const {
  const uint8_t* begin = storage_.data();
  const uint8_t* data = static_cast<const uint8_t*>(this->data());
  const auto is_guard = [](uint8_t byte) { return byte == kGuardByte; };
  return std::all_of(begin, data, is_guard) &&
         std::all_of(data + bytes_, begin + storage_.size(), is_guard);
}

// ---- the cache ----------------------------------------------------------------------------------

TestCache::TestCache(const CacheSpec& spec, const sikv_layout& key_layout,
                     const sikv_layout& value_layout)
    : spec_(spec) {
  const int batch = num_sequences(), heads = spec.num_kv_heads, rows = num_rows();
  spec_.tail.resize(static_cast<size_t>(batch));
  const int longest = *std::max_element(spec.encoded.begin(), spec.encoded.end());
  const int max_pages = (longest + SIKV_PAGE_TOKENS - 1) / SIKV_PAGE_TOKENS + 1;

  std::vector<std::pair<int, int>> wanted;  // (row, page)
  for (int row = 0; row < rows; ++row) {
    const int tokens = spec.encoded[static_cast<size_t>(row / heads)];
    encoded_len_.push_back(tokens);
    for (int page = 0; page * SIKV_PAGE_TOKENS < tokens; ++page) wanted.emplace_back(row, page);
  }
  num_pages_ = static_cast<int>(wanted.size()) + kSparePages;
  std::vector<int32_t> numbers(static_cast<size_t>(num_pages_));
  std::iota(numbers.begin(), numbers.end(), 0);
  Random random(spec.seed);
  for (size_t i = numbers.size(); i > 1; --i) std::swap(numbers[i - 1], numbers[random.below(i)]);
  page_table_.assign(static_cast<size_t>(rows) * max_pages, INT32_MIN);
  owned_.assign(static_cast<size_t>(num_pages_), false);
  for (size_t i = 0; i < wanted.size(); ++i) {
    page_table_[static_cast<size_t>(wanted[i].first) * max_pages + wanted[i].second] = numbers[i];
    owned_[static_cast<size_t>(numbers[i])] = true;
  }

  view_ = {.struct_size = sizeof(sikv_cache_view),
           .layer = spec.layer,
           .num_sequences = batch,
           .num_kv_heads = heads,
           .head_dim = spec.head_dim,
           .dtype = spec.dtype,
           .max_pages = max_pages,
           .max_encoded_len = longest + spec.slack,
           .page_table = page_table_.data(),
           .encoded_len = encoded_len_.data(),
           .positions = nullptr,
           .key = {},
           .value = {},
           .tail_capacity = spec.tail_capacity,
           .pinned_capacity = spec.pinned,
           .tail_k = nullptr,
           .tail_v = nullptr,
           .tail_len = nullptr,
           .pinned_k = nullptr,
           .pinned_v = nullptr,
           .pinned_slots = nullptr,
           .pinned_len = nullptr,
           .fault = nullptr};
  SIKV_ASSERT(key_layout.line_bytes == 0 || line_conflict(key_layout, value_layout).empty());
  const uint32_t line = std::max(key_layout.line_bytes, value_layout.line_bytes);
  if (line > 0) lines_ = make_plane(int64_t{SIKV_PAGE_TOKENS} * line);
  build_store(key_layout, key_, view_.key);
  build_store(value_layout, value_, view_.value);

  tail_len_.assign(spec_.tail.begin(), spec_.tail.end());
  pinned_slots_.assign(static_cast<size_t>(rows) * spec.pinned, -1);
  for (int row = 0; row < rows; ++row) {
    const int encoded = encoded_len_[static_cast<size_t>(row)];
    std::vector<int32_t> slots(static_cast<size_t>(encoded));
    std::iota(slots.begin(), slots.end(), 0);
    for (size_t i = slots.size(); i > 1; --i) std::swap(slots[i - 1], slots[random.below(i)]);
    slots.resize(static_cast<size_t>(std::min(spec.pinned, encoded)));
    std::sort(slots.begin(), slots.end());
    std::copy(slots.begin(), slots.end(), pinned_slots_.begin() + int64_t{row} * spec.pinned);
    pinned_len_.push_back(static_cast<int32_t>(slots.size()));
  }
  const size_t row_bytes =
      static_cast<size_t>(spec.head_dim) * static_cast<size_t>(sikv_dtype_bytes(spec.dtype));
  const size_t tail_bytes = row_bytes * static_cast<size_t>(batch * spec.tail_capacity * heads);
  const size_t pinned_bytes = row_bytes * static_cast<size_t>(rows * spec.pinned);
  for (auto* side : {&tail_k_, &tail_v_}) {
    *side = std::make_unique<Guarded>(tail_bytes, kFloatPoison);
  }
  for (auto* side : {&pinned_k_, &pinned_v_}) {
    *side = std::make_unique<Guarded>(pinned_bytes, kFloatPoison);
  }
  view_.tail_k = tail_k_->data();
  view_.tail_v = tail_v_->data();
  view_.tail_len = tail_len_.data();
  view_.pinned_k = pinned_k_->data();
  view_.pinned_v = pinned_v_->data();
  view_.pinned_slots = pinned_slots_.data();
  view_.pinned_len = pinned_len_.data();
}

TestCache::Plane TestCache::make_plane(int64_t bytes) const {
  const int64_t stride =
      (bytes + int64_t{kGuardBytes + kAlignment} - 1) / int64_t{kAlignment} * int64_t{kAlignment};
  auto memory = std::make_shared<Guarded>(static_cast<size_t>(stride * num_pages_), kGuardByte);
  for (int page = 0; page < num_pages_; ++page) {
    std::memset(static_cast<uint8_t*>(memory->data()) + page * stride, kPagePoison,
                static_cast<size_t>(bytes));
  }
  return {bytes, stride, std::move(memory)};
}

void TestCache::build_store(const sikv_layout& layout, Store& store, sikv_store_view& view) {
  store.layout = layout;
  view.layout = &store.layout;
  for (uint32_t i = 0; i < layout.num_planes; ++i) {
    const bool in_line = layout.planes[i].organisation == SIKV_IN_LINE;
    store.planes.push_back(
        in_line ? lines_ : make_plane(static_cast<int64_t>(plane_page_bytes(layout.planes[i]))));
    view.planes[i] = static_cast<uint8_t*>(store.planes[i].memory->data()) +
                     (in_line ? layout.line_offset[i] : 0);
    view.page_stride_bytes[i] = store.planes[i].stride;
  }
  for (uint32_t i = 0; i < layout.num_tables; ++i) {
    store.tables.push_back(std::make_unique<Guarded>(
        sizeof(float) * layout.tables[i].count * static_cast<size_t>(num_rows()), kFloatPoison));
    view.tables[i] = static_cast<float*>(store.tables.back()->data());
  }
}

void TestCache::attach(const CodecInstance& key, const CodecInstance& value) {
  view_.key.codec = &key.variant().codec();
  view_.key.codec_self = key.self();
  view_.value.codec = &value.variant().codec();
  view_.value.codec_self = value.self();
}

void TestCache::attach_gpu(const CodecInstance& key, const CodecInstance& value) {
  gpu_key_.codec = &key.variant().codec();
  gpu_key_.codec_self = key.self();
  gpu_value_.codec = &value.variant().codec();
  gpu_value_.codec_self = value.self();
}

void TestCache::attach_gpu_codecs(sikv_cache_view& copy) const {
  copy.key.codec = gpu_key_.codec;
  copy.key.codec_self = gpu_key_.codec_self;
  copy.value.codec = gpu_value_.codec;
  copy.value.codec_self = gpu_value_.codec_self;
}

std::vector<TestCache::Block> TestCache::blocks() const {
  std::vector<Block> blocks;
  for (const Store* store : {&key_, &value_}) {
    for (const Plane& plane : store->planes) {
      if (plane.memory != lines_.memory) blocks.push_back(plane.memory->block());
    }
    for (const auto& table : store->tables) blocks.push_back(table->block());
  }
  if (lines_.memory != nullptr) blocks.push_back(lines_.memory->block());
  for (const auto* exact : {&tail_k_, &tail_v_, &pinned_k_, &pinned_v_}) {
    blocks.push_back((*exact)->block());
  }
  for (const auto* numbers :
       {&page_table_, &encoded_len_, &tail_len_, &pinned_slots_, &pinned_len_}) {
    blocks.push_back(
        {const_cast<int32_t*>(numbers->data()), numbers->size() * sizeof(int32_t), false});
  }
  return blocks;
}

void TestCache::set_encoded_len(int row, int tokens) {
  encoded_len_[static_cast<size_t>(row)] = tokens;
}

void TestCache::fill_exact(const TestRows& k, const TestRows& v) {
  const int64_t row_bytes = int64_t{spec_.head_dim} * sikv_dtype_bytes(spec_.dtype);
  for (int row = 0; row < num_rows(); ++row) {
    const int b = row / spec_.num_kv_heads, h = row % spec_.num_kv_heads;
    const auto copy = [&](const Guarded& to, int64_t index, const TestRows& from, int token) {
      std::memcpy(static_cast<uint8_t*>(to.data()) + index * row_bytes, from.address(b, token, h),
                  static_cast<size_t>(row_bytes));
    };
    for (int t = 0; t < tail_len_[static_cast<size_t>(b)]; ++t) {
      const int64_t index = (int64_t{b} * spec_.tail_capacity + t) * spec_.num_kv_heads + h;
      copy(*tail_k_, index, k, spec_.encoded[static_cast<size_t>(b)] + t);
      copy(*tail_v_, index, v, spec_.encoded[static_cast<size_t>(b)] + t);
    }
    for (int i = 0; i < pinned_len_[static_cast<size_t>(row)]; ++i) {
      const int64_t index = int64_t{row} * spec_.pinned + i;
      copy(*pinned_k_, index, k, pinned_slots_[static_cast<size_t>(index)]);
      copy(*pinned_v_, index, v, pinned_slots_[static_cast<size_t>(index)]);
    }
  }
}

std::vector<uint8_t> TestCache::row_bytes(sikv_kind kind, int row) const {
  const Store& from = store(kind);
  std::vector<uint8_t> bytes;
  for (uint32_t p = 0; p < from.layout.num_planes; ++p) {
    const sikv_plane& plane = from.layout.planes[p];
    for (int i = 0; i < view_.max_pages; ++i) {
      if (page_table_[static_cast<size_t>(row) * view_.max_pages + i] < 0) continue;
      const uint8_t* const first = page(kind, static_cast<sikv_role>(plane.role), row, i);
      const uint32_t stride = sikv_tile_stride(&from.layout, p);
      for (uint32_t tile = 0; tile < SIKV_PAGE_TOKENS / plane.tile_tokens; ++tile) {
        const uint8_t* const at = first + tile * stride;
        bytes.insert(bytes.end(), at, at + plane.bytes_per_tile);
      }
    }
  }
  for (uint32_t i = 0; i < from.layout.num_tables; ++i) {
    const size_t size = sizeof(float) * from.layout.tables[i].count;
    const auto* table = static_cast<const uint8_t*>(from.tables[i]->data()) + size * row;
    bytes.insert(bytes.end(), table, table + size);
  }
  return bytes;
}

uint8_t* TestCache::page(sikv_kind kind, sikv_role role, int row, int page) const {
  const Store& from = store(kind);
  const auto i = static_cast<size_t>(find(from.layout, role));
  const int32_t number = page_table_[static_cast<size_t>(row) * view_.max_pages + page];
  const sikv_store_view& view = kind == SIKV_KEY_CODEC ? view_.key : view_.value;
  return static_cast<uint8_t*>(view.planes[i]) + number * from.planes[i].stride;
}

float* TestCache::table(sikv_kind kind, sikv_table_role role, int row) const {
  const Store& from = store(kind);
  uint32_t i = 0;
  while (i < from.layout.num_tables && from.layout.tables[i].role != role) ++i;
  SIKV_ASSERT(i < from.layout.num_tables);
  return static_cast<float*>(from.tables[i]->data()) +
         static_cast<size_t>(row) * from.layout.tables[i].count;
}

std::string TestCache::damage_of(const Store& store, const char* side) const {
  for (size_t i = 0; i < store.planes.size(); ++i) {
    const Plane& plane = store.planes[i];
    const std::string where = std::string(side) + " plane " + std::to_string(i);
    if (!plane.memory->intact())
      return where + ": written before the first or behind the last page";
    for (int page = 0; page < num_pages_; ++page) {
      const auto* begin = static_cast<const uint8_t*>(plane.memory->data()) + page * plane.stride;
      const bool stray_page =
          !owned_[static_cast<size_t>(page)] &&
          std::any_of(begin, begin + plane.page_bytes, [](uint8_t b) { return b != kPagePoison; });
      if (stray_page) return where + ": page " + std::to_string(page) + " has no owner but changed";
      if (std::any_of(begin + plane.page_bytes, begin + plane.stride,
                      [](uint8_t b) { return b != kGuardByte; })) {
        return where + ": written behind the end of page " + std::to_string(page);
      }
    }
  }
  for (size_t i = 0; i < store.tables.size(); ++i) {
    if (!store.tables[i]->intact()) {
      return std::string(side) + " table " + std::to_string(i) + ": written outside of it";
    }
  }
  return {};
}

std::string TestCache::damage() const {
  std::string damage = damage_of(key_, "key");
  if (damage.empty()) damage = damage_of(value_, "value");
  if (!damage.empty()) return damage;
  const bool exact_intact =
      tail_k_->intact() && tail_v_->intact() && pinned_k_->intact() && pinned_v_->intact();
  return exact_intact ? "" : "tail or pinned: written outside of it";
}

// ---- codecs on a cache --------------------------------------------------------------------------

void encode_part(CodecInstance& codec, const TestRows& rows, const TestCache& cache,
                 const std::vector<int>& from, const std::vector<int>& count) {
  std::vector<int32_t> first_slot;
  for (int row = 0; row < cache.num_rows(); ++row) {
    first_slot.push_back(from[static_cast<size_t>(row / cache.spec().num_kv_heads)]);
  }
  const RowsPart part = rows.part(from, count);
  Workspace workspace(codec.workspace_bytes());
  DeviceCall call(device_of(codec.variant()));
  codec.encode(call.rows(part), call.in(first_slot), call.view(cache), call.out(workspace),
               call.stream());
  call.finish();
  SIKV_ASSERT(workspace.intact());
}

void encode_part(CodecInstance& codec, const TestRows& rows, const TestCache& cache, int from,
                 const std::vector<int>& count) {
  encode_part(codec, rows, cache, std::vector<int>(count.size(), from), count);
}

void fit_part(CodecInstance& codec, const RowsPart& part, const TestCache& cache) {
  Workspace workspace(codec.workspace_bytes());
  DeviceCall call(device_of(codec.variant()));
  codec.fit(call.rows(part), call.view(cache), call.out(workspace), call.stream());
  call.finish();
  SIKV_ASSERT(workspace.intact());
}

void fit_and_encode(CodecInstance& codec, const TestRows& rows, const TestCache& cache) {
  fit_part(codec, rows.all(), cache);
  encode_part(codec, rows, cache, 0, cache.spec().encoded);
}

std::vector<float> decode_slots(const CodecInstance& codec, const TestCache& cache, int row,
                                std::span<const int32_t> slots) {
  const auto count = static_cast<int32_t>(slots.size());
  Guarded<float> out(slots.size() * static_cast<size_t>(cache.spec().head_dim));
  DeviceCall call(device_of(codec.variant()));
  codec.decode({&call.view(cache), row, 1, count, 0, call.in(slots.data(), slots.size()),
                call.in(&count, 1), call.out(out)},
               call.stream());
  call.finish();
  SIKV_ASSERT(out.intact());
  return {out.data(), out.data() + out.size()};
}

// ---- a filled cache -----------------------------------------------------------------------------

ExactRows::ExactRows(const CacheSpec& spec, Pattern pattern) : ExactRows(spec, pattern, pattern) {}

ExactRows::ExactRows(const CacheSpec& spec, Pattern keys, Pattern values)
    : k(total_tokens(spec), spec.num_kv_heads, spec.head_dim, spec.dtype), v(k) {
  k.fill(keys, derive_seed(spec.seed, 1));
  v.fill(values, derive_seed(spec.seed, 2));
}

FilledCache::FilledCache(const CacheSpec& spec, CodecInstance key_codec, CodecInstance value_codec,
                         Pattern pattern)
    : FilledCache(spec, ExactRows(spec, pattern), std::move(key_codec), std::move(value_codec)) {}

FilledCache::FilledCache(const CacheSpec& spec, const ExactRows& rows, CodecInstance key_codec,
                         CodecInstance value_codec)
    : k(rows.k),
      v(rows.v),
      key(std::move(key_codec)),
      value(std::move(value_codec)),
      cache(spec, key.describe(), value.describe()) {
  cache.attach(key, value);
  fit_and_encode(key, k, cache);
  fit_and_encode(value, v, cache);
  cache.fill_exact(k, v);
}

bool FilledCache::attach_gpu_codecs(const Choices& key_choices, const Choices& value_choices,
                                    const sikv_shape& shape) {
  const auto make = [&](const CodecInstance& codec, const Choices& choices) {
    const Variant* const variant = find_gpu_variant(codec.variant().kind, codec.variant().id);
    return variant == nullptr
               ? std::nullopt
               : std::optional(make_instance<CodecInstance>(*variant, choices, shape));
  };
  gpu_key = make(key, key_choices);
  gpu_value = make(value, value_choices);
  if (!gpu_key || !gpu_value) return false;
  cache.attach_gpu(*gpu_key, *gpu_value);
  return true;
}

}  // namespace sikv::testing
