// Base of host codecs that treat every (sequence, KV head) on its own: spreads rows over the host's
// workers, reads tokens as fp32 and refuses what is not finite. A scalar codec is a TokenCodec and
// says what happens to one token; a SIMD variant derives from it and overrides whole rows.
#ifndef SIKV_PLUGINS_SDK_ROW_CODEC_H_
#define SIKV_PLUGINS_SDK_ROW_CODEC_H_

#include <algorithm>
#include <string>
#include <vector>

#include "plugins/sdk/finite.h"
#include "plugins/sdk/plugin.h"

namespace sikv {

// The tokens of one (sequence, KV head) that a call to fit or encode brings.
class RowTokens {
 public:
  RowTokens(const RowsView& rows, const CacheView& view, const char* what, int row, int first_slot)
      : rows_(&rows),
        view_(&view),
        what_(what),
        row_(row),
        sequence_(row / view.num_kv_heads()),
        head_(row % view.num_kv_heads()),
        first_slot_(first_slot) {}

  int count() const { return rows_->count(sequence_); }
  int head_dim() const { return view_->head_dim(); }
  // Slot that token 0 goes to; tokens follow each other. 0 in fit.
  int first_slot() const { return first_slot_; }

  // out [D] = token t. Throws Refused if it is not finite.
  void load(int t, float* out) const {
    rows_->load(sequence_, t, head_, head_dim(), out);
    if (std::all_of(out, out + head_dim(), is_storable)) return;
    refuse_row(out, head_dim(), what_,
               {view_->layer(), sequence_, view_->num_sequences(), head_,
                view_->position(row_, first_slot_ + t)});
  }

  // Throws Refused where the row's page table has no page for a slot that tokens go to. Once per
  // page of tokens, and before any of them is written.
  void check_pages() const {
    const sikv_cache_view& view = view_->raw();
    const int32_t* const table = view.page_table + int64_t{row_} * view.max_pages;
    const int last = (first_slot_ + count() - 1) / kPageTokens;
    for (int page = first_slot_ / kPageTokens; page <= last; ++page) {
      if (page < view.max_pages && table[page] >= 0) continue;
      throw Refused(std::string(what_) + " of layer " + std::to_string(view.layer) + ", sequence " +
                    std::to_string(sequence_) + ", KV head " + std::to_string(head_) +
                    " goes to slots " + std::to_string(first_slot_) + " to " +
                    std::to_string(first_slot_ + count() - 1) +
                    ", but its page table has no page " + std::to_string(page) +
                    ": give the row its pages before its tokens");
    }
  }

  // Throws as load does for the newest tokens, a page's worth: of these some may stay in the tail,
  // where no encode sees them. For fits that do not read every token.
  void check_newest() const {
    std::vector<float> x(static_cast<size_t>(head_dim()));
    for (int t = std::max(count() - kPageTokens, 0); t < count(); ++t) load(t, x.data());
  }

  // visit(page, token in page, x [D]) for every token in order.
  template <typename Visit>
  void for_each(Visit&& visit) const {
    std::vector<float> x(static_cast<size_t>(head_dim()));
    for (int t = 0; t < count(); ++t) {
      load(t, x.data());
      const int slot = first_slot_ + t;
      visit(slot / kPageTokens, slot % kPageTokens, static_cast<const float*>(x.data()));
    }
  }

 private:
  const RowsView* rows_;
  const CacheView* view_;
  const char* what_;
  int row_, sequence_, head_, first_slot_;
};

class RowCodec : public Codec {
 public:
  const sikv_layout& layout() const final { return layout_; }

