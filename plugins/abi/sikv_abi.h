/* The plugin boundary: what every plugin library exports and what every part shares.
 *
 * Conventions
 *  1. C11 only. No C++ type, exception or allocation crosses; memory belongs to who allocated it.
 *     The framework allocates everything a `run` touches (cache, selection, output, workspace).
 *  2. Every struct that may grow starts with `struct_size`, set by its writer to the size it was
 *     compiled with. Fields and slots are only ever appended; a reader ignores what lies beyond
 *     struct_size. See plugins/ABI.md for the rules and the frozen offsets at the end of
 *     each header.
 *  3. Calls return a sikv_status. Text about a failure goes to the host's sikv_message: one
 *     sentence that names the offending value and the remedy.
 *  4. Pointers named "device" hold addresses of the device the plugin was created for; everything
 *     else is host memory. On the CPU the two are the same.
 *  5. Workspaces, planes, tables and outputs are aligned to 64 bytes.
 *  6. Shapes are written in brackets, slowest dimension first. Lengths are in tokens, strides in
 *     elements unless a name says bytes.
 */
#ifndef SIKV_PLUGINS_ABI_SIKV_ABI_H_
#define SIKV_PLUGINS_ABI_SIKV_ABI_H_

#include <stddef.h>
#include <stdint.h>

#include "sikv_dtype.h"

