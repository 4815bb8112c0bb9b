#include "framework/model/tasks.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <iterator>
#include <numeric>
#include <utility>

#include "framework/base/error.h"
#include "framework/base/progress.h"
#include "framework/base/random.h"
#include "framework/base/text.h"
#include "framework/config/pipeline_text.h"
#include "framework/metrics/summary.h"
#include "framework/model/generate.h"

namespace sikv {
namespace {

constexpr int kKeys = 4, kValues = 4, kChain = 5, kCommon = 5, kFrequent = 3;

// Tokens of an answer: of digits one each, of words up to six, with what stands between them.
constexpr int kPasskeyTokens = 7, kNumberTokens = 12, kListTokens = 60;

constexpr const char* kAdjectives[] = {
    "brisk", "calm", "dusty", "eager", "faint", "giant", "humble", "icy", "jolly", "keen",
    "loud",  "mild", "noble", "odd",   "plain", "quick", "rusty",  "shy", "tidy",  "vivid"};
constexpr const char* kNouns[] = {"anchor", "basket",  "candle", "desert", "engine",
                                  "falcon", "garden",  "hammer", "island", "jacket",
                                  "kettle", "lantern", "mirror", "needle", "orchard",
                                  "pepper", "ribbon",  "saddle", "temple", "window"};

template <typename T>
void shuffle(std::vector<T>& items, Random& random) {
  for (size_t i = items.size(); i > 1; --i) std::swap(items[i - 1], items[random.below(i)]);
}

// `count` different names such as "rusty-anchor".
std::vector<std::string> names(size_t count, Random& random) {
  std::vector<std::string> all;
  for (const char* adjective : kAdjectives) {
    for (const char* noun : kNouns) all.push_back(fmt::format("{}-{}", adjective, noun));
  }
  shuffle(all, random);
  SIKV_ASSERT(count <= all.size());
  all.resize(count);
  return all;
}

std::string digits(int count, Random& random) {
  std::string text;
  for (int i = 0; i < count; ++i) text += static_cast<char>('0' + random.below(10));
  return text;
}

std::string letters(int count, char first, Random& random) {
  std::string text;
  for (int i = 0; i < count; ++i) text += static_cast<char>(first + random.below(26));
  return text;
}

// ---- needles in a text --------------------------------------------------------------------------

struct Needle {
  double depth;
  std::string text;
};

struct Hidden {
  std::vector<Needle> needles;
  std::string question;
  std::vector<std::string> answers;
  int answer_tokens;
};

Hidden passkey(double depth, Random& random) {
  const std::string key = digits(5, random);
  return {{{depth, "The pass key is " + key + ". Remember it. " + key + " is the pass key."}},
          "What is the pass key? The pass key is",
          {key},
          kPasskeyTokens};
}

std::string magic_number(const std::string& key, const std::string& value) {
  return "One of the special magic numbers for " + key + " is: " + value + ".";
}

// The first key's needle at `depth`, the others anywhere.
Hidden magic_number_among(int keys, double depth, Random& random) {
  Hidden hidden;
  hidden.answer_tokens = kNumberTokens;
  const auto all = names(static_cast<size_t>(keys), random);
  for (const std::string& key : all) {
    const bool asked = &key == all.data();
    const std::string value = digits(7, random);
    hidden.needles.push_back({asked ? depth : random.uniform(), magic_number(key, value)});
    if (asked) hidden.answers = {value};
  }
  hidden.question = "What is the special magic number for " + all[0] +
                    " mentioned in the text above? The special magic number for " + all[0] +
                    " mentioned in the text above is:";
  return hidden;
}

Hidden magic_numbers_of_one_key(Random& random) {
  Hidden hidden;
  hidden.answer_tokens = kListTokens;
  const std::string key = names(1, random)[0];
  for (int i = 0; i < kValues; ++i) {
    hidden.answers.push_back(digits(7, random));
    hidden.needles.push_back({random.uniform(), magic_number(key, hidden.answers.back())});
  }
  hidden.question = "What are all the special magic numbers for " + key +
                    " mentioned in the text above? The special magic numbers for " + key +
                    " mentioned in the text above are:";
  return hidden;
}

Hidden variables(Random& random) {
  Hidden hidden;
  hidden.answer_tokens = kListTokens;
  const std::string value = digits(5, random);
  std::vector<double> depths;
  for (int i = 0; i < kChain; ++i) {
    hidden.answers.push_back(letters(5, 'A', random));
    depths.push_back(random.uniform());
  }
  std::sort(depths.begin(), depths.end());  // a variable is assigned before it is used
  for (size_t i = 0; i < depths.size(); ++i) {
    const std::string source = i == 0 ? value : "VAR " + hidden.answers[i - 1];
    hidden.needles.push_back({depths[i], "VAR " + hidden.answers[i] + " = " + source});
  }
  hidden.question = fmt::format(
      "Question: Find all variables that are assigned the value {0} in the text above. Answer: "
      "According to the chain of assignments in the text above, {1} variables are assigned the "
      "value {0}, they are:",
      value, kChain);
  return hidden;
}

TaskPrompt hide(Hidden hidden, const Tokenizer& tokenizer, std::span<const int32_t> haystack,
                int64_t length) {
  std::stable_sort(hidden.needles.begin(), hidden.needles.end(),
                   [](const Needle& a, const Needle& b) { return a.depth < b.depth; });
  const auto question = tokenizer.encode("\n\n" + hidden.question);
  std::vector<std::vector<int32_t>> needles;
  int64_t taken = std::ssize(question);
  for (const Needle& needle : hidden.needles) {
    needles.push_back(tokenizer.encode("\n\n" + needle.text + "\n\n"));
    taken += std::ssize(needles.back());
  }
  const int64_t rest = length - taken;
  if (rest < 0 || rest > std::ssize(haystack)) {
    throw Error(
        "a prompt of {} tokens is out of reach, this task and text allow {} to {}: change "
        "--lengths, or give a longer text",
        length, taken, std::ssize(haystack) + taken);
  }
  TaskPrompt prompt{{}, std::move(hidden.answers), hidden.answer_tokens};
  auto from = haystack.begin();
  for (size_t i = 0; i < needles.size(); ++i) {
    const auto to =
        haystack.begin() + std::lround(hidden.needles[i].depth * static_cast<double>(rest));
    prompt.tokens.insert(prompt.tokens.end(), from, to);
    prompt.tokens.insert(prompt.tokens.end(), needles[i].begin(), needles[i].end());
    from = to;
  }
  prompt.tokens.insert(prompt.tokens.end(), from, haystack.begin() + rest);
  prompt.tokens.insert(prompt.tokens.end(), question.begin(), question.end());
  return prompt;
}

// ---- word lists ---------------------------------------------------------------------------------

struct WordList {
  std::string text;
  std::vector<std::string> answers;
};

// A quarter of the words are the common ones; the others share the rest.
WordList common_words(int64_t words, uint64_t seed) {
  Random random(seed);
  const int64_t common = std::max<int64_t>(2, words / (4 * kCommon));
  const int64_t other = std::max<int64_t>(1, common / 10);
  const int64_t others = std::max<int64_t>(0, words - common * kCommon) / other;
  const auto all = names(static_cast<size_t>(kCommon + others), random);
  std::vector<std::string> list;
  for (size_t i = 0; i < all.size(); ++i)
    list.insert(list.end(), i < kCommon ? common : other, all[i]);
  shuffle(list, random);
  std::string text =
      "Below is a numbered list of words. Some appear more often than others. Memorise the ones "
      "that appear most often.\n";
  for (size_t i = 0; i < list.size(); ++i) text += fmt::format("{}. {}\n", i + 1, list[i]);
  text += fmt::format(
      "Question: What are the {0} most common words in the list above? Answer: The {0} words that "
      "appear most often in the list are:",
      kCommon);
  return {text, {all.begin(), all.begin() + kCommon}};
}

WordList frequent_words(int64_t words, uint64_t seed) {
  Random random(seed);
  std::vector<std::string> list, answers;
  for (int64_t rank = 1; std::ssize(list) < words; ++rank) {
    const std::string word = letters(6, 'a', random);
    if (rank <= kFrequent) answers.push_back(word);
    // 0.6 is 1 / sum of 1 / rank^2.
    const double count = 0.6 * static_cast<double>(words) / static_cast<double>(rank * rank);
    list.insert(list.end(), static_cast<size_t>(std::max<int64_t>(1, std::lround(count))), word);
  }
  list.resize(static_cast<size_t>(words));
  shuffle(list, random);
  std::string text =
      "Read the following coded text and track the frequency of each coded word.\n" +
      join(list, " ") +
      fmt::format(
          "\nQuestion: What are the {0} most frequent words in the coded text above? Answer: "
          "According to the coded text above, the {0} most frequent words are:",
          kFrequent);
  return {std::move(text), std::move(answers)};
}

// The longest list that fits `length` tokens.
template <typename MakeList>
TaskPrompt fit(MakeList&& make, const Tokenizer& tokenizer, int64_t length) {
  constexpr int64_t kFewestWords = 60;  // fewer leave the answers ties
  const auto tokens_of = [&](int64_t words) { return tokenizer.encode(make(words).text); };
  if (const int64_t least = std::ssize(tokens_of(kFewestWords)); least > length) {
    throw Error("a prompt of {} tokens is out of reach, this task needs {}: change --lengths",
                length, least);
  }
  int64_t low = kFewestWords, high = length;  // a word is a token at least
  while (high - low > 1) {
    const int64_t middle = low + (high - low) / 2;
    (std::ssize(tokens_of(middle)) <= length ? low : high) = middle;
  }
  return {tokens_of(low), make(low).answers, kListTokens};
}

}  // namespace

const std::vector<std::string>& task_names() {
  static const std::vector<std::string> kNames = {"passkey",       "single",    "multi_key",
                                                  "multi_value",   "variables", "common_words",
                                                  "frequent_words"};
  return kNames;
}

Task parse_task(const std::string& name) {
  const auto& known = task_names();
  const auto found = std::find(known.begin(), known.end(), name);
  if (found == known.end()) {
    throw Error("there is no task '{}'{}; there are {}", name, did_you_mean(name, known),
                join(known));
  }
  return static_cast<Task>(found - known.begin());
}

std::string task_name(Task task) { return task_names()[static_cast<size_t>(task)]; }

bool has_depth(Task task) {
  return task == Task::kPasskey || task == Task::kSingle || task == Task::kMultiKey;
}

int TaskPrompt::found_in(const std::string& text) const {
  return static_cast<int>(std::count_if(
      answers.begin(), answers.end(),
      [&](const std::string& answer) { return text.find(answer) != std::string::npos; }));
}

TaskPrompt task_prompt(Task task, const Tokenizer& tokenizer, std::span<const int32_t> haystack,
                       int64_t length, double depth, uint64_t seed) {
  Random random(seed);
  switch (task) {
    case Task::kPasskey:
      return hide(passkey(depth, random), tokenizer, haystack, length);
    case Task::kSingle:
      return hide(magic_number_among(1, depth, random), tokenizer, haystack, length);
    case Task::kMultiKey:
      return hide(magic_number_among(kKeys, depth, random), tokenizer, haystack, length);
    case Task::kMultiValue:
      return hide(magic_numbers_of_one_key(random), tokenizer, haystack, length);
    case Task::kVariables:
      return hide(variables(random), tokenizer, haystack, length);
    case Task::kCommonWords:
      return fit([&](int64_t words) { return common_words(words, seed); }, tokenizer, length);
    case Task::kFrequentWords:
      return fit([&](int64_t words) { return frequent_words(words, seed); }, tokenizer, length);
  }
  SIKV_ASSERT(false);
}

std::vector<TaskRow> run_task(Task task, int64_t length, const TaskPlan& plan, Transformer& model,
                              const Tokenizer& tokenizer, std::span<const int32_t> haystack,
                              std::span<const PipelineSpec> pipelines, const Registry& registry,
                              const std::function<Device&(const PipelineSpec&)>& device_of) {
  const int cells = plan.cells(task), prompts = plan.prompts_per_cell(task);
  std::vector<TaskRow> rows;
  for (const PipelineSpec& spec : pipelines) {
    rows.emplace_back().pipeline = pipeline_text(spec, registry);
  }
  std::vector<std::vector<double>> step_s(rows.size()), scans(rows.size());
  const uint64_t seed = derive_seed(derive_seed(plan.seed, static_cast<uint64_t>(task)),
                                    static_cast<uint64_t>(length));
  Progress progress(fmt::format("{} of {}", task_name(task), length),
                    int64_t{cells} * prompts * std::ssize(rows));
  for (int cell = 0; cell < cells; ++cell) {
    std::vector<int> found(rows.size());
    int asked = 0;
    for (int i = 0; i < prompts; ++i) {
      TaskPrompt prompt = task_prompt(task, tokenizer, haystack, length, plan.depth(cell),
                                      derive_seed(seed, static_cast<uint64_t>(cell * prompts + i)));
      asked += static_cast<int>(prompt.answers.size());
      GenerateOptions options;
      options.max_tokens = prompt.answer_tokens;
      options.dtype = plan.dtype;
      options.all_queries = plan.all_queries;
      Generator generator(model, std::move(prompt.tokens), options);
      for (size_t p = 0; p < rows.size(); ++p) {
        const Generated answer =
            generator.run(pipelines[p], registry, device_of(pipelines[p]), [](int32_t) {});
        rows[p].found_by_prompt.push_back(prompt.found_in(tokenizer.decode(answer.tokens)));
        found[p] += rows[p].found_by_prompt.back();
        rows[p].bytes_per_token = answer.bytes_per_token;
        step_s[p].push_back(answer.token_s);
        if (answer.scans_per_step) scans[p].push_back(*answer.scans_per_step);
        progress.add();
      }
    }
    for (size_t p = 0; p < rows.size(); ++p) {
      rows[p].shares.push_back(static_cast<double>(found[p]) / asked);
      rows[p].found += found[p];
      rows[p].asked += asked;
    }
  }
  for (size_t p = 0; p < rows.size(); ++p) {
    rows[p].token_s = summarize(step_s[p], BadSide::kHigh).median;
    if (!scans[p].empty()) rows[p].scans_per_step = summarize(scans[p], BadSide::kHigh).mean;
  }
  return rows;
}

}  // namespace sikv
