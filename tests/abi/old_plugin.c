/* A key codec and a selector as they were built against ABI 1.1: shorter tables and a layout that
 * ends before line_bytes. The structs of today begin with those of then, which SIKV_FROZEN keeps. */
#include <stddef.h>
#include <string.h>

#include "plugins/abi/sikv_codec.h"
#include "plugins/abi/sikv_selector.h"

#define EXPORT __attribute__((visibility("default")))

static int instance;

static int32_t probe(const sikv_device* device, sikv_message* reason) {
  (void)device, (void)reason;
  return 1;
}
static int32_t create(const sikv_create_args* args, void** self, sikv_message* why) {
  (void)args, (void)why;
  *self = &instance;
  return SIKV_OK;
}
static void destroy(void* self) { (void)self; }

/* ---- the codec ---- */

static int32_t describe(void* self, sikv_layout* out, sikv_message* why) {
  sikv_layout layout;
  (void)self, (void)why;
  memset(&layout, 0xff, sizeof layout); /* whoever copies too much copies rubbish */
  memset(&layout, 0, offsetof(sikv_layout, line_bytes));
  layout.struct_size = offsetof(sikv_layout, line_bytes);
  layout.version = 1;
  strcpy(layout.family, "old");
  layout.num_planes = 1;
  layout.head_dim = 64;
  layout.planes[0].role = SIKV_MAGNITUDE;
  layout.planes[0].organisation = SIKV_PER_TOKEN;
  layout.planes[0].tile_tokens = 1;
  layout.planes[0].bytes_per_tile = 128;
  memcpy(out, &layout, layout.struct_size);
  return SIKV_OK;
}
static int32_t no_bytes(void* self, uint64_t* bytes, sikv_message* why) {
  (void)self, (void)why;
  *bytes = 0;
  return SIKV_OK;
}
static int32_t fit(void* self, const sikv_rows* rows, const sikv_cache_view* view, void* workspace,
                   void* stream, sikv_message* why) {
  (void)self, (void)rows, (void)view, (void)workspace, (void)stream, (void)why;
  return SIKV_OK;
}
static int32_t encode(void* self, const sikv_rows* rows, const int32_t* first_slot,
                      const sikv_cache_view* view, void* workspace, void* stream,
                      sikv_message* why) {
  (void)first_slot;
  return fit(self, rows, view, workspace, stream, why);
}
static int32_t decode(void* self, const sikv_decode_args* args, void* stream, sikv_message* why) {
  (void)self, (void)args, (void)stream, (void)why;
  return SIKV_OK;
}

/* ---- the selector ---- */

static int32_t accepts(void* self, const sikv_layout* layout, sikv_message* why) {
  (void)self, (void)layout, (void)why;
  return SIKV_OK;
}
static int32_t plan(void* self, int32_t* capacity, uint64_t* workspace_bytes, sikv_message* why) {
  *capacity = 11;
  return no_bytes(self, workspace_bytes, why);
}
static int32_t begin_sequence(void* self, int32_t sequence, sikv_message* why) {
  (void)self, (void)sequence, (void)why;
  return SIKV_OK;
}
static int32_t observe(void* self, const sikv_observe_args* args, void* workspace, void* stream,
                       sikv_message* why) {
  (void)self, (void)args, (void)workspace, (void)stream, (void)why;
  return SIKV_OK;
}
static int32_t observe_page(void* self, const sikv_observe_page_args* args, void* workspace,
                            void* stream, sikv_message* why) {
  (void)self, (void)args, (void)workspace, (void)stream, (void)why;
  return SIKV_OK;
}
static int32_t begin_step(void* self, int64_t step, sikv_message* why) {
  (void)self, (void)step, (void)why;
  return SIKV_OK;
}
static int32_t run(void* self, const sikv_select_args* args, void* workspace, void* stream,
                   sikv_message* why) {
  (void)self, (void)args, (void)workspace, (void)stream, (void)why;
  return SIKV_OK;
}
static uint64_t state_bytes(void* self) {
  (void)self;
  return 5;
}

/* What lies behind struct_size is another's memory: `score` must not be taken from it. */
static const sikv_selector_table selector = {
    offsetof(sikv_selector_table, score),
    0,
    probe,
    create,
    destroy,
    accepts,
    plan,
    begin_sequence,
    observe,
    observe_page,
    begin_step,
    run,
    state_bytes,
    NULL,
    NULL,
    (int32_t(*)(void*, const sikv_score_args*, void*, void*, sikv_message*))(void*)probe};
static const sikv_codec_table codec = {
    sizeof(sikv_codec_table), 0, probe, create, destroy, describe, no_bytes, fit, encode, decode};

static const sikv_plugin_entry entries[] = {{SIKV_KEY_CODEC, 0, "ref", NULL, 0, &codec},
                                            {SIKV_SELECTOR, 0, "ref", NULL, 0, &selector}};
static const sikv_plugin_tables_t tables = {sizeof(sikv_plugin_tables_t), 2, entries};

EXPORT extern const sikv_plugin_descriptor_t sikv_plugin_descriptor;
const sikv_plugin_descriptor_t sikv_plugin_descriptor = {
    {'S', 'I', 'K', 'V', 'P', 'L', 'U', 'G'},
    offsetof(sikv_plugin_descriptor_t, faster_paths),
    1,
    1,
    SIKV_KIND_BIT(SIKV_KEY_CODEC) | SIKV_KIND_BIT(SIKV_SELECTOR),
    SIKV_CPU,
    "old",
    "0.1.0",
    "",
    "abi tests",
    "not there yet"};

EXPORT const sikv_plugin_tables_t* sikv_plugin_tables(void);
const sikv_plugin_tables_t* sikv_plugin_tables(void) { return &tables; }