  void fit(const RowsView& rows, const CacheView& view, Launch) final {
    for_each_row(rows, view, nullptr,
                 [&](const RowTokens& tokens, int row) { fit_row(tokens, store(view), row); });
  }
  void encode(const RowsView& rows, const int32_t* first_slot, const CacheView& view,
              Launch) final {
    for_each_row(rows, view, first_slot, [&](const RowTokens& tokens, int row) {
      tokens.check_pages();
      encode_row(tokens, store(view), row);
    });
  }
  void decode(const sikv_decode_args& args, const CacheView& view, void*) const final {
    parallel_for(host_, args.num_rows, [&](int64_t i, int) {
      decode_row(store(view), args.first_row + static_cast<int>(i),
                 {args.slots + i * args.capacity, static_cast<size_t>(args.counts[i])},
                 args.out + i * args.capacity * view.head_dim());
    });
  }

 protected:
  RowCodec(const CreateArgs& args, sikv_kind kind, const sikv_layout& layout)
      : host_(args.host), kind_(kind), layout_(layout) {}

  // Side tables from a whole prompt of at least one token. Codecs without tables only look for
  // numbers that would be refused later.
  virtual void fit_row(const RowTokens& tokens, const StoreView& store, int row) {
    static_cast<void>(store), static_cast<void>(row);
    tokens.for_each([](int, int, const float*) {});
  }
  virtual void encode_row(const RowTokens& tokens, const StoreView& store, int row) = 0;
  // out [slots.size(), D].
  virtual void decode_row(const StoreView& store, int row, std::span<const int32_t> slots,
                          float* out) const = 0;

 private:
  const StoreView& store(const CacheView& view) const {
    return kind_ == SIKV_KEY_CODEC ? view.key() : view.value();
  }

  // body(tokens, row) for every row with tokens; first_slot [B, H] or null for 0.
  template <typename Body>
  void for_each_row(const RowsView& rows, const CacheView& view, const int32_t* first_slot,
                    Body&& body) const {
    parallel_for(host_, view.num_rows(), [&](int64_t i, int) {
      const int row = static_cast<int>(i);
      const RowTokens tokens(rows, view, kind_ == SIKV_KEY_CODEC ? "K" : "V", row,
                             first_slot != nullptr ? first_slot[row] : 0);
      if (tokens.count() > 0) body(tokens, row);
    });
  }

  const sikv_host& host_;
  sikv_kind kind_;
  sikv_layout layout_;
};

// A row codec that stores every token on its own.
class TokenCodec : public RowCodec {
 protected:
  using RowCodec::RowCodec;

  // x [D] goes to, or comes from, token `token` of page `page` of the row.
  virtual void encode_token(const StoreView& store, int row, int page, int token,
                            const float* x) = 0;
  virtual void decode_token(const StoreView& store, int row, int page, int token,
                            float* x) const = 0;

  void encode_row(const RowTokens& tokens, const StoreView& store, int row) override {
    tokens.for_each(
        [&](int page, int token, const float* x) { encode_token(store, row, page, token, x); });
  }
  void decode_row(const StoreView& store, int row, std::span<const int32_t> slots,
                  float* out) const override {
    for (const int32_t slot : slots) {
      decode_token(store, row, slot / kPageTokens, slot % kPageTokens, out);
      out += layout().head_dim;
    }
  }
};

// The head dimensions every codec of this toolkit takes.
inline int checked_head_dim(const CreateArgs& args, std::string_view id) {
  const int head_dim = args.shape.head_dim;
  if (head_dim == 64 || head_dim == 96 || head_dim == 128 || head_dim == 256) return head_dim;
  throw Refused(std::string(id) + " takes head_dim 64, 96, 128 or 256, not " +
                std::to_string(head_dim));
}

// Option `name`, a number of channels that must divide the head dimension.
inline int checked_channel_group(const CreateArgs& args, std::string_view id,
                                 std::string_view name) {
  const int group = static_cast<int>(args.options.integer(name));
  if (args.shape.head_dim % group == 0) return group;
  throw Refused(std::string(id) + ": " + std::string(name) + " " + std::to_string(group) +
                " does not divide head_dim " + std::to_string(args.shape.head_dim) +
                "; 32 always does");
}

}  // namespace sikv

#endif  // SIKV_PLUGINS_SDK_ROW_CODEC_H_
