#include "framework/model/tasks.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <map>
#include <sstream>

#include "framework/base/error.h"

namespace sikv {
namespace {

class Tasks : public testing::Test {
 protected:
  TaskPrompt prompt(Task task, int64_t length, double depth = 0.5, uint64_t seed = 7) const {
    return task_prompt(task, tokenizer_, haystack_, length, depth, seed);
  }
  std::string text(const TaskPrompt& prompt) const { return tokenizer_.decode(prompt.tokens); }
  static size_t count(const std::string& text, const std::string& word) {
    size_t n = 0;
    for (size_t at = text.find(word); at != std::string::npos; at = text.find(word, at + 1)) ++n;
    return n;
  }

  Tokenizer tokenizer_{
      read_model(std::string(SIKV_SOURCE_DIR) + "/datasets/tiny/llama.h5").vocabulary};
  std::vector<int32_t> haystack_ = tokenizer_.encode(std::string(4000, '.'));
};

TEST_F(Tasks, NamesParseBack) {
  for (const std::string& name : task_names()) EXPECT_EQ(task_name(parse_task(name)), name);
  try {
    parse_task("multikey");
    FAIL();
  } catch (const Error& error) {
    EXPECT_NE(std::string(error.what()).find("did you mean 'multi_key'?"), std::string::npos);
  }
}

TEST_F(Tasks, PasskeyHasItsLengthAndTheKeyAtItsDepth) {
  for (const double depth : {0.0, 0.5, 1.0}) {
    const TaskPrompt asked = prompt(Task::kPasskey, 500, depth);
    EXPECT_EQ(asked.tokens.size(), 500u);
    ASSERT_EQ(asked.answers.size(), 1u);
    EXPECT_EQ(asked.answers[0].size(), 5u);
    const std::string all = text(asked);
    const size_t before = all.find("\n\nThe pass key is " + asked.answers[0]);
    ASSERT_NE(before, std::string::npos) << all;
    EXPECT_TRUE(all.ends_with("The pass key is"));
    const double dots = static_cast<double>(std::count(all.begin(), all.end(), '.')) - 2;
    EXPECT_NEAR(static_cast<double>(before) / dots, depth, 0.05);
  }
  EXPECT_NE(prompt(Task::kPasskey, 500, 0, 7).answers, prompt(Task::kPasskey, 500, 0, 8).answers);
  EXPECT_EQ(prompt(Task::kPasskey, 500, 0, 7).tokens, prompt(Task::kPasskey, 500, 0, 7).tokens);
}

TEST_F(Tasks, NeedlesAreInThePromptAndAskedFor) {
  for (const Task task : {Task::kSingle, Task::kMultiKey, Task::kMultiValue, Task::kVariables}) {
    const TaskPrompt asked = prompt(task, 2000);
    EXPECT_EQ(asked.tokens.size(), 2000u) << task_name(task);
    for (const std::string& answer : asked.answers) {
      EXPECT_GE(count(text(asked), answer), 1u) << task_name(task) << " " << answer;
    }
  }
  EXPECT_EQ(count(text(prompt(Task::kSingle, 2000)), "One of the special magic numbers"), 1u);
  EXPECT_EQ(count(text(prompt(Task::kMultiKey, 2000)), "One of the special magic numbers"), 4u);
  EXPECT_EQ(prompt(Task::kMultiValue, 2000).answers.size(), 4u);
}

TEST_F(Tasks, VariablesAreAssignedInOrder) {
  const TaskPrompt asked = prompt(Task::kVariables, 2000);
  const std::string all = text(asked);
  size_t last = 0;
  for (const std::string& name : asked.answers) {
    const size_t at = all.find("VAR " + name + " = ");
    ASSERT_NE(at, std::string::npos);
    EXPECT_GE(at, last);
    last = at;
  }
}

TEST_F(Tasks, AnswersAreTheMostFrequentWords) {
  for (const Task task : {Task::kCommonWords, Task::kFrequentWords}) {
    const TaskPrompt asked = prompt(task, 3000);
    EXPECT_LE(asked.tokens.size(), 3000u);
    EXPECT_GT(asked.tokens.size(), 2900u) << task_name(task);
    std::istringstream stream(text(asked));
    std::map<std::string, size_t> counts;
    // The question's words come twice at most.
    for (std::string word; stream >> word;) ++counts[word];
    size_t least = 1000;
    for (const std::string& answer : asked.answers) least = std::min(least, counts[answer]);
    EXPECT_GT(least, 2u) << task_name(task);
    for (const auto& [word, n] : counts) {
      const bool is_answer =
          std::find(asked.answers.begin(), asked.answers.end(), word) != asked.answers.end();
      EXPECT_TRUE(is_answer || n < least) << task_name(task) << " " << word;
    }
  }
}

TEST_F(Tasks, CountsWhatAnAnswerHolds) {
  const TaskPrompt asked{{}, {"12", "34", "56"}, 7};
  EXPECT_EQ(asked.found_in("they are 34 and 12."), 2);
  EXPECT_EQ(asked.found_in(""), 0);
}

TEST_F(Tasks, LengthsOutOfReachAreRefused) {
  for (const std::string& name : task_names()) {
    EXPECT_THROW(prompt(parse_task(name), 10), Error) << name;
    if (parse_task(name) < Task::kCommonWords) {
      EXPECT_THROW(prompt(parse_task(name), 50000), Error) << name;
    }
  }
}

TEST(TaskPlan, TasksWithoutDepthHaveAsManyPrompts) {
  const TaskPlan plan{5, 2};
  EXPECT_EQ(plan.cells(Task::kPasskey) * plan.prompts_per_cell(Task::kPasskey), 10);
  EXPECT_EQ(plan.cells(Task::kVariables), 1);
  EXPECT_EQ(plan.prompts_per_cell(Task::kVariables), 10);
  EXPECT_EQ(plan.depth(0), 0);
  EXPECT_EQ(plan.depth(4), 1);
}

}  // namespace
}  // namespace sikv
