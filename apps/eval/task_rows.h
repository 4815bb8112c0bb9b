// Needles, chains and word counts in prompts of several lengths: what each pipeline still finds.
#ifndef SIKV_APPS_EVAL_TASK_ROWS_H_
#define SIKV_APPS_EVAL_TASK_ROWS_H_

#include "apps/eval/eval_session.h"

namespace sikv {

// The first text is the haystack. Prints tables and writes --svg; after Ctrl-C what is finished,
// and throws Interrupted.
void evaluate_tasks(EvalSession& session);

}  // namespace sikv

#endif  // SIKV_APPS_EVAL_TASK_ROWS_H_
