// Host side of codecs with SIMD: what belongs to one (sequence, KV head) as plain pointers, a page
// at a time.
//
// Rows are read where they lie, in their own type; the scalar reference describes the layout and
// stays behind for what a SIMD variant does not do itself.
#ifndef SIKV_KERNELS_COMMON_SIMD_CODEC_H_
#define SIKV_KERNELS_COMMON_SIMD_CODEC_H_

#include <algorithm>
#include <cstring>
#include <memory>
#include <span>
#include <utility>
#include <vector>

#include "kernels/common/simd_tokens.h"
#include "plugins/layouts/paged_sum.h"
#include "plugins/sdk/row_codec.h"

namespace sikv {

class SimdCodec : public Codec {
 public:
  const sikv_layout& layout() const final { return ref_->layout(); }

  void fit(const RowsView& rows, const CacheView& view, Launch launch) final {
    if (!fits(rows)) return ref_->fit(rows, view, launch);
    for_each_row(rows, view, nullptr, [&](const TokenRows& tokens, int row, int) {
      const FitSample sample(tokens.count, fit_tokens());
      if (sample.all()) return fit_row(tokens, store(view), row);
      row_tokens(rows, view, row, 0).check_newest();
      const auto bytes = static_cast<size_t>(view.head_dim() * sikv_dtype_bytes(tokens.dtype));
      std::vector<uint8_t> sampled(static_cast<size_t>(sample.size) * bytes);
      for (int i = 0; i < sample.size; ++i) {
        std::memcpy(&sampled[static_cast<size_t>(i) * bytes], tokens.at(sample.position(i)), bytes);
      }
      return fit_row({sampled.data(), static_cast<int64_t>(bytes), tokens.dtype, sample.size},
                     store(view), row);
    });
  }
  void encode(const RowsView& rows, const int32_t* first_slot, const CacheView& view,
              Launch launch) final {
    if (!encodes(rows)) return ref_->encode(rows, first_slot, view, launch);
    for_each_row(rows, view, first_slot, [&](const TokenRows& tokens, int row, int slot) {
      row_tokens(rows, view, row, slot).check_pages();
      for (int t = 0, count = 0; t < tokens.count; t += count) {
        const int token = (slot + t) % kPageTokens;
        count = std::min(kPageTokens - token, tokens.count - t);
        if (!encode_page(tokens.part(t, count), store(view), row, (slot + t) / kPageTokens,
                         token)) {
          return false;
        }
      }
      return true;
    });
  }
  void decode(const sikv_decode_args& args, const CacheView& view, void* stream) const final {
    if (!decodes()) return ref_->decode(args, view, stream);
    parallel_for(host_, args.num_rows, [&](int64_t i, int) {
      std::span<const int32_t> slots{args.slots + i * args.capacity,
                                     static_cast<size_t>(args.counts[i])};
      float* out = args.out + i * args.capacity * view.head_dim();
      while (!slots.empty()) {
        const int page = slots.front() / kPageTokens;
        const auto end = std::find_if(slots.begin(), slots.end(),
                                      [page](int32_t slot) { return slot / kPageTokens != page; });
        const auto here = slots.first(static_cast<size_t>(end - slots.begin()));
        decode_page(store(view), args.first_row + static_cast<int>(i), page, here, out);
        slots = slots.subspan(here.size());
        out += here.size() * static_cast<size_t>(view.head_dim());
      }
    });
  }

 protected:
  SimdCodec(const CreateArgs& args, sikv_kind kind, std::unique_ptr<Codec> ref)
      : host_(args.host), kind_(kind), ref_(std::move(ref)) {}

  LayoutView layout_view() const { return LayoutView(layout()); }

  // What is done here; the rest is the reference's.
  virtual bool fits(const RowsView& rows) const { return static_cast<void>(rows), true; }
  virtual bool encodes(const RowsView& rows) const { return static_cast<void>(rows), true; }
  virtual bool decodes() const { return true; }
  // Tokens of a prompt that fit_row gets, evenly spaced; 0: every one.
  virtual int fit_tokens() const { return 0; }

  // Side tables from a whole prompt of at least one token. This and encode_page: false where a
  // number is not storable; the call is then refused, and what was written does not matter.
  virtual bool fit_row(const TokenRows& tokens, const StoreView& store, int row) = 0;
  // Tokens go to `token` and those behind it in page `page` of the row.
  virtual bool encode_page(const TokenRows& tokens, const StoreView& store, int row, int page,
                           int token) = 0;
  // out [slots.size(), D]; all slots are of page `page`.
  virtual void decode_page(const StoreView& store, int row, int page,
                           std::span<const int32_t> slots, float* out) const = 0;

 private:
  const StoreView& store(const CacheView& view) const {
    return kind_ == SIKV_KEY_CODEC ? view.key() : view.value();
  }

  RowTokens row_tokens(const RowsView& rows, const CacheView& view, int row, int slot) const {
    return {rows, view, kind_ == SIKV_KEY_CODEC ? "K" : "V", row, slot};
  }

  // body(tokens, row, first slot) for every row with tokens; first_slot [B, H] or null for 0.
  template <typename Body>
  void for_each_row(const RowsView& rows, const CacheView& view, const int32_t* first_slot,
                    Body&& body) const {
    parallel_for(host_, view.num_rows(), [&](int64_t i, int) {
      const int row = static_cast<int>(i), b = row / view.num_kv_heads();
      const int slot = first_slot != nullptr ? first_slot[row] : 0;
      if (rows.count(b) == 0) return;
      const auto* data = static_cast<const uint8_t*>(rows.address(b, 0, row % view.num_kv_heads()));
      const int64_t stride =
          (rows.offset(b, 1, 0) - rows.offset(b, 0, 0)) * sikv_dtype_bytes(rows.dtype());
      if (body(TokenRows{data, stride, rows.dtype(), rows.count(b)}, row, slot)) return;
      row_tokens(rows, view, row, slot).for_each([](int, int, const float*) {});
      throw PluginBug("a row was refused that holds nothing to refuse");
    });
  }

  const sikv_host& host_;
  sikv_kind kind_;
  std::unique_ptr<Codec> ref_;
};

// Rows as they came to tokens `token` ... of a plane with rows of `bytes`.
inline void copy_rows(const TokenRows& rows, int bytes, int token, uint8_t* plane) {
  for (int t = 0; t < rows.count; ++t) {
    std::memcpy(plane + int64_t{bytes} * (token + t), rows.at(t), static_cast<size_t>(bytes));
  }
}

// For probe, of a table of functions by target: 10 where the processor has one.
template <typename Simd>
int32_t probe_simd(const Simd* simd, sikv_message* reason) {
  if (simd != nullptr) return 10;
  sdk::write_message(reason, "the processor has no vector instructions that Highway supports");
  return 0;
}

}  // namespace sikv

#endif  // SIKV_KERNELS_COMMON_SIMD_CODEC_H_
