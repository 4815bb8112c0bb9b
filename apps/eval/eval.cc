#include "apps/eval/eval.h"

#include <memory>

#include "apps/eval/eval_session.h"
#include "apps/eval/task_rows.h"
#include "apps/eval/text_rows.h"
#include "framework/base/text.h"

namespace sikv {

Command add_eval(CLI::App& app, const std::vector<std::string>& command_line) {
  CLI::App* command = app.add_subcommand(
      "eval",
      "What pipelines do to what a real model says: NLL, KL to dense, top-1, needles found");
  auto flags = std::make_shared<EvalFlags>();
  command->add_option("CONFIG", flags->files, "YAML configs; they need no source")->required();
  command->add_option("--model", flags->model, "a model file")->required()->type_name("FILE");
  command->add_option("--text", flags->texts, "UTF-8 text; may be repeated")
      ->type_name("FILE")
      ->allow_extra_args(false);
  command
      ->add_option("--trace-tokens", flags->traces,
                   "takes the tokens of a trace instead of a text; may be repeated")
      ->type_name("FILE")
      ->allow_extra_args(false);
  const auto count = [&](const char* name, auto& value, int64_t least, const char* help) {
    command->add_option(name, value, help)
        ->type_name("N")
        ->capture_default_str()
        ->check(CLI::Range(least, int64_t{1} << 30));
  };
  count("--first-token", flags->first_token, 0, "tokens of the text that are skipped");
  count("--prompt", flags->prompt, 1, "tokens that are prefilled with dense attention");
  count("--steps", flags->steps, 1, "teacher-forced steps behind the prompt");
  count("--queries", flags->queries, 1, "last prompt queries that selectors see");
  command->add_option("--kv-type", flags->dtype, "K, V and Q as caches get them: fp16 or fp32")
      ->type_name("TYPE")
      ->capture_default_str()
      ->check(CLI::IsMember({"fp16", "fp32"}));
  command
      ->add_option("--tasks", flags->tasks,
                   "asks for what is hidden in prompts instead: " + join(task_names()) + ", or all")
      ->type_name("NAME,...")
      ->delimiter(',');
  command->add_option("--lengths", flags->lengths, "of the tasks' prompts, in tokens")
      ->type_name("N,...")
      ->delimiter(',')
      ->capture_default_str()
      ->check(CLI::Range(int64_t{64}, int64_t{1} << 30));
  count("--depths", flags->plan.depths, 1, "places of what is asked for, from start to end");
  count("--trials", flags->plan.trials, 1, "prompts per length and depth");
  add_output_option(*command, "--svg", flags->svg, "the tasks' grids as heat maps");
  add_output_option(*command, "--json", flags->json,
                    "keeps every finished row there; an evaluation that was interrupted goes on "
                    "from it");
  flags->config.add_to(*command);
  command->footer(examples({
      "sikv eval configs/eval.yaml --model smollm2.h5 --text manual.txt --json eval.json",
      "sikv eval configs/eval.yaml --model smollm2.h5 --text a.txt --text b.txt --steps 1000",
      "sikv eval configs/eval.yaml --model smollm2.h5 --text manual.txt --tasks passkey,multi_key "
      "--lengths 2048,4096 --svg grid.svg",
      "sikv eval configs/self_index.yaml --model smollm2.h5 --trace-tokens trace.h5 --prompt 2048",
  }));
  return {command, [flags, &command_line] {
            check_own_files({{"--json", flags->json}, {"--svg", flags->svg}});
            if (flags->tasks == std::vector<std::string>{"all"}) flags->tasks = task_names();
            for (const std::string& name : flags->tasks) static_cast<void>(parse_task(name));
            EvalSession session(*flags, command_line);
            flags->tasks.empty() ? evaluate_texts(session) : evaluate_tasks(session);
          }};
}

}  // namespace sikv
