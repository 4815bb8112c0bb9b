/* The smallest plugin library, a kernel, written on the C headers alone. Each bad library is this
 * file with one macro changed; see CMakeLists.txt. */
#include <stdlib.h>

#include "plugins/abi/sikv_kernel.h"

#ifndef TOY_VARIANT
#define TOY_VARIANT "ref"
#endif
#ifndef TOY_MAGIC
#define TOY_MAGIC \
  { 'S', 'I', 'K', 'V', 'P', 'L', 'U', 'G' }
#endif
#ifndef TOY_DESCRIPTOR_SIZE
#define TOY_DESCRIPTOR_SIZE sizeof(sikv_plugin_descriptor_t)
#endif
#ifndef TOY_MAJOR
#define TOY_MAJOR SIKV_ABI_MAJOR
#endif
#ifndef TOY_MINOR
#define TOY_MINOR SIKV_ABI_MINOR
#endif
#ifndef TOY_KINDS
#define TOY_KINDS SIKV_KIND_BIT(SIKV_KERNEL)
#endif
#ifndef TOY_DEVICE
#define TOY_DEVICE SIKV_CPU
#endif
#ifndef TOY_ENTRY_KIND
#define TOY_ENTRY_KIND SIKV_KERNEL
#endif
#ifndef TOY_TABLE_SIZE
#define TOY_TABLE_SIZE sizeof(sikv_kernel_table)
#endif
#ifndef TOY_RUN
#define TOY_RUN run
#endif
#ifndef TOY_OPTION_MAX
#define TOY_OPTION_MAX 8
#endif
#ifndef TOY_CREATE_STATUS
#define TOY_CREATE_STATUS SIKV_OK
#endif
#ifndef TOY_DESCRIPTOR_NAME
#define TOY_DESCRIPTOR_NAME sikv_plugin_descriptor
#endif
#ifndef TOY_FASTER_PATHS
#define TOY_FASTER_PATHS ""
#endif
#ifndef TOY_TABLES_NAME
#define TOY_TABLES_NAME sikv_plugin_tables
#endif
#ifdef TOY_NEEDS
extern int TOY_NEEDS(void);
#endif

#define EXPORT __attribute__((visibility("default")))

/* A library that is refused by its descriptor must not get as far as running its constructors. */
#ifdef TOY_ABORTS_WHEN_LOADED
__attribute__((constructor)) static void abort_when_loaded(void) { abort(); }
#endif

static int instance;

static int32_t probe(const sikv_device* device, sikv_message* reason) {
  (void)device, (void)reason;
  return 1;
}
static int32_t create(const sikv_create_args* args, void** self, sikv_message* why) {
  (void)args, (void)why;
  *self = &instance;
  return TOY_CREATE_STATUS;
}
static void destroy(void* self) { (void)self; }
static int32_t accepts(void* self, const sikv_layout* key_layout, const sikv_layout* value_layout,
                       sikv_message* why) {
  (void)self, (void)key_layout, (void)value_layout, (void)why;
  return SIKV_OK;
}
static int32_t plan(void* self, int32_t capacity, uint64_t* workspace_bytes, sikv_message* why) {
  (void)self, (void)why;
  *workspace_bytes = (uint64_t)capacity;
  return SIKV_OK;
}
int32_t run(void* self, const sikv_attend_args* args, void* workspace, void* stream,
            sikv_message* why) {
  (void)self, (void)args, (void)workspace, (void)stream, (void)why;
#ifdef TOY_NEEDS
  return TOY_NEEDS();
#else
  return SIKV_OK;
#endif
}

static const sikv_kernel_table table = {TOY_TABLE_SIZE, 0,    probe,   create, destroy,
                                        accepts,        plan, TOY_RUN, NULL};
static const sikv_option_spec options[] = {
    {"split", SIKV_OPTION_INT, 0, 1, TOY_OPTION_MAX, NULL, "1", "parts of a row"}};
static const sikv_plugin_entry entries[] = {{TOY_ENTRY_KIND, 0, TOY_VARIANT, options, 1, &table}};
static const sikv_plugin_tables_t tables = {sizeof(sikv_plugin_tables_t), 1, entries};

EXPORT extern const sikv_plugin_descriptor_t TOY_DESCRIPTOR_NAME;
const sikv_plugin_descriptor_t TOY_DESCRIPTOR_NAME = {
    TOY_MAGIC, TOY_DESCRIPTOR_SIZE, TOY_MAJOR,       TOY_MINOR,
    TOY_KINDS, TOY_DEVICE,          TOY_ID,          "1.2.3",
    "",        "abi tests",         TOY_FASTER_PATHS};

EXPORT const sikv_plugin_tables_t* TOY_TABLES_NAME(void);
const sikv_plugin_tables_t* TOY_TABLES_NAME(void) { return &tables; }
