/* Table of an attention kernel: one softmax over pinned tokens, selected slots and tail.
 *
 * Life: create -> accepts (layouts) -> plan -> run per layer and step. */
#ifndef SIKV_PLUGINS_ABI_SIKV_KERNEL_H_
#define SIKV_PLUGINS_ABI_SIKV_KERNEL_H_

#include "sikv_abi.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Table flags. */
#define SIKV_KERNEL_ATTENDS_ALL \
  1u /* reads every token; only goes with selectors that select all \
      */

#define SIKV_KERNEL_WEIGHS 2u /* since 1.3: adds log_weights to logits */

typedef struct sikv_attend_args {
  uint32_t struct_size;
  int32_t num_query_heads;
  const sikv_cache_view* view;
  const void* q; /* device; [B, Hq, D] view dtype */
  float scale;   /* logits = scale * q.k */
  int32_t reserved;
  sikv_selection selection; /* from the selector; read only */
  float* out;               /* device; [B, Hq, D] fp32 */
  float* lse; /* device; [B, Hq] natural log of the sum of exp(logits); -inf if empty */
  /* since 1.3 */
  const float* log_weights; /* device; [B, Hq, capacity], by place in the row's list of slots: added
                               to the logits of listed slots; NULL for none */
} sikv_attend_args;

typedef struct sikv_kernel_table {
  SIKV_COMMON_SLOTS
  /* SIKV_OK, or SIKV_REFUSED with the reason why these layouts cannot be read. */
  int32_t (*accepts)(void* self, const sikv_layout* key_layout, const sikv_layout* value_layout,
                     sikv_message* why);
  /* Host; once. `capacity` is the largest selection per row. */
  int32_t (*plan)(void* self, int32_t capacity, uint64_t* workspace_bytes, sikv_message* why);
  int32_t (*run)(void* self, const sikv_attend_args* args, void* workspace, void* stream,
                 sikv_message* why);
  /* NULL unless the kernel can absorb selectors (scan, select and attend in one launch): SIKV_OK
   * if it does the work of `selector` with these options itself. run then also fills
   * args->selection with what it used when args->selection.slots is not NULL. */
  int32_t (*absorbs)(void* self, const char* selector, const sikv_option_value* options,
                     uint32_t num_options, sikv_message* why);
} sikv_kernel_table;

SIKV_FROZEN(sikv_attend_args, lse, 64);
SIKV_FROZEN(sikv_attend_args, log_weights, 72);
SIKV_FROZEN(sikv_kernel_table, absorbs, 56);

#ifdef __cplusplus
}
#endif
#endif
