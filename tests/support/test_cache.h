// One layer of a cache with everything a wrong plugin could trip over: shuffled pages, ragged
// lengths, poisoned memory, guards around every page and table.
//
//   plane   | guard | page 3 of row 1 | guard | page 0 of row 0 | guard | nobody's page | guard |
//   ...
//
// Pages hold 0xa5 until written, guards 0x5a always; floats (tables, tail, pinned) start as NaN.
#ifndef SIKV_TESTS_SUPPORT_TEST_CACHE_H_
#define SIKV_TESTS_SUPPORT_TEST_CACHE_H_

#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "framework/registry/instance.h"
#include "plugins/abi/sikv_abi.h"
#include "tests/support/plugins.h"
#include "tests/support/test_rows.h"

namespace sikv::testing {

struct CacheSpec {
  int num_kv_heads = 2;
  int head_dim = 64;
  int32_t dtype = SIKV_FP16;
  std::vector<int> encoded = {256};  // [B] slots with a page behind them; what encoded_len says
  std::vector<int> tail = {};        // [B] tokens; none where empty
  int tail_capacity = 256;
  int pinned = 0;  // per row, at most its encoded tokens; random slots
  int layer = 0;
  int slack = 0;  // the host's bound of encoded_len is so far above the longest row
  uint64_t seed = 1;
};

class TestCache {
 public:
  // A layout of {} gives a side without planes.
  TestCache(const CacheSpec& spec, const sikv_layout& key_layout, const sikv_layout& value_layout);
  TestCache(const TestCache&) = delete;
  TestCache& operator=(const TestCache&) = delete;

  const CacheSpec& spec() const { return spec_; }
  int num_sequences() const { return static_cast<int>(spec_.encoded.size()); }
  int num_rows() const { return num_sequences() * spec_.num_kv_heads; }
  const sikv_cache_view& view() const { return view_; }

  // Codecs that the view's stores decode with.
  void attach(const CodecInstance& key, const CodecInstance& value);
  // The same for copies of the cache on a GPU; without it they have no codecs.
  void attach_gpu(const CodecInstance& key, const CodecInstance& value);
  void attach_gpu_codecs(sikv_cache_view& copy) const;
  void set_encoded_len(int row, int tokens);

  // Copies tokens encoded[b] .. of each sequence to the tail, and the pinned slots' rows.
  void fill_exact(const TestRows& k, const TestRows& v);

  // All bytes of a row's pages and tables of one side, in slot order; equal rows compare equal
  // wherever their pages lie.
  std::vector<uint8_t> row_bytes(sikv_kind kind, int row) const;
  // First byte of page `page` of a row.
  uint8_t* page(sikv_kind kind, sikv_role role, int row, int page) const;
  // A side table of one row.
  float* table(sikv_kind kind, sikv_table_role role, int row) const;

  // Empty, or what was written outside of its place: a guard, or a page that no row owns.
  std::string damage() const;

  // All memory that the view points to, guards included.
  struct Block {
    void* data;
    size_t bytes;
    bool writable;  // by a plugin: what damage() looks at
  };
  std::vector<Block> blocks() const;

 private:
  // Memory between two guards.
  class Guarded {
   public:
    Guarded(size_t bytes, uint8_t fill);
    void* data() const;
    size_t size() const { return bytes_; }
    bool intact() const;
    Block block() const { return {const_cast<uint8_t*>(storage_.data()), storage_.size(), true}; }

   private:
    size_t bytes_;
    std::vector<uint8_t> storage_;
  };
  // Memory of pages; planes IN_LINE share it.
  struct Plane {
    int64_t page_bytes, stride;
    std::shared_ptr<Guarded> memory;
  };
  struct Store {
    sikv_layout layout;
    std::vector<Plane> planes;
    std::vector<std::unique_ptr<Guarded>> tables;
  };

  void build_store(const sikv_layout& layout, Store& store, sikv_store_view& view);
  Plane make_plane(int64_t bytes) const;
  const Store& store(sikv_kind kind) const { return kind == SIKV_KEY_CODEC ? key_ : value_; }
  std::string damage_of(const Store& store, const char* side) const;

  CacheSpec spec_;
  int num_pages_ = 0;
  std::vector<bool> owned_;  // [num_pages_]
  std::vector<int32_t> page_table_, encoded_len_, tail_len_, pinned_slots_, pinned_len_;
  Store key_, value_;
  Plane lines_;  // of keys and values; of values alone where the keys have none
  std::unique_ptr<Guarded> tail_k_, tail_v_, pinned_k_, pinned_v_;
  sikv_cache_view view_{};
  sikv_store_view gpu_key_{}, gpu_value_{};  // codecs only
};

// Sends `rows` through a codec as the framework does: fit on every token, encode the first
// spec().encoded[b] of each sequence from slot 0.
void fit_and_encode(CodecInstance& codec, const TestRows& rows, const TestCache& cache);

// Side tables from these rows.
void fit_part(CodecInstance& codec, const RowsPart& part, const TestCache& cache);

// Tokens [from, from + count) of each sequence to the slots with the same numbers.
void encode_part(CodecInstance& codec, const TestRows& rows, const TestCache& cache,
                 const std::vector<int>& from, const std::vector<int>& count);
void encode_part(CodecInstance& codec, const TestRows& rows, const TestCache& cache, int from,
                 const std::vector<int>& count);

// [slots.size(), D]
std::vector<float> decode_slots(const CodecInstance& codec, const TestCache& cache, int row,
                                std::span<const int32_t> slots);

// What the tokens of a cache were before they were encoded: encoded, then tail. Many caches can be
// made from the same: drawing them takes longer than most codecs.
struct ExactRows {
  explicit ExactRows(const CacheSpec& spec, Pattern pattern = Pattern::kGaussian);
  ExactRows(const CacheSpec& spec, Pattern keys, Pattern values);
  TestRows k, v;
};

// A cache whose tokens went through fit, encode, tail and pinned as the framework sends them, with
// the exact rows it was made from.
struct FilledCache {
  FilledCache(const CacheSpec& spec, const ExactRows& rows, CodecInstance key_codec,
              CodecInstance value_codec);
  FilledCache(const CacheSpec& spec, CodecInstance key_codec, CodecInstance value_codec,
              Pattern pattern = Pattern::kGaussian);

  // Gives copies of the cache on a GPU the cuda variants of its codecs; false if one has none.
  bool attach_gpu_codecs(const Choices& key_choices, const Choices& value_choices,
                         const sikv_shape& shape);

  TestRows k, v;
  CodecInstance key, value;
  TestCache cache;
  std::optional<CodecInstance> gpu_key, gpu_value;
};

}  // namespace sikv::testing

#endif  // SIKV_TESTS_SUPPORT_TEST_CACHE_H_
