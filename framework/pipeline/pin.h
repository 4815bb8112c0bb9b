// Which tokens of a prompt stay exact: the pin rules every selector gets from the framework.
#ifndef SIKV_FRAMEWORK_PIPELINE_PIN_H_
#define SIKV_FRAMEWORK_PIPELINE_PIN_H_

#include <cstdint>
#include <vector>

#include "framework/config/config.h"
#include "framework/device/device.h"
#include "plugins/abi/sikv_abi.h"

namespace sikv {

// The prompt of one (sequence, KV head) and its newest queries.
struct PinInput {
  const sikv_rows& keys;  // exact K of the whole prompt
  int sequence, head;
  int encoded;          // candidates are positions [0, encoded)
  const void* queries;  // [W, Hq, D] of the sequence, positions count - W .. count - 1
  int num_queries;      // W
  int num_query_heads;
  int num_kv_heads;
  int head_dim;
  float scale;
};

// Error if `rule` needs queries and there are none.
void check_pin_queries(PinRule rule, int num_queries);

// At most `pinned` positions, ascending, ties to the lower position.
//   last_query  highest q.k for the last prompt query, mean over the group's heads
//   snapkv      SnapKV scores (arXiv 2404.14469): attention of the last 32 queries, summed over
//               window and group, max-pooled over 7 positions; candidates lie before the window
//   first       positions 0 ..
std::vector<int32_t> choose_pinned(PinRule rule, int pinned, const PinInput& input);

// The prompts of one layer on a GPU. All addresses are the device's; B, H as in the ABI.
struct PinBatch {
  sikv_rows keys;
  const void* queries;  // [B, W, Hq, D]
  int num_queries;      // W
  int num_query_heads;
  int num_kv_heads;
  int head_dim;
  int num_sequences;
  float scale;
  int32_t* slots;  // out; [B, H, pinned]
  int32_t* len;    // out; [B, H]
};

// choose_pinned for every row; candidates are the tokens of whole pages. Scores of last_query are
// the CPU's to the bit, those of snapkv up to rounding.
void choose_pinned_on_gpu(PinRule rule, int pinned, const PinBatch& batch, Device& device);

}  // namespace sikv

#endif  // SIKV_FRAMEWORK_PIPELINE_PIN_H_