#ifdef __cplusplus
extern "C" {
#endif

#define SIKV_ABI_MAJOR 1
#define SIKV_ABI_MINOR 5
#define SIKV_PLUGIN_MAGIC "SIKVPLUG" /* 8 bytes, no terminator */

#define SIKV_PAGE_TOKENS 256 /* unit of allocation: tokens of one (layer, sequence, KV head) */
#define SIKV_MAX_PLANES 4
#define SIKV_MAX_TABLES 4
#define SIKV_MAX_PARAMS 8

typedef enum sikv_status {
  SIKV_OK = 0,
  SIKV_REFUSED = 2,   /* caller's fault: bad option, unsupported shape, NaN in the input ... */
  SIKV_INTERNAL = 70, /* a bug in the plugin */
} sikv_status;

typedef struct sikv_message {
  char text[1024];
} sikv_message;

/* ---- device and host services ------------------------------------------------------------- */

typedef enum sikv_device_type { SIKV_CPU = 0, SIKV_CUDA = 1 } sikv_device_type;

typedef struct sikv_device {
  uint32_t struct_size;
  int32_t type; /* sikv_device_type */
  int32_t ordinal;
  int32_t num_threads;        /* CPU: workers of parallel_for */
  int32_t compute_capability; /* CUDA: 90 for sm_90; 0 elsewhere */
  int32_t multiprocessors;    /* CUDA; 0 elsewhere */
  uint64_t memory_bytes;
  char name[128];
} sikv_device;

typedef struct sikv_host {
  uint32_t struct_size;
  uint32_t reserved;
  void* context;
  /* Calls body(arg, i, worker) for i in [0, n), worker in [0, num_threads), and returns when all
   * are done. A call from inside a body runs serially on that worker. */
  void (*parallel_for)(void* context, int64_t n, void (*body)(void* arg, int64_t i, int32_t worker),
                       void* arg);
  void (*log)(void* context, int32_t level, const char* text); /* 0 debug, 1 info, 2 warning */
} sikv_host;

/* ---- options -------------------------------------------------------------------------------- */

typedef enum sikv_option_type {
  SIKV_OPTION_INT = 1,      /* value.i, within [min, max]; or one of `choices` where that is set */
  SIKV_OPTION_FLOAT = 2,    /* value.f, within [min, max] */
  SIKV_OPTION_BOOL = 3,     /* value.i, 0 or 1 */
  SIKV_OPTION_CHOICE = 4,   /* value.text, one of `choices` */
  SIKV_OPTION_BUDGET = 5,   /* a count of tokens: value.i >= 0; or a fraction of the sequence's
                             current length, 0 < value.f < 1, and then value.i is -1 */
  SIKV_OPTION_SELECTOR = 6, /* since 1.3, of selectors, always named `base` and without a default:
                               the selector this one wraps comes as sikv_create_args.base;
                               value.text is its id */
  SIKV_OPTION_TEXT = 7,     /* since 1.3: value.text, free text such as a path. A relative path
                               that exists beside the config file comes with that folder in front */
} sikv_option_type;

/* One option a plugin takes: config checking, `sikv plugins show`, the JSON schema and the README
 * table are made from this list and nothing else. */
typedef struct sikv_option_spec {
  const char* name;
  uint32_t type; /* sikv_option_type */
  uint32_t reserved;
  double min, max;           /* INT, FLOAT */
  const char* choices;       /* "a|b|c", or NULL */
  const char* default_value; /* as written in a config */
  const char* help;          /* one line */
} sikv_option_spec;

typedef struct sikv_option_value {
  const char* name;
  uint32_t type; /* sikv_option_type */
  uint32_t reserved;
  int64_t i;
  double f;
  const char* text; /* as written, also for numbers */
} sikv_option_value;

/* ---- shape of the model and the run --------------------------------------------------------- */

typedef struct sikv_shape {
  uint32_t struct_size;
  int32_t num_layers; /* layers of this cache, numbered 0 .. num_layers - 1 */
  int32_t num_query_heads;
  int32_t num_kv_heads;
  int32_t head_dim;
  int32_t dtype;         /* sikv_dtype of K, V, tail and pinned tokens: fp32, fp16 or bf16 */
  int32_t max_sequences; /* largest batch */
  int32_t max_tokens;    /* longest sequence, generated tokens included */
  double rope_theta;     /* 0 when unknown */
} sikv_shape;

typedef struct sikv_create_args {
  uint32_t struct_size;
  uint32_t num_options;
  const sikv_option_value* options; /* every option of the plugin, defaults filled in */
  const sikv_shape* shape;
  const sikv_device* device;
  const sikv_host* host; /* outlives the instance */
  /* since 1.3. What option `base` names, NULL without one: a selector of the same shape and device
   * that outlives the instance. The wrapper alone calls it, and passes every hook on. Its table says
   * what this instance can do: needs of its own base are in `flags`, and `evict` and `score` are
   * NULL where its base has none. */
  const struct sikv_selector_table* base;
  void* base_self;
  /* since 1.4. The number in its model of each layer of the cache, [shape->num_layers]; NULL where
   * there is no model. Valid during `create` only. */
  const int32_t* layers;
} sikv_create_args;

/* ---- layouts: which bytes a page holds ------------------------------------------------------ */

typedef enum sikv_role {
  SIKV_INDEX_CODE = 1, /* sign nibbles: what a selector scans */
  SIKV_MAGNITUDE = 2,  /* key payload besides the signs (all of it where there is no index) */
  SIKV_SCALE = 3,      /* scales and zeros of the key payload */
  SIKV_VALUE_CODE = 4,
  SIKV_VALUE_SCALE = 5,
} sikv_role;

/* How the tokens of a page lie in one plane.
 *   PER_TOKEN     a token's bytes are contiguous; tile_tokens = 1
 *   NIBBLE_TILES  tiles of 8 tokens x D/4 little-endian 32-bit words; word g holds group g's
 *                 nibble of token 0 (bits 0-3) to token 7 (bits 28-31); tile_tokens = 8
 *   SHARED        one row of bytes serves tile_tokens consecutive tokens (kivi's channel scales)
 *   IN_LINE       since 1.2: a token's bytes_per_tile bytes lie together in the token's line, which
 *                 planes of keys and values share (sikv_layout.line_bytes); tile_tokens = 1 */
typedef enum sikv_organisation {
  SIKV_PER_TOKEN = 1,
  SIKV_NIBBLE_TILES = 2,
  SIKV_SHARED = 3,
  SIKV_IN_LINE = 4,
} sikv_organisation;

typedef struct sikv_plane {
  uint32_t role;
  uint32_t organisation;
  uint32_t tile_tokens;    /* divides SIKV_PAGE_TOKENS */
  uint32_t bytes_per_tile; /* page bytes = SIKV_PAGE_TOKENS / tile_tokens * bytes_per_tile */
} sikv_plane;

typedef enum sikv_table_role {
  SIKV_CODEBOOK = 1,  /* [D/4, 16, 4] beside index codes, else as the layout says */
  SIKV_KEY_MEAN = 2,  /* [D] */
  SIKV_KEY_SCALE = 3, /* [D] */
  SIKV_VALUE_MEAN = 4 /* [D] */
} sikv_table_role;

/* A side table: fp32, one per (layer, sequence, KV head). */
typedef struct sikv_side_table {
  uint32_t role;
  uint32_t count; /* floats */
} sikv_side_table;

typedef struct sikv_layout_param {
  char name[24];
  char value[24];
} sikv_layout_param;

/* Printed form: sign4(magnitude_bits=2,scale=fp16).v1. Bytes change -> version changes. */
typedef struct sikv_layout {
  uint32_t struct_size;
  uint32_t version;
  char family[32];
  uint32_t num_params, num_planes, num_tables;
  uint32_t head_dim;
  sikv_layout_param params[SIKV_MAX_PARAMS];
  sikv_plane planes[SIKV_MAX_PLANES];
  sikv_side_table tables[SIKV_MAX_TABLES];
  /* since 1.2. Lines belong to the keys: IN_LINE planes of values need a key layout with as many
   * line_bytes that leaves their bytes free. The plane's base in the store view is that of token
   * 0's bytes, so a reader needs nothing but the stride: token t lies t * line_bytes behind it. */
  uint32_t line_bytes;                   /* of one token's line; 0 if no plane is IN_LINE */
  uint32_t line_offset[SIKV_MAX_PLANES]; /* in the line, of the planes that are */
} sikv_layout;

/* Bytes from one tile of a plane to the next (from one token to the next where tile_tokens is 1). */
static inline uint32_t sikv_tile_stride(const sikv_layout* layout, uint32_t plane) {
  const sikv_plane* p = &layout->planes[plane];
  return p->organisation == SIKV_IN_LINE ? layout->line_bytes : p->bytes_per_tile;
}

/* ---- the cache as all parts see it ------------------------------------------------------------
 *
 * B sequences, H = num_kv_heads. A row is one (sequence, KV head): row = b * H + h. An encoded
 * token is addressed by its slot: page = page_table[row][slot / 256], token slot % 256 of it. Slots
 * count encoded tokens in sequence order, so slot == position until a selector evicts. Side tables
 * of a row are defined once its prompt was fitted; a row without encoded tokens may have none. */

/* The first number a device refused, sticky: whoever turns `what` from 0 fills in the rest. Read
 * and reported by the framework at its next synchronisation. */
typedef enum sikv_fault_what {
  SIKV_FAULT_K = 1,
  SIKV_FAULT_V = 2,
  SIKV_FAULT_Q = 3
} sikv_fault_what;
typedef struct sikv_fault {
  int32_t what; /* sikv_fault_what, 0 while there is none */
  int32_t layer, sequence;
  int32_t head;     /* KV head; query head for Q */
  int32_t position; /* in the sequence */
  int32_t channel;
  float value;
  int32_t reserved;
} sikv_fault;

typedef struct sikv_store_view { /* the keys or the values of one layer */
  const sikv_layout* layout;
  void* planes[SIKV_MAX_PLANES];              /* device; page 0 of each plane */
  int64_t page_stride_bytes[SIKV_MAX_PLANES]; /* from one page to the next in that plane */
  float* tables[SIKV_MAX_TABLES];             /* device; [B, H, tables[i].count] */
  const struct sikv_codec_table* codec;       /* whose decode reads these planes */
  void* codec_self;
} sikv_store_view;

typedef struct sikv_cache_view {
  uint32_t struct_size;
  int32_t layer;
  int32_t num_sequences; /* B */
  int32_t num_kv_heads;  /* H */
  int32_t head_dim;
  int32_t dtype; /* of tail and pinned */

  int32_t max_pages;          /* row stride of page_table */
  int32_t max_encoded_len;    /* host's upper bound of encoded_len: sizes launches */
  const int32_t* page_table;  /* device; [B, H, max_pages] page numbers in the pool */
  const int32_t* encoded_len; /* device; [B, H] tokens in pages */
  const int32_t* positions;   /* device; [B, H, max_pages * 256] position of each slot, or NULL
                                 while slot == position */
  sikv_store_view key;
  sikv_store_view value;

  int32_t tail_capacity;
  int32_t pinned_capacity;
  const void* tail_k; /* device; [B, tail_capacity, H, D] dtype; newest tokens */
  const void* tail_v;
  const int32_t* tail_len; /* device; [B] */
  const void* pinned_k;    /* device; [B, H, pinned_capacity, D] dtype; exact copies */
  const void* pinned_v;
  const int32_t* pinned_slots; /* device; [B, H, pinned_capacity] ascending */
  const int32_t* pinned_len;   /* device; [B, H] */
  /* since 1.1 */
  sikv_fault* fault; /* device; NULL on the CPU, whose parts refuse at once */
} sikv_cache_view;

/* Rows of K or V to read: element (b, t, h, d) is data[(first[b] + t) * token_stride
 * + h * head_stride + d], t in [0, count[b]). Ragged prompts and the tail both have this form. */
typedef struct sikv_rows {
  const void* data; /* device */
  int32_t dtype;
  int32_t max_count;    /* host's upper bound of count */
  const int32_t* first; /* device; [B] */
  const int32_t* count; /* device; [B] */
  int64_t token_stride;
  int64_t head_stride;
} sikv_rows;

/* Slots chosen for one query, per row; unique, ascending unless the selector says unordered;
 * never pinned ones. The kernel adds pinned tokens and tail itself. */
#define SIKV_SELECT_ALL (-1) /* a count: every encoded, unpinned slot; `slots` is not read */
typedef struct sikv_selection {
  int32_t* slots;  /* device; [B, H, capacity] */
  int32_t* counts; /* device; [B, H] */
  int32_t capacity;
  int32_t reserved;
} sikv_selection;

/* A number a plugin counted since it was created, such as scans or pages read. */
typedef struct sikv_counter {
  char name[32];
  double value;
} sikv_counter;

/* ---- what a library exports -----------------------------------------------------------------
 *
 * Exactly two symbols: the constant `sikv_plugin_descriptor`, read and judged before anything is
 * called, and the function `sikv_plugin_tables`. */

typedef enum sikv_kind {
  SIKV_KEY_CODEC = 1,
  SIKV_VALUE_CODEC = 2,
  SIKV_SELECTOR = 3,
  SIKV_KERNEL = 4,
} sikv_kind;
#define SIKV_KIND_BIT(kind) (1u << (kind))

typedef struct sikv_plugin_descriptor_t {
  char magic[8];
  uint32_t struct_size;
  uint16_t abi_major;
  uint16_t abi_minor;
  uint32_t kinds;         /* SIKV_KIND_BIT of each kind in the library */
  int32_t device;         /* sikv_device_type it runs on */
  char id[32];            /* sign_vq, quest ... */
  char version[16];       /* of the plugin, free form */
  char architectures[64]; /* "" = any; "sm_80,sm_90" for CUDA */
  char build_id[64];
  /* since 1.5. Faster paths that are chosen at run time, for people: "sm_90 on: ..."; "" = none */
  char faster_paths[128];
} sikv_plugin_descriptor_t;

typedef struct sikv_plugin_entry {
  uint32_t kind; /* sikv_kind; says what `table` is */
  uint32_t reserved;
  const char* variant;             /* ref, cpu, cuda ... */
  const sikv_option_spec* options; /* same list in every variant of one (kind, id) */
  uint64_t num_options;
  const void* table; /* sikv_codec_table, sikv_selector_table or sikv_kernel_table */
} sikv_plugin_entry;

typedef struct sikv_plugin_tables_t {
  uint32_t struct_size;
  uint32_t num_entries;
  const sikv_plugin_entry* entries;
} sikv_plugin_tables_t;

typedef const sikv_plugin_tables_t* (*sikv_plugin_tables_fn)(void);

/* The first slots of every table.
 *   probe    how well the variant suits the device: the highest score above 0 wins (ref 1, SIMD 10,
 *            CUDA 100); 0 or less: cannot run, and `reason` says why
 *   create   a new instance; SIKV_REFUSED with a sentence if options and shape do not go together
 *   destroy  never fails; accepts what create returned, once */
#define SIKV_COMMON_SLOTS                                                          \
  uint32_t struct_size;                                                            \
  uint32_t flags;                                                                  \
  int32_t (*probe)(const sikv_device* device, sikv_message* reason);               \
  int32_t (*create)(const sikv_create_args* args, void** self, sikv_message* why); \
  void (*destroy)(void* self);

#ifdef __cplusplus
} /* extern "C" */
#endif

