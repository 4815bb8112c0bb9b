/* Table of a selector: per (sequence, KV head) chooses the slots a query attends to, besides the
 * pinned tokens and the tail.
 *
 * Life: create -> accepts (key layout) -> plan -> per sequence begin_sequence, per layer
 * { observe, evict? } -> per decode step begin_step, per layer { run } and, when a page was
 * encoded, { observe_page, evict? }. One instance sees all layers of a model.
 *
 * A wrapper (option `base`) calls its base itself; the framework asks only the wrapper. Needs of a
 * base are answered as if they were the wrapper's. */
#ifndef SIKV_PLUGINS_ABI_SIKV_SELECTOR_H_
#define SIKV_PLUGINS_ABI_SIKV_SELECTOR_H_

#include "sikv_abi.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Table flags. */
/* Every selection is SIKV_SELECT_ALL; of a wrapper, with a base of which that holds. */
#define SIKV_SELECTOR_SELECTS_ALL 2u
#define SIKV_SELECTOR_UNORDERED 1u /* slots of a selection may come in any order */
/* Since 1.3, needs: the framework meets them, or refuses when the config is read. */
#define SIKV_SELECTOR_NEEDS_ALL_QUERIES 4u /* observe gets the queries of every prompt position */
#define SIKV_SELECTOR_NEEDS_ALL_LAYERS 8u  /* the cache holds every layer of the model */
#define SIKV_SELECTOR_NEEDS_W_O 16u        /* observe gets w_o */
/* Since 1.3: evict is asked for all layers in order, after observe (or observe_page) of the last
 * one, so that a budget can be shared over layers. */
#define SIKV_SELECTOR_EVICTS_TOGETHER 32u
/* Since 1.3: run fills log_weights; only goes with kernels that add them (SIKV_KERNEL_WEIGHS), and
 * not into a wrapper, which would change the selection under them. */
#define SIKV_SELECTOR_WEIGHS 64u

/* Queries that observe gives at most to a selector without NEEDS_ALL_QUERIES. */
#define SIKV_PROMPT_QUERIES 128

/* The prompt of every sequence, after its full pages were encoded and before the first step. */
typedef struct sikv_observe_args {
  uint32_t struct_size;
  int32_t num_queries;         /* W: queries given per sequence, at most the shortest prompt; for
                                  NEEDS_ALL_QUERIES the longest, and then what would be the query
                                  of a position below 0 is not defined */
  const sikv_cache_view* view; /* page table, planes, tables, tail, pinned are filled */
  sikv_rows keys;              /* exact K of the whole prompt */
  sikv_rows values;
  const void*
      queries; /* device; [B, W, Hq, D] view dtype: positions prompt_len - W .. prompt_len - 1 */
  const int32_t* prompt_len; /* device; [B] */
  /* since 1.3 */
  const float* w_o; /* device; [Hq * D, hidden]: the layer's output projection; NULL without */
  int32_t hidden;
  int32_t reserved2;
} sikv_observe_args;

/* A page that has just been encoded: its exact rows are still there. */
typedef struct sikv_observe_page_args {
  uint32_t struct_size;
  uint32_t reserved;
  const sikv_cache_view* view;
  sikv_rows keys; /* count[b] = 256 where sequence b got a page, else 0 */
  sikv_rows values;
  const int32_t* first_slot; /* device; [B, H] slot of the page's first token */
} sikv_observe_page_args;

typedef struct sikv_select_args {
  uint32_t struct_size;
  int32_t num_query_heads;
  const sikv_cache_view* view;
  const void* q; /* device; [B, Hq, D] view dtype */
  float scale;   /* of the logits: 1 / sqrt(D) unless the model says otherwise */
  int32_t reserved;
  sikv_selection selection; /* to be filled; capacity as answered by plan */
  /* since 1.3 */
  float* log_weights; /* device; [B, Hq, capacity], by place in the row's list of slots: what is
                         added to the logit of a query head, -inf where the token is not for it.
                         To be filled by selectors that weigh, where they list slots; else NULL */
} sikv_select_args;

