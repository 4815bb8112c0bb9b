// Prompts of any length whose answer lies somewhere in them, and how many of the answers a model
// finds with a pipeline as its cache: what a cache must not lose. The tasks follow RULER (Hsieh et
// al., 2024); depth is the share of the text before what is asked for.
//
//   passkey         five digits, asked for at the end                                    by depth
//   single          the magic number of a key                                            by depth
//   multi_key       the same among three other keys with numbers of their own            by depth
//   multi_value     the four numbers of one key
//   variables       the five variables of a chain of assignments that starts with a number
//   common_words    the five words of a list that come ten times as often as the others
//   frequent_words  the three most frequent of coded words, whose counts fall as 1 / rank^2
#ifndef SIKV_FRAMEWORK_MODEL_TASKS_H_
#define SIKV_FRAMEWORK_MODEL_TASKS_H_

#include <cstdint>
#include <functional>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "framework/config/config.h"
#include "framework/device/device.h"
#include "framework/model/tokenizer.h"
#include "framework/model/transformer.h"
#include "framework/registry/registry.h"

namespace sikv {

enum class Task {
  kPasskey,
  kSingle,
  kMultiKey,
  kMultiValue,
  kVariables,
  kCommonWords,
  kFrequentWords
};

const std::vector<std::string>& task_names();
// Error with the nearest name if there is no such task.
Task parse_task(const std::string& name);
std::string task_name(Task task);
// Whether prompts of the task differ by depth.
bool has_depth(Task task);

struct TaskPrompt {
  std::vector<int32_t> tokens;
  std::vector<std::string> answers;
  int answer_tokens = 0;  // greedy tokens among which they are looked for

  int found_in(const std::string& text) const;
};

// Of `length` tokens; the two word lists end up to one word below it. `haystack`: the tokens of a
// text, at least `length`; word lists do not use it. Same arguments, same prompt.
TaskPrompt task_prompt(Task task, const Tokenizer& tokenizer, std::span<const int32_t> haystack,
                       int64_t length, double depth, uint64_t seed);

struct TaskPlan {
  int depths = 5;  // from the start of the prompt to its end
  int trials = 2;  // prompts per length and depth
  uint64_t seed = 1;
  int32_t dtype = SIKV_FP16;
  bool all_queries = false;  // of the prompts are kept, for selectors that need them

  // A task without depth has its depths x trials prompts in one cell.
  int cells(Task task) const { return has_depth(task) ? depths : 1; }
  int prompts_per_cell(Task task) const { return depths * trials / cells(task); }
  double depth(int cell) const { return depths == 1 ? 0.5 : double(cell) / (depths - 1); }
};

// One pipeline at one task and length.
struct TaskRow {
  std::string pipeline;        // printed form
  std::vector<double> shares;  // of the answers, by cell
  int found = 0, asked = 0;    // answers
  // Answers found by prompt, cell after cell: all pipelines are asked the same, so that two of them
  // can be compared prompt by prompt.
  std::vector<int> found_by_prompt;
  std::optional<double> scans_per_step;
  double bytes_per_token = 0;
  double token_s = 0;  // median over prompts of the median step
};

// Every prompt is prefilled once, for all pipelines. `device_of` opens the device of a pipeline.
// Shows progress; throws Interrupted after Ctrl-C.
std::vector<TaskRow> run_task(Task task, int64_t length, const TaskPlan& plan, Transformer& model,
                              const Tokenizer& tokenizer, std::span<const int32_t> haystack,
                              std::span<const PipelineSpec> pipelines, const Registry& registry,
                              const std::function<Device&(const PipelineSpec&)>& device_of);

}  // namespace sikv

#endif  // SIKV_FRAMEWORK_MODEL_TASKS_H_