#ifdef __cplusplus
#define SIKV_FROZEN(type, field, offset) \
  static_assert(offsetof(type, field) == (offset), #type "." #field " moved: the ABI is broken")
#else
#define SIKV_FROZEN(type, field, offset) \
  _Static_assert(offsetof(type, field) == (offset), #type "." #field " moved: the ABI is broken")
#endif

SIKV_FROZEN(sikv_device, name, 32);
SIKV_FROZEN(sikv_host, log, 24);
SIKV_FROZEN(sikv_option_spec, help, 48);
SIKV_FROZEN(sikv_option_value, text, 32);
SIKV_FROZEN(sikv_shape, rope_theta, 32);
SIKV_FROZEN(sikv_create_args, host, 32);
SIKV_FROZEN(sikv_create_args, base_self, 48);
SIKV_FROZEN(sikv_create_args, layers, 56);
SIKV_FROZEN(sikv_layout, tables, 504);
SIKV_FROZEN(sikv_layout, line_offset, 540);
SIKV_FROZEN(sikv_store_view, codec_self, 112);
SIKV_FROZEN(sikv_cache_view, pinned_len, 352);
SIKV_FROZEN(sikv_cache_view, fault, 360);
SIKV_FROZEN(sikv_fault, value, 24);
SIKV_FROZEN(sikv_rows, head_stride, 40);
SIKV_FROZEN(sikv_selection, reserved, 20);
SIKV_FROZEN(sikv_counter, value, 32);
SIKV_FROZEN(sikv_plugin_descriptor_t, build_id, 136);
SIKV_FROZEN(sikv_plugin_descriptor_t, faster_paths, 200);
SIKV_FROZEN(sikv_plugin_entry, table, 32);
SIKV_FROZEN(sikv_plugin_tables_t, entries, 8);

#endif