/* Keep-lists: slots to keep, ascending, pinned ones included by the framework in any case; a count
 * of SIKV_SELECT_ALL keeps the row as it is. Afterwards kept tokens move together, freed pages go
 * back to the pool and view->positions tells where each slot came from. */
typedef struct sikv_evict_args {
  uint32_t struct_size;
  uint32_t reserved;
  const sikv_cache_view* view;
  int32_t* keep_slots;  /* device; [B, H, view->max_encoded_len] */
  int32_t* keep_counts; /* device; [B, H] */
} sikv_evict_args;

/* Since 1.3. What each encoded slot is worth to the selector: a higher score is kept first, ties go
 * to the lower slot, and +inf marks slots that are kept whatever the budget. Finite otherwise. */
typedef struct sikv_score_args {
  uint32_t struct_size;
  uint32_t reserved;
  const sikv_cache_view* view;
  float*
      scores; /* device; [B, H, view->max_encoded_len]; slots past a row's end stay as they are */
} sikv_score_args;

typedef struct sikv_selector_table {
  SIKV_COMMON_SLOTS
  /* SIKV_OK, or SIKV_REFUSED with the reason why this key layout cannot be read. */
  int32_t (*accepts)(void* self, const sikv_layout* key_layout, sikv_message* why);
  /* Host; once. Answers the largest selection per row (for sequences of at most max_tokens) and
   * the device workspace of run. With SIKV_SELECTOR_SELECTS_ALL the capacity may be 0. */
  int32_t (*plan)(void* self, int32_t* capacity, uint64_t* workspace_bytes, sikv_message* why);
  /* Sequence number b of the batch starts anew: drop its state. */
  int32_t (*begin_sequence)(void* self, int32_t sequence, sikv_message* why);
  int32_t (*observe)(void* self, const sikv_observe_args* args, void* workspace, void* stream,
                     sikv_message* why);
  int32_t (*observe_page)(void* self, const sikv_observe_page_args* args, void* workspace,
                          void* stream, sikv_message* why);
  /* Before the first layer of decode step `step` (0 for the first after prefill). */
  int32_t (*begin_step)(void* self, int64_t step, sikv_message* why);
  int32_t (*run)(void* self, const sikv_select_args* args, void* workspace, void* stream,
                 sikv_message* why);
  /* Bytes of state the instance holds by now, for the memory ledger. */
  uint64_t (*state_bytes)(void* self);
  /* NULL for selectors that keep everything. Asked after observe and after observe_page. A wrapper's
   * is asked only where its base has one, too. */
  int32_t (*evict)(void* self, const sikv_evict_args* args, void* workspace, void* stream,
                   sikv_message* why);
  /* May be NULL. Fills at most `capacity` counters and returns how many there are. */
  uint32_t (*counters)(void* self, sikv_counter* counters, uint32_t capacity);
  /* Since 1.3; NULL for selectors that do not rank slots to evict. Asked by wrappers that split a
   * budget anew, after observe and before the evict of the same layer, which it does not change. */
  int32_t (*score)(void* self, const sikv_score_args* args, void* workspace, void* stream,
                   sikv_message* why);
} sikv_selector_table;

SIKV_FROZEN(sikv_observe_args, prompt_len, 120);
SIKV_FROZEN(sikv_observe_args, hidden, 136);
SIKV_FROZEN(sikv_observe_page_args, first_slot, 112);
SIKV_FROZEN(sikv_select_args, selection, 32);
SIKV_FROZEN(sikv_select_args, log_weights, 56);
SIKV_FROZEN(sikv_evict_args, keep_counts, 24);
SIKV_FROZEN(sikv_score_args, scores, 16);
SIKV_FROZEN(sikv_selector_table, counters, 104);
SIKV_FROZEN(sikv_selector_table, score, 112);

#ifdef __cplusplus
}
#endif
#endif
