/* Table of a key codec or a value codec: turns rows of K or V into the planes of a page.
 *
 * Life: create -> describe -> per layer { fit (whole prompts) -> encode (whole pages of them) } ->
 * in decode encode (a page of the tail at a time) ; decode at any time.
 *
 * `fit` and `encode` write through the view's own store: a key codec through view->key, a value
 * codec through view->value. Different rows are independent; nothing is shared between layers. */
#ifndef SIKV_PLUGINS_ABI_SIKV_CODEC_H_
#define SIKV_PLUGINS_ABI_SIKV_CODEC_H_

#include "sikv_abi.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct sikv_decode_args {
  const sikv_cache_view* view;
  int32_t first_row; /* rows [first_row, first_row + num_rows) of the view's B * H */
  int32_t num_rows;
  int32_t capacity;
  int32_t reserved;
  const int32_t* slots;  /* device; [num_rows, capacity], any order */
  const int32_t* counts; /* device; [num_rows], 0 .. capacity */
  float* out; /* device; [num_rows, capacity, D] fp32; entries past counts are not written */
} sikv_decode_args;

typedef struct sikv_codec_table {
  SIKV_COMMON_SLOTS
  /* The layout this instance writes; fixed for its life. */
  int32_t (*describe)(void* self, sikv_layout* layout, sikv_message* why);
  /* Bytes of device workspace that fit and encode may use. decode uses none. */
  int32_t (*workspace_bytes)(void* self, uint64_t* bytes, sikv_message* why);
  /* Side tables of every row from its whole prompt `rows`. A sequence with count 0 is left alone.
   */
  int32_t (*fit)(void* self, const sikv_rows* rows, const sikv_cache_view* view, void* workspace,
                 void* stream, sikv_message* why);
  /* Encodes token t of sequence b, head h into slot first_slot[b * H + h] + t. Slots are mapped by
   * the page table. first_slot is a multiple of the tile of every SHARED plane, arbitrary where
   * there is none. Counts are multiples of 256. */
  int32_t (*encode)(void* self, const sikv_rows* rows, const int32_t* first_slot,
                    const sikv_cache_view* view, void* workspace, void* stream, sikv_message* why);
  /* Reads slots back as fp32, in the space K and V came in (mean added, rotation undone). Thread
   * safe: CPU callers decode different rows, or parts of one, at the same time. */
  int32_t (*decode)(void* self, const sikv_decode_args* args, void* stream, sikv_message* why);
} sikv_codec_table;

SIKV_FROZEN(sikv_decode_args, out, 40);
SIKV_FROZEN(sikv_codec_table, decode, 64);

#ifdef __cplusplus
}
#endif
#endif
